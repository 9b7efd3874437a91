"""Every Triton kernel compiles for the GPUs we name: no spills, and 16 bytes at a time where it counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPS = sorted(path.stem for path in (HERE / "triton_cases").glob("*.py"))

ARCHS = ("80", "90", "100")

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compiling.py"), op, *ARCHS]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = import_module(f"triton_cases.{op}").CASES
    for case, found in zip(cases * len(ARCHS), json.loads(done.stdout), strict=True):
        assert found["spills"] == 0, found
        for wanted in case.wide:
            assert any(a.startswith(wanted) for a in found["accesses"]), (wanted, found)
