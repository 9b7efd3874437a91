"""`igpo report RUN …`: one HTML page that compares runs: what differs, last numbers, evaluations, curves. No server."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import ConfigError
from .logging import say
from .options import ReportOptions

# title and metric (docs/configuration.md) of every panel; those that some run has are drawn
PANELS = (
    ("reward", "reward"),
    ("correct completions", "correct"),
    ("held-out accuracy", "eval_accuracy"),
    ("groups that are all wrong", "inpaint/groups_all_wrong"),
    ("groups of equal rewards", "frac_reward_zero_std"),
    ("entropy of the draws, nats", "entropy"),
    ("clipped fraction", "clip_ratio/region_mean"),
    ("KL to the reference", "kl"),
    ("completion length, tokens", "completions/mean_length"),
    ("completions without an end", "completions/clipped_ratio"),
    ("hinted groups with a correct completion", "inpaint/success_rate"),
    ("completions replaced by hinted ones", "inpaint/replaced"),
    ("fraction of hint tokens", "inpaint/hint_fraction"),
    ("loss", "loss"),
    ("held-out loss", "eval_loss"),
    ("gradient norm", "grad_norm"),
    ("completions that could not be judged", "verify/failures"),
    ("seconds per step", "step_time"),
)
# Okabe and Ito's palette, distinguishable without colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WINDOW = 0.02  # of a run's steps: the width of the running mean; chosen
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } .note { color: #555; }
"""


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read. curves: metric -> (steps, values), without the steps at which it is missing."""

    name: str
    curves: dict[str, tuple[list[int], list[float]]]
    facts: dict[str, Any]  # the last start of run.json
    evaluation: dict[str, Any]  # evaluation.json


def run(options: ReportOptions) -> None:
    """Writes the page. Raises ConfigError for a folder that holds no run."""
    if not options.runs:
        raise ConfigError("report: name the folders of the runs: igpo report RUN ...")
    records = [read(Path(folder)) for folder in options.runs]
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(records), encoding="utf-8")
    say(f"written: {path}")


def read(folder: Path) -> RunRecord:
    """What a run has written so far; half a line at the end is left out. Raises ConfigError."""
    metrics, facts, evaluation = (
        folder / name for name in ("metrics.jsonl", "run.json", "evaluation.json")
    )
    if not metrics.exists() and not evaluation.exists():
        raise ConfigError(f"report: {folder} must hold metrics.jsonl or evaluation.json.")
    curves: dict[str, tuple[list[int], list[float]]] = {}
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    for line in map(json.loads, lines):
        for name, value in line.items():
            if name != "step" and value is not None:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    starts = json.loads(facts.read_text())["starts"] if facts.exists() else [{}]
    record = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    return RunRecord(folder.name or str(folder), curves, starts[-1], record)


def page(records: Sequence[RunRecord]) -> str:
    names = [record.name for record in records]
    if len(set(names)) < len(names):  # folders of the same name in different places
        names = [f"{name} ({place})" for place, name in enumerate(names, 1)]
    parts = [
        ("Settings that differ", _table(names, _differences(records))),
        ("Where they ran", _table(names, _machines(records))),
        ("Last numbers", _table(names, _last_numbers(records))),
        ("Evaluations", _table(names, _evaluations(records))),
        ("Curves", _curves(names, records)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in parts if content)
    title = html.escape("igpo: " + ", ".join(names))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>{body}</html>\n"
    )


def _table(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Nothing when there are no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in ("", *names))
    lines = (
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in (label, *cells)) + "</tr>"
        for label, cells in rows
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    configs = [record.facts.get("config", {}) for record in records]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [json.dumps(config.get(key)) for config in configs] for key in keys}
    return [(key, cells) for key, cells in values.items() if len(set(cells)) > 1]


def _machines(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    def fact(record: RunRecord, *path: str) -> str:
        value: Any = record.facts or record.evaluation.get("protocol", {})
        for key in path:
            value = value.get(key, {})
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")

    rows = {
        "started": ("time",), "commit": ("git_commit",), "GPUs": ("machine", "gpus"),
        "platform": ("machine", "platform"), "torch": ("versions", "torch"), "igpo": ("versions", "igpo"),
    }  # fmt: skip
    found = [(label, [fact(r, *path) for r in records]) for label, path in rows.items()]
    return [(label, cells) for label, cells in found if any(cells)]


def _last_numbers(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Means over the last tenth of a run's logged steps."""

    def last(record: RunRecord, name: str) -> str:
        values = record.curves.get(name, ([], []))[1]
        tail = values[-max(1, len(values) // 10) :]
        return f"{sum(tail) / len(tail):.4g}" if tail else ""

    rows = [("steps", [_steps(record) for record in records])]
    rows += [
        (f"{title} ({name})", [last(record, name) for record in records]) for title, name in PANELS
    ]
    return [(label, cells) for label, cells in rows if any(cells)]


def _steps(record: RunRecord) -> str:
    steps = [steps[-1] + 1 for steps, _ in record.curves.values()]
    return str(max(steps)) if steps else ""


def _evaluations(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Accuracy, avg@n and pass@k with their intervals, by length; then the protocol."""
    found: dict[str, list[str]] = {}
    for place, record in enumerate(records):
        for length, numbers in record.evaluation.get("lengths", {}).items():
            for name, value in numbers.items():
                low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
                if low is None or high is None:
                    continue
                cells = found.setdefault(f"{name}, {length} tokens", [""] * len(records))
                cells[place] = f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    protocols = [record.evaluation.get("protocol", {}) for record in records]
    keys = dict.fromkeys(key for facts in protocols for key in facts)
    for key in (k for k in keys if k not in ("versions", "machine", "git_commit")):
        found[key] = [str(facts.get(key, "")) for facts in protocols]
    return list(found.items())


def _curves(names: Sequence[str], records: Sequence[RunRecord]) -> str:
    """One SVG: a panel per metric that some run has; thin lines are the logged values, thick ones a running mean."""
    panels = [
        (title, name) for title, name in PANELS if any(name in record.curves for record in records)
    ]
    if not panels:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = 3
    height = math.ceil(len(panels) / columns)
    # the same input gives the same file
    with rc_context({"svg.hashsalt": "igpo", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4 * columns, 2.6 * height + 0.4), layout="constrained")
        for place, (title, metric) in enumerate(panels, 1):
            axis = figure.add_subplot(height, columns, place)
            _panel(axis, metric, names, records)
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
        handles = [Line2D([], [], color=_colour(i), label=name) for i, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(names)))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _panel(axis: Any, metric: str, names: Sequence[str], records: Sequence[RunRecord]) -> None:
    for i in range(len(names)):
        steps, values = records[i].curves.get(metric, ([], []))
        axis.plot(steps, values, color=_colour(i), alpha=0.3, lw=0.7)
        smooth = running_mean(values, max(1, round(WINDOW * len(values))))
        marker = "o" if len(values) < 2 else None
        axis.plot(steps, smooth, color=_colour(i), lw=1.5, marker=marker, ms=3)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Over the last `width` values, fewer at the start.

    >>> running_mean([1, 2, 3], 2)
    [1.0, 1.5, 2.5]
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[i + 1] - sums[max(0, i + 1 - width)]) / min(width, i + 1) for i in range(len(values))
    ]


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
