"""What the lines of the study say: means with intervals, which differences are ties, the page's tables and figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igpo.demo.study import Mean, mean

BASELINES = ("grpo", "igpo")
OF_BLOCKS = "grpo, block-causal model"  # what a row on that model is compared with
KINDS = ("rollouts", "exploration", "scoring", "training")
SHOWN = {"chain": "State chains", "countdown": "Countdown, 3 numbers", "sudoku": "4x4 Sudoku"}
BETTER, WORSE, TIE = "+", "-", "tie"
COLOURS = {BETTER: "#009E73", WORSE: "#D55E00", TIE: "#777777"}  # Okabe and Ito's palette

Line = Mapping[str, Any]


def verdict(difference: Mean) -> str:
    """A tie unless the 95 % interval of the difference leaves out 0."""
    if abs(difference.value) <= difference.half_width:
        return TIE
    return BETTER if difference.value > 0 else WORSE


def paired(lines: Sequence[Line], others: Sequence[Line], key: str = "after") -> Mean | None:
    """The mean over common seeds of the difference, which share start, problems and random streams; None below two."""
    ours, theirs = (
        {x["seed"]: x[key] for x in some if x[key] is not None} for some in (lines, others)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    return mean([ours[s] - theirs[s] for s in seeds]) if len(seeds) > 1 else None


def summarise(lines: Sequence[Line], names: Sequence[str]) -> dict[str, Any]:
    """Task -> row -> its numbers; and the rows without a line, by name."""
    tasks = list(dict.fromkeys(x["task"] for x in lines))
    found: dict[str, Any] = {}
    for task in tasks:
        rows = {n: [x for x in lines if x["task"] == task and x["row"] == n] for n in names}
        found[task] = {n: _row(n, rows) for n in names if rows[n]}
    missing = {t: [n for n in names if n not in found[t]] for t in tasks}
    return {"tasks": found, "missing": {t: some for t, some in missing.items() if some}}


def _row(name: str, rows: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    lines = rows[name]
    done = [x for x in lines if x["after"] is not None]
    found: dict[str, Any] = {
        "seeds": sorted(x["seed"] for x in done),
        "stopped": {str(x["seed"]): x["stopped"] for x in lines if x["stopped"]},
        "before": lines[0]["before"],
        "after": _mean([x["after"] for x in done]),
        "gain": _mean([x["after"] - x["before"] for x in done]),
        "reward_first": _mean([x["reward"] for x in done]),
        "reward_last": _mean([x["reward_last"] for x in done]),
        "forwards": {k: round(sum(x["forwards"][k] for x in lines) / len(lines)) for k in KINDS},
        "completions": lines[0]["completions"],
        "seconds": round(sum(x["seconds"] for x in lines) / len(lines), 1),
    }
    found["against"] = {
        other: {**vars(difference), "verdict": verdict(difference)}
        for other in (*BASELINES, OF_BLOCKS)
        if other != name and (difference := paired(lines, rows.get(other, ()))) is not None
        if _same_start(lines, rows[other])
    }
    return found


def _same_start(lines: Sequence[Line], others: Sequence[Line]) -> bool:
    return {x["start"] for x in lines} == {x["start"] for x in others}


def _mean(values: Sequence[float]) -> dict[str, Any] | None:
    """Without an interval below two values."""
    if len(values) < 2:
        return (
            {"value": values[0], "half_width": None, "per_seed": list(values)} if values else None
        )
    return vars(mean(values))


def table(rows: Mapping[str, Any]) -> str:
    """One task's rows in Markdown; forwards in thousands."""
    lines = [
        "| algorithm | accuracy after | against `grpo` | against `igpo` | rollouts | exploration | scoring | training "
        "| all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, x in rows.items():
        counts = [f"{x['forwards'][k] / 1000:,.1f}" for k in KINDS]
        total = f"{sum(x['forwards'].values()) / 1000:,.1f}"
        against = [_against(x, other) for other in BASELINES]
        lines.append(f"| {' | '.join((_name(name), _after(x), *against, *counts, total))} |")
    return "\n".join(lines)


def overview(tasks: Mapping[str, Any]) -> str:
    """What each row gained over its start, a column per task."""
    names = dict.fromkeys(name for rows in tasks.values() for name in rows)
    lines = [
        f"| algorithm | {' | '.join(SHOWN[task] for task in tasks)} |",
        "|---" * (1 + len(tasks)) + "|",
    ]
    for name in names:
        gains = [_gain(rows.get(name)) for rows in tasks.values()]
        lines.append(f"| {_name(name)} | {' | '.join(gains)} |")
    return "\n".join(lines)


def _gain(x: Mapping[str, Any] | None) -> str:
    gain = x and x["gain"]
    return "–" if not gain or gain["half_width"] is None else _difference(Mean(**gain))


def _difference(difference: Mean, note: str = "") -> str:
    text = f"{difference.value:+.3f} ± {difference.half_width:.3f}{note}"
    return f"tie ({text})" if verdict(difference) == TIE else f"**{text}**"


def _name(name: str) -> str:
    head, _, rest = name.partition(" ")
    return f"`{name}`" if not rest or "=" in rest else f"`{head.rstrip(',')}`, {rest}"


def _after(x: Mapping[str, Any]) -> str:
    after = x["after"]
    if after is None:
        return "stopped"
    spread = "" if after["half_width"] is None else f" ± {after['half_width']:.3f}"
    part = (
        f" ({len(x['stopped'])} of {len(x['seeds']) + len(x['stopped'])} stopped)"
        if x["stopped"]
        else ""
    )
    return f"{after['value']:.3f}{spread}{part}"


def _against(x: Mapping[str, Any], other: str) -> str:
    """The difference to a baseline, a row on the block-causal model to the baseline on that model."""
    note = ""
    if other == "grpo" and OF_BLOCKS in x["against"]:
        other, note = OF_BLOCKS, " †"
    found = x["against"].get(other)
    if found is None:
        return "–"
    return _difference(Mean(found["value"], found["half_width"], tuple(found["per_seed"])), note)


def groups(rows: Mapping[str, Any], other: str) -> dict[str, list[str]]:
    """Verdict against a baseline -> the rows that have it."""
    found: dict[str, list[str]] = {BETTER: [], TIE: [], WORSE: []}
    for name, x in rows.items():
        if other in x["against"]:
            found[x["against"][other]["verdict"]].append(name)
    return found


def plot(tasks: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG, a panel per task: held-out accuracy of every row with its 95 % interval, and its forwards.

    Colour: better or worse than grpo from the same start (green, red), no such difference (grey).   Squares: rows on
    the block-causal model.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(6.5 * len(tasks), 9), constrained_layout=True, squeeze=False
    )
    for axis, (task, rows) in zip(axes[0], tasks.items(), strict=True):
        order = sorted(
            (n for n in rows if rows[n]["after"]), key=lambda n: rows[n]["after"]["value"]
        )
        colours = {"grpo": "#0072B2"} | {
            name: COLOURS[kind]
            for other in ("grpo", OF_BLOCKS)
            for kind, some in groups(rows, other).items()
            for name in some
        }
        for place, name in enumerate(order):
            x = rows[name]
            half = x["after"]["half_width"] or 0.0
            on_blocks = name == OF_BLOCKS or OF_BLOCKS in x["against"]
            axis.errorbar(
                x["after"]["value"], place, xerr=half, fmt="s" if on_blocks else "o", ms=4, lw=1,
                color=colours.get(name, COLOURS[TIE]),
            )  # fmt: skip
            total = sum(x["forwards"].values()) / 1000
            axis.annotate(
                f"{total:,.0f} k", (1.0, place), xycoords=("axes fraction", "data"), fontsize=7, va="center",
                ha="right",
            )  # fmt: skip
        if "grpo" in rows:
            axis.axvline(rows["grpo"]["before"], color="#999999", lw=1, ls="--")
        axis.set_yticks(range(len(order)), order, fontsize=8)
        axis.set_title(f"{SHOWN.get(task, task)} (dashed: start; right: forwards)", fontsize=10)
        axis.set_xlabel("held-out accuracy, mean and 95 % interval")
        low, high = axis.get_xlim()
        axis.set_xlim(max(0.0, low), high + 0.12 * (high - low))
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
