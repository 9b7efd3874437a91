"""Programs of a policy in a process of their own: limits on time, memory and output; no network, no files to write, no
other processes.

Linux on x86-64 only, by a seccomp filter and resource limits: no privileges, containers or services are needed. It
keeps a program from harming the run and its machine; it is no boundary against code written to break a kernel, and
code that looks for the token of its own interpreter can pass tests it should not: prefer `cases`, whose outputs are
compared outside.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_READY = b"ready\n"
_STARTUP = 20.0  # seconds an interpreter may take to start on a busy machine; chosen


class SandboxError(RuntimeError):
    """Programs cannot be confined here; says why."""


@dataclass(frozen=True)
class Limits:
    """seconds: wall clock, and rounded up processor time.   memory_bytes: address space.   output_bytes: printed."""

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of a program.   passed: tests that did.   output: what it printed.   failure: "timeout" or None."""

    passed: int
    output: str
    failure: str | None = None


def run(program: str, tests: Sequence[str], limits: Limits, stdin: str = "") -> Outcome:
    """Runs the program, then each test in its namespace. Without tests one passes if the program ends by itself.

    Raises:
        SandboxError: no confinement on this machine.
    """
    check_platform()
    token = secrets.token_hex(16)
    request = {
        "program": program, "tests": list(tests), "token": token, "cpu_seconds": int(limits.seconds) + 1,
        "memory_bytes": limits.memory_bytes, "output_bytes": limits.output_bytes,
    }  # fmt: skip
    with (
        tempfile.TemporaryFile() as printed
    ):  # has no name, so nothing is left of it whoever is killed
        with tempfile.TemporaryFile() as typed, tempfile.TemporaryFile() as asked:
            for stream, text in ((typed, stdin), (asked, json.dumps(request))):
                stream.write(text.encode("utf-8", "surrogatepass"))
                stream.seek(0)
            reading, writing = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-B", str(_CHILD), str(asked.fileno()), str(writing)],
                    stdin=typed, stdout=printed, stderr=subprocess.DEVNULL, pass_fds=(asked.fileno(), writing),
                    cwd="/", env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )  # fmt: skip
            finally:
                os.close(writing)
        with os.fdopen(reading, "rb") as marks:
            in_time = _wait(process, marks.fileno(), limits.seconds)
            lines = marks.read(1 << 20).decode(errors="replace").split("\n")
        printed.seek(0)
        output = printed.read(limits.output_bytes).decode(errors="replace")
    return Outcome(lines.count(token), output, None if in_time else "timeout")


def _wait(process: subprocess.Popen, marks: int, seconds: float) -> bool:
    """Whether the program ended in time; it is dead afterwards. The clock starts when the program does."""
    try:
        ready, _, _ = select.select([marks], [], [], _STARTUP)
        if ready and os.read(marks, len(_READY)) == _READY:
            process.wait(seconds)
            return process.returncode != -signal.SIGXCPU
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.wait()
    raise SandboxError(
        "code: the sandbox did not start: this kernel or container refuses seccomp filters or resource limits. "
        "Programs of a policy are never run without them."
    )


@cache
def check_platform() -> None:
    """Raises SandboxError where the filter does not apply."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise SandboxError(
            f"code: programs are confined on Linux x86_64 only, this is {system} {machine}. "
            "Verify code there, or give the grader a verifier of your own."
        )
