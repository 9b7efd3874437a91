"""Time and peak memory over rows and over vocabulary, log-log, one PNG per op.

python benchmarks/plot.py benchmarks/results/RESULT.json [--out docs]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import report

METRICS = {"median_ms": "time, ms", "peak_mib": "peak memory, MiB"}
AXES = {"rows": "rows", "vocabulary": "vocabulary"}
Line = list[tuple[float, float]]


def along(cases: list[dict], axis: str) -> list[dict]:
    """The cases that differ in this axis alone, at the value of the other axis that covers most of it, in order."""
    other = next(name for name in AXES if name != axis)
    groups: dict[object, list[dict]] = defaultdict(list)
    for case in cases:
        groups[case["axes"][other]].append(case)
    most = max(groups.values(), key=lambda g: len({c["axes"][axis] for c in g}))
    return sorted(most, key=lambda c: c["axes"][axis])


def lines(cases: list[dict], axis: str, metric: str) -> dict[str, Line]:
    """provider -> its points over one axis, if there are two.

    A metric of 0 (no memory beyond the inputs) has no place on a logarithmic scale and is left out.
    """
    found: dict[str, Line] = defaultdict(list)
    for case in along(cases, axis):
        for name, provider in case["providers"].items():
            if provider[metric] > 0:
                found[name].append((case["axes"][axis], provider[metric]))
    return {name: line for name, line in found.items() if len(line) > 1}


def figures(result: dict) -> dict[str, list[dict]]:
    """ "op variant dtype" -> its cases that have rows and a vocabulary."""
    found: dict[str, list[dict]] = defaultdict(list)
    for case in result["cases"]:
        axes = case["axes"]
        if all(name in axes for name in AXES):
            rest = str(axes["problem"]).split()[1:]
            found[" ".join([case["op"], *rest, str(axes["variant"])]).strip()].append(case)
    return dict(found)


def title(name: str, where: dict) -> str:
    chip = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    return f"{name}\n{chip}, {where['date']}, {where['commit']}"


def draw(name: str, cases: list[dict], where: dict, path: Path) -> bool:
    """Writes one figure; False when no axis has two points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(a, m, lines(cases, a, m)) for a in AXES for m in METRICS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return False
    providers = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    colours = dict(zip(providers, pyplot.get_cmap("tab10").colors * 2, strict=False))
    figure, places = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for place, (axis, metric, found) in zip(places[0], panels, strict=True):
        for provider, points in found.items():
            ours = provider.startswith("igpo")
            place.loglog(
                *zip(*points, strict=True), marker="o", ms=3, color=colours[provider],
                lw=2 if ours else 1, label=provider,
            )  # fmt: skip
        if metric == "median_ms":
            floor = [(c["axes"][axis], c["best_ms"]) for c in along(cases, axis)]
            place.loglog(*zip(*floor, strict=True), "k:", lw=1, label="machine's best")
        place.set_xlabel(AXES[axis])
        place.set_ylabel(METRICS[metric])
        place.grid(True, which="both", alpha=0.2)
    handles, labels = places[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.suptitle(title(name, where), fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def file_name(name: str, where: dict) -> str:
    letters = "".join(c if c.isalnum() or c in "._" else "-" for c in name.replace("%", ""))
    return f"bench-{report.kind(where)}-{letters}.png"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    written = 0
    for name, cases in figures(result).items():
        path = args.out / file_name(name, result["machine"])
        if draw(name, cases, result["machine"], path):
            print(f"written: {path}")
            written += 1
    if not written:
        print("no op was measured at two sizes of anything")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
