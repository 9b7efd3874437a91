"""Puts what scripts/gpu_check.sh left in a folder into one JSON and a summary; exits 1 when a stage failed.

python scripts/gpu_report.py FOLDER      reads stages.tsv, junit.xml, bench.json; writes gpu-<date>-<commit>.json
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402  (benchmarks/report.py)

from igpo.ops import OPS  # noqa: E402

GPU_BACKENDS = ("triton", "cuda")
REASONS = {0: "ok", 124: "out of time", 137: "killed"}
Counts = dict[str, dict[str, dict[str, int]]]  # op -> backend -> passed, failed, skipped


def stages(text: str) -> dict[str, dict[str, int]]:
    found = {}
    for line in text.splitlines():
        name, status, seconds = line.split("\t")
        found[name] = {"status": int(status), "seconds": int(seconds)}
    return found


def ops_of(case: ElementTree.Element) -> list[str]:
    """The ops a test is about: test_unmask_step_draws.py -> unmask_step; test_linear_gpu.py -> both linear_ ops; else
    those its name or id holds; none when nothing says so."""
    classes = case.get("classname", "").split(".")
    stem = next((x for x in classes if x.startswith("test_")), "").removeprefix("test_")
    fitting = [op for op in OPS if stem == op or stem.startswith(f"{op}_")]
    if fitting:
        return [max(fitting, key=len)]
    named = [op for op in OPS if op in re.split(r"[\[\]-]", case.get("name", ""))]
    family = stem.removesuffix("_gpu")
    return named or [op for op in OPS if family and op.startswith(f"{family}_")]


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def counts(junit: str) -> Counts:
    """Tests per op and GPU backend: those whose id names the backend, as in test_matches_reference[triton-…].

    A failure in a test that names a backend but no op counts against every op.
    """
    found: Counts = defaultdict(
        lambda: defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
    )
    for case in ElementTree.fromstring(junit).iter("testcase"):
        words = case.get("name", "").partition("[")[2].rstrip("]").split("-")
        result, ops = outcome(case), ops_of(case)
        for backend in set(GPU_BACKENDS) & set(words):
            for op in ops or (OPS if result == "failed" else ()):
                found[op][backend][result] += 1
    return json.loads(json.dumps(found))


def sanitizer(ran: dict[str, dict[str, int]]) -> dict[str, dict[str, str]]:
    """backend -> tool -> "clean", "failed (status)", "out of time" or "not run"."""
    found: dict[str, dict[str, str]] = {}
    for backend in GPU_BACKENDS:
        found[backend] = {}
        for tool in ("memcheck", "racecheck"):
            status = ran.get(f"sanitize:{tool}:{backend}", {}).get("status")
            words = {None: "not run", 0: "clean", 124: "out of time", 137: "out of time"}
            found[backend][tool] = words.get(status, f"failed ({status})")
    return found


def collect(folder: Path) -> dict:
    ran = stages((folder / "stages.tsv").read_text())
    junit, bench = folder / "junit.xml", folder / "bench.json"
    measured = json.loads(bench.read_text()) if "bench" in ran and bench.exists() else {"cases": []}
    tested = "test" in ran and junit.exists()
    return {
        "machine": report.machine(),
        "stages": ran,
        # pytest: 0 all passed, 1 some failed; anything else ended early, and then nothing is known to have passed
        "tests_complete": tested and ran["test"]["status"] in (0, 1),
        "tests": counts(junit.read_text()) if tested else {},
        "sanitizer": sanitizer(ran),
        "cases": measured["cases"],
        "failed": measured.get("failed", []),
    }


def summary(result: dict) -> str:
    where = result["machine"]
    lines = [
        f"{where['gpu']}, driver {where['driver']}, torch {where['torch']}, triton {where['triton']}"
    ]
    for name, stage in result["stages"].items():
        reason = REASONS.get(stage["status"], f"failed ({stage['status']})")
        lines.append(f"{name:28} {reason:14} {stage['seconds']:5} s")
    lines.append(f"\n{'op':28} {'backend':8} {'passed':>7} {'failed':>7} {'skipped':>8}")
    for op, backends in sorted(result["tests"].items()):
        for backend, n in sorted(backends.items()):
            numbers = f"{n['passed']:7} {n['failed']:7} {n['skipped']:8}"
            lines.append(f"{op:28} {backend:8} {numbers}")
    if not result["tests_complete"]:
        lines.append("the tests did not run to their end: no row counts as checked")
    lines.append(f"{len(result['cases'])} benchmark cases")
    return "\n".join(lines)


def main() -> int:
    folder = Path(sys.argv[1])
    result = collect(folder)
    where = result["machine"]
    path = folder / f"gpu-{where['date']}-{where['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    (folder / "bench.json").unlink(missing_ok=True)  # all of it is in the result
    print(report.table(result["cases"]))
    print(summary(result))
    print(f"written: {path}; scripts/record_check.py merges it into igpo/ops/checked.json")
    return 1 if any(stage["status"] for stage in result["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
