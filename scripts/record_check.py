"""Merges a result of scripts/gpu_check.sh into igpo/ops/checked.json, which `auto` and `python -m igpo.ops` read.

    python scripts/record_check.py benchmarks/results/gpu-….json [MORE.json ...]

Several results are taken together when one commit and one GPU made them. A row (op x backend) is recorded when tests of
it ran on the GPU, all of them passed, the run came to its end, and compute-sanitizer found nothing. It replaces the
record of the same row on the same class of device. A row that no longer passes loses its record.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from igpo.ops import _checked

PREFIX = "igpo-"


def together(results: list[dict]) -> dict:
    """One result of several. Raises ValueError when they are not of one commit and one GPU."""
    whole = json.loads(json.dumps(results[0]))
    for other in results[1:]:
        for name in ("commit", "gpu", "device_class"):
            if whole["machine"][name] != other["machine"][name]:
                raise ValueError(
                    f"results must share their {name}, got {whole['machine'][name]!r} and {other['machine'][name]!r}."
                )
        if other["tests"]:
            if whole["tests"]:
                raise ValueError("two of the results hold tests; give one of them.")
            whole |= {"tests": other["tests"], "tests_complete": other["tests_complete"]}
        whole["cases"] += other["cases"]
        for backend, tools in other["sanitizer"].items():
            ran = {tool: word for tool, word in tools.items() if word != "not run"}
            whole["sanitizer"].setdefault(backend, {}).update(ran)
    return whole


def why_not(result: dict, op: str, backend: str) -> str | None:
    """Why a row cannot be recorded from this result."""
    if not result["machine"].get("device_class"):
        return "the result is not from a GPU"
    if not result["tests_complete"]:
        return "the tests did not run to their end"
    found = result["tests"][op][backend]
    if found["failed"]:
        return f"{found['failed']} tests failed"
    if not found["passed"]:
        return "no test ran"
    said = result["sanitizer"].get(backend, {})
    return ", ".join(f"{tool} {x}" for tool, x in said.items() if x.startswith("failed")) or None


def times(result: dict, op: str, backend: str) -> dict[str, float]:
    """Median milliseconds of the row in every case of the op that it ran."""
    name = PREFIX + backend
    cases = [c for c in result["cases"] if c["op"] == op and name in c["providers"]]
    return {c["case"]: c["providers"][name]["median_ms"] for c in cases}


def record(result: dict, op: str, backend: str) -> _checked.Record:
    where = result["machine"]
    kept = ("device_class", "gpu", "driver", "date", "commit", "torch", "triton")
    return _checked.Record(
        op=op,
        backend=backend,
        **{name: where[name] for name in kept},
        tests_passed=result["tests"][op][backend]["passed"],
        sanitizer=result["sanitizer"].get(backend, {}),
        median_ms=times(result, op, backend),
    )


def merged(
    old: tuple[_checked.Record, ...], result: dict
) -> tuple[list[_checked.Record], list[str]]:
    """(the records after this result, a line per row of it)."""
    kept = {(r.op, r.backend, r.device_class): r for r in old}
    lines = []
    for op, backends in sorted(result["tests"].items()):
        for backend in sorted(backends):
            key = (op, backend, result["machine"].get("device_class"))
            reason = why_not(result, op, backend)
            if reason is None:
                kept[key] = record(result, op, backend)
            # a run cut short or without a GPU says nothing against what an earlier one found
            elif result["tests_complete"] and key in kept:
                del kept[key]
            lines.append(f"{op} {backend}: {reason or 'recorded'}")
    return [kept[key] for key in sorted(kept)], lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=_checked.PATH)
    args = parser.parse_args()
    result = together([json.loads(path.read_text()) for path in args.results])
    records, lines = merged(_checked.parse(args.into.read_text()), result)
    content = {"format": _checked.FORMAT, "records": [asdict(r) for r in records]}
    args.into.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines) or "the result holds no test of a GPU row")
    return 0


if __name__ == "__main__":
    sys.exit(main())
