"""Programs in the sandbox: what passes, what is refused, and that nothing outlives a program."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from igpo.rewards.programs import extract, judge
from igpo.rewards.sandbox import Limits, SandboxError, check_platform

LIMITS = Limits(seconds=1.0)
SQUARE = "def f(x):\n    return x * x\n"
TESTS = {"tests": ["assert f(2) == 4", "assert f(3) == 9"]}

try:
    check_platform()
except SandboxError as reason:
    pytest.skip(str(reason), allow_module_level=True)


def run(code: str, reference: Any = TESTS) -> Any:
    return judge(f"```python\n{code}\n```", reference, LIMITS)


@pytest.mark.parametrize(
    "before",
    ["", "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()\n",
     "import asyncio\nasync def g(): pass\nasyncio.run(g())\n", "open('/etc/hostname').read()\n",
     "import numpy\n"],
)  # fmt: skip
def test_programs_may_compute_and_read(before: str) -> None:
    assert run(before + SQUARE).correct


def test_score_is_the_fraction_of_tests() -> None:
    verdict = run("def f(x):\n    return 4")
    assert (verdict.correct, verdict.score, verdict.failure) == (False, 0.5, None)


@pytest.mark.parametrize(
    "attack",
    [
        "import os\nwhile True: os.fork()", "import os; os.fork()", "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m\np = m.Process(target=print); p.start()",
        "import socket; socket.socket()", "import urllib.request as u; u.urlopen('http://127.0.0.1:1')",
        "open('left.txt', 'w')", "import os; os.open('left.txt', os.O_CREAT)", "import os; os.mkdir('left')",
        "import os; os.remove(__import__('sys').executable)", "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)", "import os; os.setsid()",
        "import resource as r; r.setrlimit(r.RLIMIT_CPU, (9, 9))", "x = 'a' * (1 << 33)",
        "while True: print('x' * 100000)", "import ctypes; ctypes.string_at(0)",
    ],
)  # fmt: skip
def test_what_a_program_must_not_do_fails(attack: str) -> None:
    start = time.monotonic()
    verdict = run(attack + "\n" + SQUARE)
    assert (verdict.correct, verdict.score) == (False, 0.0)
    assert time.monotonic() - start < 20
    left = psutil.Process().children(recursive=True)
    assert not [p for p in left if "sandbox_child" in str(p.cmdline())]


@pytest.mark.parametrize("ending", ["import os; os._exit(0)", "import sys; sys.exit(0)", "quit()"])
def test_ending_early_passes_no_test(ending: str) -> None:
    assert run(f"{SQUARE}{ending}").score == 0.0


@pytest.mark.parametrize("forever", ["while True: pass", "import time; time.sleep(99)"])
def test_a_program_that_does_not_end_is_a_timeout(forever: str) -> None:
    verdict = run(forever)
    assert (verdict.correct, verdict.failure) == (False, "timeout")


def test_cases_compare_what_is_printed() -> None:
    cases = [{"input": "3\n", "output": "9\n"}, {"input": "4\n", "output": "16"}]
    assert run("print(int(input()) ** 2)", {"cases": cases}).correct
    assert run("print(int(input()) * 3)", {"cases": cases}).score == 0.5
    assert run("print(9)\nraise SystemExit(1)", {"cases": cases}).score == 0.0


def test_a_prefix_comes_first() -> None:
    assert run(
        "def f(x):\n    return int(math.pow(x, 2))", {**TESTS, "prefix": "import math"}
    ).correct


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("so\n```python\na = 1\n```\nor\n```py\na = 2\n```\n", "a = 2\n"),
        ("```\na = 1\n", "a = 1\n"),
        ("<answer>\na = 1\n</answer>", "a = 1"),
        ("a = 1", "a = 1"),
        (" \n", None),
    ],
)
def test_the_program_is_the_last_block(text: str, program: str | None) -> None:
    assert extract(text) == program


def test_nothing_is_left_in_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("open('x', 'w')")
    assert not list(tmp_path.iterdir())
