"""The benchmark files run, and every rival agrees with the reference, at small shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_provider_passes_its_gate() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "benchmarks/pytest.ini",
        "--rootdir",
        "benchmarks",
    ]
    command += ["benchmarks", "--tiny", "--benchmark-disable"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
