"""What becomes of a GPU check: which rows count as checked, from made-up results."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from igpo.ops import OPS, _checked

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """script("record_check") -> the module scripts/record_check.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def result(**changes) -> dict:
    """token_logprob passes on triton, and fails a test on cuda."""
    where = {
        "gpu": "NVIDIA H200", "device_class": "sm_90", "driver": "580", "date": "2026-12-01", "commit": "abc1234",
        "torch": "2.11.0", "triton": "3.6.0",
    }  # fmt: skip
    clean = {"memcheck": "clean", "racecheck": "clean"}
    made = {
        "machine": where,
        "tests_complete": True,
        "tests": {
            "token_logprob": {
                "triton": {"passed": 9, "failed": 0, "skipped": 1},
                "cuda": {"passed": 8, "failed": 1, "skipped": 1},
            }
        },
        "sanitizer": {"triton": clean, "cuda": dict(clean)},
        "cases": [
            {
                "op": "token_logprob",
                "case": "token_logprob 32x126464",
                "providers": {"igpo-triton": {"median_ms": 0.004}, "eager": {"median_ms": 0.1}},
            }
        ],
    }
    return made | changes


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_unmask_step_draws" name="test_law[cuda-T1.2]"/>
<testcase classname="tests.ops.test_unmask_step" name="test_ties[cuda]"><failure message="no"/></testcase>
<testcase classname="tests.ops.test_unmask_step" name="test_ties[triton]"><skipped message="no"/></testcase>
<testcase classname="tests.ops.test_linear_masked_cross_entropy" name="test_x[triton-fp32]"/>
<testcase classname="tests.ops.test_masked_cross_entropy" name="test_x[cuda]"><error message="no"/></testcase>
<testcase classname="tests.cuda.test_graphs" name="test_captures[cuda-merge_hints]"/>
<testcase classname="tests.ops.test_linear_gpu" name="test_peak[cuda-4096]"/>
<testcase classname="tests.ops.test_token_logprob" name="test_x[cpu]"/>
<testcase classname="tests.ops.test_token_logprob" name="test_without_a_backend"/>
</testsuite></testsuites>"""


def test_tests_are_counted_by_op_and_gpu_backend(script) -> None:
    found = script("gpu_report").counts(JUNIT)
    assert found == {
        "unmask_step": {
            "cuda": {"passed": 1, "failed": 1, "skipped": 0},
            "triton": {"passed": 0, "failed": 0, "skipped": 1},
        },
        "linear_masked_cross_entropy": {
            "triton": {"passed": 1, "failed": 0, "skipped": 0},
            "cuda": {"passed": 1, "failed": 0, "skipped": 0},
        },
        "linear_logprob": {"cuda": {"passed": 1, "failed": 0, "skipped": 0}},
        "masked_cross_entropy": {"cuda": {"passed": 0, "failed": 1, "skipped": 0}},
        "merge_hints": {"cuda": {"passed": 1, "failed": 0, "skipped": 0}},
    }


def test_a_failure_that_names_no_op_counts_against_all(script) -> None:
    case = '<testcase classname="tests.test_graphs" name="test_x[cuda]">{}</testcase>'
    counts = script("gpu_report").counts
    assert counts(f"<s>{case.format('')}</s>") == {}
    found = counts(f"<s>{case.format('<failure/>')}</s>")
    assert {op: b["cuda"]["failed"] for op, b in found.items()} == dict.fromkeys(OPS, 1)


@pytest.mark.parametrize(("status", "complete"), [(0, True), (1, True), (2, False), (124, False)])
def test_an_unfinished_run_of_the_tests_proves_nothing(
    script, tmp_path: Path, status: int, complete: bool
) -> None:
    (tmp_path / "stages.tsv").write_text(
        f"test\t{status}\t17\nsanitize:memcheck:cuda\t9\t0\nsanitize:racecheck:cuda\t124\t0\n"
    )
    (tmp_path / "junit.xml").write_text(JUNIT)
    found = script("gpu_report").collect(tmp_path)
    assert found["tests_complete"] is complete
    assert found["sanitizer"] == {
        "cuda": {"memcheck": "failed (9)", "racecheck": "out of time"},
        "triton": {"memcheck": "not run", "racecheck": "not run"},
    }
    assert "failed" in script("gpu_report").summary(found)


def test_only_rows_whose_tests_passed_are_recorded(script) -> None:
    records, lines = script("record_check").merged((), result())
    assert lines == ["token_logprob cuda: 1 tests failed", "token_logprob triton: recorded"]
    (found,) = records
    assert (found.op, found.backend, found.device_class, found.tests_passed) == (
        "token_logprob", "triton", "sm_90", 9,
    )  # fmt: skip
    assert found.median_ms == {"token_logprob 32x126464": 0.004}
    assert _checked.fastest_first("token_logprob", "sm_90", records) == ["triton"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tests_complete": False}, "the tests did not run to their end"),
        ({"machine": result()["machine"] | {"device_class": None}}, "the result is not from a GPU"),
        ({"sanitizer": {"triton": {"memcheck": "failed (9)"}}}, "memcheck failed (9)"),
        ({"tests": {"token_logprob": {"triton": {"passed": 0, "failed": 0, "skipped": 4}}}}, "no test ran"),
    ],
)  # fmt: skip
def test_a_row_without_proof_is_not_recorded(script, changes: dict, reason: str) -> None:
    records, lines = script("record_check").merged((), result(**changes))
    assert not records
    assert f"token_logprob triton: {reason}" in lines


def test_a_row_that_fails_loses_its_record_and_other_classes_keep_theirs(script) -> None:
    record_check = script("record_check")
    on_90, _ = record_check.merged((), result())
    on_80 = result(machine=result()["machine"] | {"device_class": "sm_80"})
    both, _ = record_check.merged(tuple(on_90), on_80)
    assert [r.device_class for r in both] == ["sm_80", "sm_90"]
    broken = {"token_logprob": {"triton": {"passed": 8, "failed": 1, "skipped": 0}}}
    left, _ = record_check.merged(tuple(both), result(tests=broken))
    assert [r.device_class for r in left] == ["sm_80"]
    unfinished = result(tests=broken, tests_complete=False)
    assert len(record_check.merged(tuple(both), unfinished)[0]) == 2


def test_results_of_one_commit_and_gpu_are_taken_together(script) -> None:
    record_check = script("record_check")
    not_run = {"memcheck": "not run", "racecheck": "not run"}
    bench = result(tests={}, tests_complete=False, sanitizer={"triton": not_run})
    whole = record_check.together([result(cases=[]), bench])
    assert whole == result()
    other = result(machine=result()["machine"] | {"commit": "fff0000"}, tests={})
    with pytest.raises(ValueError, match="share their commit"):
        record_check.together([result(), other])
    with pytest.raises(ValueError, match="two of the results hold tests"):
        record_check.together([result(), result()])


def test_recording_writes_a_file_that_is_read_back(script, tmp_path: Path, monkeypatch) -> None:
    target, source = tmp_path / "checked.json", tmp_path / "r.json"
    target.write_text(json.dumps({"format": 1, "records": []}))
    source.write_text(json.dumps(result()))
    monkeypatch.setattr(sys, "argv", ["record_check.py", str(source), "--into", str(target)])
    assert script("record_check").main() == 0
    assert [r.place() for r in _checked.parse(target.read_text())] == [
        "NVIDIA H200 (sm_90), 2026-12-01, abc1234"
    ]


def test_the_sanitizer_driver_calls_every_op() -> None:
    command = [sys.executable, "scripts/sanitize_ops.py", "--backend", "cpu", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"'{op}': 0" not in done.stdout and f"'{op}'" in done.stdout for op in OPS)


def gpu_check(tmp_path: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    """scripts/gpu_check.sh with a python that notes what it is asked for, fails as pytest, and is real for the report;
    compute-sanitizer lets the program it is given run."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
