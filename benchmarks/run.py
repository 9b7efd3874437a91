"""`make bench`: runs the benchmark files, prints one table, writes one JSON into benchmarks/results/.

    python benchmarks/run.py                          every op, and the programs: rollout, train_step
    python benchmarks/run.py token_logprob --quick    one op, few problems; further arguments go to pytest
    --budget SECONDS                                  for all of it, shared by the ops
    --output FILE                                     instead of benchmarks/results/…

On a GPU when torch sees one, else on the CPU. Ops on logits and programs run in processes of their own, the others in
one. A ratio is a rival's median over that of the fastest of our rows, in turn; absolute times are this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import report

HERE = Path(__file__).parent
# what matters most first: a budget may end the run early
ALONE = (
    "unmask_step",
    "token_logprob",
    "masked_cross_entropy",
    "linear_masked_cross_entropy",
    "linear_logprob",
)
PROGRAMS = ("rollout", "train_step")
NAMES = [path.stem.removeprefix("bench_") for path in sorted(HERE.glob("bench_*.py"))]
OPS = [name for name in NAMES if name not in PROGRAMS]


def groups(ops: list[str]) -> list[list[str]]:
    """Which ops share a process, in the order of the run."""
    found = [[op] for op in (*ALONE, *PROGRAMS) if op in ops]
    rest = sorted(set(ops) - set(ALONE) - set(PROGRAMS))
    return [*found, rest] if rest else found


def run_pytest(ops: list[str], options: list[str], output: Path, threads: int) -> int:
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE)]  # fmt: skip
    command += [*(str(HERE / f"bench_{op}.py") for op in ops), *options]
    command += [f"--benchmark-json={output}"]
    command += ["--benchmark-quiet", "-rs"]
    return subprocess.run(command, check=False, env=environment).returncode


def measured(
    ops: list[str], options: list[str], budget: float, threads: int
) -> Iterator[tuple[list[dict], list[str]]]:
    """(records, the ops of the processes that failed) so far, after each process."""
    records, failed = [], []
    end = time.monotonic() + budget
    every = groups(ops)
    for left, together in zip(range(len(every), 0, -1), every, strict=True):
        share = [f"--budget={max(1.0, (end - time.monotonic()) / left):.0f}"] if budget else []
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "raw.json"
            if run_pytest(together, [*options, *share], raw, threads) not in (0, 5):
                failed += together
            if raw.exists() and raw.read_text().strip():
                entries = json.loads(raw.read_text())["benchmarks"]
                records += [report.record(e) for e in entries if e["extra_info"]]
        yield records, failed


def benchmark(
    ops: list[str],
    options: list[str],
    budget: float = 0,
    threads: int = 0,
    output: Path | None = None,
) -> dict:
    """Runs them and returns what is written: the machine, one record per case, the ops that failed.

    threads: of the CPU kernels and torch; 0: as many as they take. output: written after each process.
    """
    where = report.machine() | ({"threads": threads} if threads else {})
    result = {"machine": where, "cases": [], "failed": []}
    for records, failed in measured(ops, options, budget, threads):
        result |= {"cases": records, "failed": failed}
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(NAMES))
    parser.add_argument("--budget", type=float, default=0)
    parser.add_argument("--output", type=Path)
    args, options = parser.parse_known_args()
    unknown = [op for op in args.ops if op not in NAMES]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    where = report.machine()
    name = f"{report.kind(where)}-{where['date']}-{'-'.join(args.ops or ['all'])}.json"
    output = args.output or HERE / "results" / name
    result = benchmark(args.ops or NAMES, options, args.budget, output=output)
    chip = where["gpu"] or f"{where['cpu']} ({where['isa']}), {where['threads']} threads"
    print(f"\n{chip}, torch {where['torch']}")
    print(report.table(result["cases"]))
    print(f"\nwritten: {output}")
    if result["failed"]:
        print(f"failed: {', '.join(result['failed'])}")
    return 1 if result["failed"] or not result["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())
