"""Code: a program must pass tests, or print the right output for given inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from igpo.text import last_answer_tag, turn

from . import sandbox
from .sandbox import Limits
from .verdict import Verdict, reference_error

LONGEST_PROGRAM = 100_000  # characters
_FENCE = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_RULE = (
    'be {"tests": code or [code, ...]} or {"cases": [{"input": text, "output": text}, ...]}, '
    'with "prefix": code if it needs any'
)


def judge(completion: str, reference: Any, limits: Limits) -> Verdict:
    """Runs the last fenced block of the completion, else its last answer tag, else all of it, in the sandbox.

    reference: {"tests": asserts run after the program, in its namespace; text, or a list counted one by one} or
    {"cases": [{"input": stdin, "output": expected stdout}, …]}, where trailing white space does not count. "prefix" is
    put before the program. score: the fraction passed; correct where all are.
    """
    tests, cases, prefix = problem(reference)
    program = extract(turn(completion))
    if program is None or len(program) > LONGEST_PROGRAM:
        return Verdict.of(False, None)
    text = f"{prefix}\n{program}" if prefix else program
    if tests:
        found = sandbox.run(text, tests, limits)
        return _verdict(found.passed, len(tests), program, found.failure)
    passed, share = 0, replace(limits, seconds=limits.seconds / len(cases))
    failure = None
    for given, wanted in cases:
        found = sandbox.run(text, (), share, stdin=given)
        passed += found.passed == 1 and _same(found.output, wanted)
        failure = failure or found.failure
    return _verdict(passed, len(cases), program, failure)


def _verdict(passed: int, total: int, program: str, failure: str | None) -> Verdict:
    if failure is not None:
        return Verdict(False, 0.0, program, failure)
    return Verdict(passed == total, passed / total, program)


def _same(printed: str, wanted: str) -> bool:
    left, right = (text.rstrip().split("\n") for text in (printed, wanted))
    return [line.rstrip() for line in left] == [line.rstrip() for line in right]


def extract(text: str) -> str | None:
    fences = _FENCE.findall(text)
    found = fences[-1] if fences else last_answer_tag(text) or text
    return found if found.strip() else None


def problem(reference: Any) -> tuple[list[str], list[tuple[str, str]], str]:
    """(tests, cases, prefix) of a reference. Raises ReferenceValueError."""
    if not isinstance(reference, Mapping):
        raise reference_error("code", _RULE, reference)
    tests, cases = reference.get("tests") or [], reference.get("cases") or []
    tests = [tests] if isinstance(tests, str) else tests
    prefix = reference.get("prefix") or ""
    well_formed = (
        isinstance(tests, Sequence)
        and isinstance(cases, Sequence)
        and bool(tests) != bool(cases)
        and isinstance(prefix, str)
        and all(isinstance(test, str) for test in tests)
        and all(isinstance(case, Mapping) and {"input", "output"} <= case.keys() for case in cases)
    )
    if not well_formed:
        raise reference_error("code", _RULE, reference)
    return list(tests), [(str(case["input"]), str(case["output"])) for case in cases], prefix
