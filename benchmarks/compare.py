"""`make bench-compare`: fails when an op lost ground against the torch code it is measured beside.

    python benchmarks/compare.py [OP ...]            runs the quick benchmarks, compares with this machine's baseline
    python benchmarks/compare.py --save [OP ...]     makes the run the baseline (of those ops)
    python benchmarks/compare.py --result FILE       compares a result that is there

What is compared is a speed-up: the time of "eager" (well-written torch, which does not change with igpo) over ours,
both from one run in turn. A speed-up below (1 - margin) of the baseline's is worse; what is worse is run once more, and
fails if it is worse both times. Absolute times are never compared. Baselines: benchmarks/baselines/<machine>.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import report
import run

REFERENCE = "eager"
BASELINES = Path(__file__).parent / "baselines"
# on a GPU the median; a shared CPU's is that of its other work, so there the least time
TIME = {"cpu": "least_ms", "gpu": "median_ms"}
# chosen: what two runs of one commit differ by on a shared 2-core machine, and on a GPU nobody else uses
MARGIN = {"cpu": 0.4, "gpu": 0.1}

QUICK = ["--quick", f"--providers={REFERENCE}"]

Speedups = dict[str, dict[str, float]]  # case -> our row -> eager's time over ours


def benchmark(ops: list[str]) -> dict:
    """On a CPU with one thread, whose processor time is taken: what else the machine does counts little."""
    return run.benchmark(ops, QUICK, threads=1)


def device(result: dict) -> str:
    return "gpu" if result["machine"]["gpu"] else "cpu"


def speedups(result: dict) -> Speedups:
    """Of every row of ours in every case that timed the reference."""
    found, time = {}, TIME[device(result)]
    for case in result["cases"]:
        times = {name: p[time] for name, p in case["providers"].items()}
        if REFERENCE in times:
            found[case["case"]] = {
                name: times[REFERENCE] / ms for name, ms in times.items() if name.startswith("igpo")
            }
    return found


def worse(baseline: Speedups, now: Speedups, margin: float) -> dict[tuple[str, str], str]:
    """(case, row) -> what is wrong. A case or a row that is no longer measured is worse than any."""
    found = {}
    for case, rows in baseline.items():
        for row, before in rows.items():
            after = now.get(case, {}).get(row)
            if after is None:
                found[case, row] = "no longer measured"
            elif after < before * (1 - margin):
                found[case, row] = (
                    f"{after:.2f}x {REFERENCE}, was {before:.2f}x (margin {margin:.0%})"
                )
    return found


def of_ops(found: Speedups, ops: list[str]) -> Speedups:
    return {case: rows for case, rows in found.items() if case.split()[0] in ops}


def markdown(found: Speedups) -> str:
    """The table of docs/performance.md, of a baseline."""
    lines = [f"| case | {REFERENCE} / ours |", "|---|---|"]
    for case, rows in sorted(found.items()):
        op, _, rest = case.partition(" ")
        lines.append(f"| `{op}` {rest} | {rows['igpo']:.2f} |")
    return "\n".join(lines)


def save(path: Path, result: dict, ops: list[str]) -> None:
    """Writes the speed-ups of a run; those of other ops stay."""
    old = json.loads(path.read_text())["speedups"] if path.exists() else {}
    kept = {case: rows for case, rows in old.items() if case.split()[0] not in ops}
    rounded = {
        case: {row: round(x, 3) for row, x in rows.items()}
        for case, rows in speedups(result).items()
    }
    path.parent.mkdir(exist_ok=True)
    content = {"machine": result["machine"], "speedups": dict(sorted((kept | rounded).items()))}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("ops", nargs="*", default=None, metavar="OP")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--margin", type=float)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    ops = args.ops or run.OPS
    result = json.loads(args.result.read_text()) if args.result else benchmark(ops)
    if result["failed"]:
        print(f"the benchmarks of {', '.join(result['failed'])} failed")
        return 1
    path = BASELINES / f"{report.kind(result['machine'])}.json"
    if args.save:
        save(path, result, ops)
        print(f"written: {path}")
        return 0
    if not path.exists():
        print(f"there is no baseline {path}; make one with --save")
        return 1
    margin = args.margin or MARGIN[device(result)]
    baseline = of_ops(json.loads(path.read_text())["speedups"], ops)
    found = worse(baseline, speedups(result), margin)
    if found and not args.result:
        again = sorted({case.split()[0] for case, _ in found})
        print(f"worse, so once more: {', '.join(again)}")
        twice = worse(baseline, speedups(benchmark(again)), margin)
        found = {key: reason for key, reason in twice.items() if key in found}
    for (case, row), reason in found.items():
        print(f"WORSE  {case}  {row}: {reason}")
    new = [case for case in of_ops(speedups(result), ops) if case not in baseline]
    print(f"{len(baseline)} cases compared, {len(found)} worse; not in the baseline: {len(new)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