echo "$*" >>{tmp_path}/calls
case "$*" in
  *gpu_report*) exec {sys.executable} "$@" ;;
  *get_device_capability*) echo 90 ;;
  "-m pytest"*) sleep "${{PYTEST_SLEEP:-0}}"; exit 1 ;;
esac
"""
    )
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\n')
    for program in (python, checker):
        program.chmod(0o755)
    return subprocess.run(
        ["bash", "scripts/gpu_check.sh", *stages], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": f"{tmp_path}/out", "PYTHON": str(python),
             "IGPO_COMMIT": "abc1234", "BENCH_S": "40", "SUITE_S": "0.2", "PYTEST_SLEEP": "1"},
    )  # fmt: skip


def test_gpu_check_refuses_stages_it_does_not_know(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "tset")
    assert done.returncode == 2
    assert "no stage 'tset'; there are: build test sanitize bench suite" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_check_goes_on_after_a_stage_that_failed_and_says_so(tmp_path: Path) -> None:
    done = gpu_check(tmp_path)
    assert done.returncode == 1, done.stderr
    ran = dict(x.split("\t")[:2] for x in (tmp_path / "out/stages.tsv").read_text().splitlines())
    assert {name: ran[name] for name in ("build", "test", "sanitize", "bench", "suite")} == {
        "build": "0", "test": "1", "sanitize": "0", "bench": "0", "suite": "124",
    }  # fmt: skip
    assert "sanitize:racecheck:triton" in ran
    calls = (tmp_path / "calls").read_text()
    assert "-m pip install -v --no-build-isolation --no-deps --no-index -e ." in calls
    assert "--tool memcheck --error-exitcode 9" in calls
    assert "benchmarks/run.py --quick --budget 32 --output" in calls
    (written,) = (tmp_path / "out").glob("gpu-*.json")
    assert json.loads(written.read_text())["stages"]["suite"]["status"] == 124
    assert re.search(r"suite +out of time", done.stdout)
