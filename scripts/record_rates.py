"""Records how fast the programs ran: merges results of benchmarks/run.py rollout train_step into igpo/measured.json.

    python scripts/record_rates.py RESULT.json ...

`igpo train --dry-run` plans times from these rates where device, threads and dtype are the same. A rate is the FLOP the
program cannot avoid by the median time of ours; a new one replaces that of the same place.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from igpo import time_plan
from igpo.time_plan import Rate

TARGET = Path(time_plan.__file__).with_name("measured.json")


def rates(result: dict) -> list[Rate]:
    """Of the largest problem of each program in a result."""
    where, found = result["machine"], {}
    for case in result["cases"]:
        if "unit" not in case:
            continue
        _, model, dtype = case["axes"]["problem"].split()
        found[case["op"]] = Rate(
            benchmark=case["op"], device=where["gpu"] or where["cpu"],
            threads=None if where["gpu"] else where["threads"], dtype=dtype, model=model,
            tflop_per_s=round(case["providers"]["igpo"]["rate"], 6), date=where["date"], commit=where["commit"],
        )  # fmt: skip
    return list(found.values())


def merged(old: list[Rate], new: list[Rate]) -> list[Rate]:
    def place(rate: Rate) -> tuple:
        return rate.benchmark, rate.device, rate.threads or 0, rate.dtype

    return [rate for _, rate in sorted({place(rate): rate for rate in (*old, *new)}.items())]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=TARGET)
    args = parser.parse_args()
    new = [rate for path in args.results for rate in rates(json.loads(path.read_text()))]
    every = merged(time_plan.read(args.into.read_text()), new)
    content = {"format": 1, "rates": [asdict(rate) for rate in every]}
    args.into.write_text(json.dumps(content, indent=1) + "\n")
    for rate in new:
        print(f"recorded: {rate}")
    return 0 if new else 1


if __name__ == "__main__":
    sys.exit(main())
