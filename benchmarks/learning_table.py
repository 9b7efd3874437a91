"""The learning table: every algorithm for the same number of rollouts on three small generated tasks.

    python benchmarks/learning_table.py [--seeds 3] [--part 1/6] [--out FILE] [ROW ...]

Writes FILE.jsonl (a finished run a line; what it has by today's recipe is not run again), FILE.json and FILE.png, and
prints the tables of docs/learning_table.md. FILE: benchmarks/results/cpu-DATE-learning_table. --part 1/6: every sixth
run alone, into FILE.jsonl, which six such processes may share; then once more without it. --report: from what
FILE.jsonl has, without running anything.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from learning.recipe import NUM_EVAL, NUM_STEPS, entries
from learning.report import SHOWN, overview, plot, summarise, table
from learning.study import Study, is_current, read, run

from igpo.environment import machine, versions
from igpo.logging import output, say

HERE = Path(__file__).resolve().parent


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)  # of matrices this small, more threads only wait for each other
    names = options.rows or list(entries())
    if unknown := set(names) - entries().keys():
        raise SystemExit(f"no such row: {', '.join(sorted(unknown))}; rows: {', '.join(entries())}")
    study = Study(options.starts, num_steps=options.steps, num_eval=options.problems)
    path = options.out.with_suffix(".jsonl")
    if not options.report:
        run(study, names, range(options.seeds), path, options.part)
    if options.part != (1, 1):
        return
    lines = [x for x in read(path) if is_current(study, x)]
    summary = {
        **summarise(lines, list(entries())),
        "steps": options.steps,
        "problems": options.problems,
        "commits": sorted({x["commit"] for x in lines}),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
    }
    options.out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    plot(summary["tasks"], options.out.with_suffix(".png"))
    output.print(f"{overview(summary['tasks'])}\n", markup=False, soft_wrap=True)
    for task, rows in summary["tasks"].items():
        output.print(f"{SHOWN[task]}\n\n{table(rows)}\n", markup=False, soft_wrap=True)
    say(f"written: {options.out}.json, .png; runs: {path}")


def part(text: str) -> tuple[int, int]:
    """ "2/6" -> (2, 6)."""
    index, of = map(int, text.split("/"))
    if not 1 <= index <= of:
        raise ValueError(text)
    return index, of


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    name = f"cpu-{time.strftime('%Y-%m-%d')}-learning_table"
    parser.add_argument("rows", nargs="*", default=[], help="default: all")
    parser.add_argument("--part", type=part, default=(1, 1))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / name)
    parser.add_argument("--starts", type=Path, default=HERE.parent / "build" / "learning_table")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--problems", type=int, default=NUM_EVAL)
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
