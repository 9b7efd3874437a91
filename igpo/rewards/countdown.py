"""Countdown: an expression over given numbers, each used once, that makes a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from igpo.text import boxed_or_tagged, turn

from .arithmetic import ExpressionError, evaluate, plain
from .verdict import Verdict, reference_error


def judge(completion: str, reference: Any) -> Verdict:
    """The expression in the last box, else in the last answer tag, must use every number once and equal the target.

    Values are exact rationals. `expression = value` counts as the expression, if the value is right too.
    reference: {"numbers": [int, …], "target": int}, or the pair [numbers, target].
    """
    numbers, target = problem(reference)
    found = boxed_or_tagged(turn(completion))
    if found is None:
        return Verdict.of(False, None)
    left, *rest = plain(found).split("=")
    try:
        value, used = evaluate(left)
        values = [value, *(evaluate(side)[0] for side in rest)]
    except ExpressionError:
        return Verdict.of(False, found)
    return Verdict.of(sorted(used) == sorted(numbers) and set(values) == {target}, found)


def problem(reference: Any) -> tuple[list[int], int]:
    """(numbers, target) of a reference. Raises ReferenceValueError."""
    if isinstance(reference, Mapping):
        numbers, target = reference.get("numbers"), reference.get("target")
    elif isinstance(reference, Sequence) and not isinstance(reference, str) and len(reference) == 2:
        numbers, target = reference
    else:
        numbers = target = None
    rule = 'be {"numbers": [int, ...], "target": int} or [numbers, target]'
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or not numbers:
        raise reference_error("countdown", rule, reference)
    if not all(type(n) is int and n >= 0 for n in numbers) or type(target) is not int:
        raise reference_error("countdown", rule, reference)
    return list(numbers), target
