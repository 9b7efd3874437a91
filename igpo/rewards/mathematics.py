"""MATH and kin: answers in LaTeX, equal as normalised text or, by math-verify, as mathematics."""

from __future__ import annotations

import re
from functools import cache
from types import ModuleType
from typing import Any

from igpo.text import LONGEST_ANSWER, boxed_or_tagged, last_box, last_match, turn

from .answers import MARKER, number
from .verdict import Verdict, reference_error

LONGEST_PARSED = 500  # characters given to math-verify; chosen: answers of MATH have at most 160
_INLINE = re.compile(r"\$([^$]+)\$|\\\(([^\n]+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_REMOVED = (
    "\n", "\\!", "\\,", "\\;", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%", "%", "\\displaystyle"
)  # fmt: skip


def judge(completion: str, reference: Any) -> Verdict:
    r"""The last box, else the last answer tag, else what follows the last ####, else the last formula of the text.

    Equal to the reference as text after `normalised`, as exact numbers, or by math_verify.verify(reference, answer),
    whose arguments are not exchangeable. reference: LaTeX text, a number, or a solution with its answer in a box.
    Needs the [math] extra.
    """
    wanted = reference_text(reference)
    found = extract(turn(completion))
    if found is None or len(found) > LONGEST_ANSWER:
        return Verdict.of(False, None)
    left, right = normalised(found), normalised(wanted)
    if left == right:
        return Verdict.of(True, found)
    values = number(left), number(right)
    if None not in values:  # exact, and most of what math-verify would be asked
        return Verdict.of(values[0] == values[1], found)
    return Verdict.of(len(found) <= LONGEST_PARSED and _equal(wanted, found), found)


def reference_text(reference: Any) -> str:
    """The reference as LaTeX; whole floats, as datasets store them, without their ".0"; of a solution, its box."""
    if isinstance(reference, float) and reference.is_integer():
        reference = int(reference)
    if isinstance(reference, bool) or not isinstance(reference, int | float | str):
        raise reference_error("math", "be text or a number", reference)
    if not str(reference).strip():
        raise reference_error("math", "not be empty", reference)
    inside = last_box(str(reference))
    return str(reference).strip() if inside is None else inside


def extract(text: str) -> str | None:
    found = boxed_or_tagged(text)
    if found is not None:
        return found
    _, marker, after = text.rpartition(MARKER)
    if marker:
        return after.strip().partition("\n")[0].strip() or None
    last = last_match(_INLINE, text[-LONGEST_ANSWER:])
    return None if last is None else next(part for part in last.groups() if part).strip()


def normalised(answer: str) -> str:
    r"""An answer without what does not change its value: spacing, \left, units on the right, degree and dollar signs.

    >>> normalised(r"x = \dfrac12 \text{ cm}") == normalised("1/2")
    True
    """
    text = answer.strip().strip("$").strip().removesuffix(".")
    for mark in _REMOVED:
        text = text.replace(mark, "")
    text = re.sub(r"\\(?:text|mbox)\{ [^{}]*\}\s*$", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"^\s*[A-Za-z]\s*=", "", text)
    text = "".join(text.split())
    text = re.sub(r"(?<![0-9])\.([0-9])", r"0.\1", text)
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))(?<!\([0-9],)", "", text)
    text = re.sub(r"\\sqrt([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac([0-9A-Za-z])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([0-9A-Za-z])", r"\1{\2}", text)
    text = re.sub(r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}", text)
    return {"0.5": r"\frac{1}{2}"}.get(text, text)


def _equal(wanted: str, found: str) -> bool:
    library = math_verify()
    gold = _parsed(library, wanted)
    # time limits are the process pool's: those of the library are alarms of the main thread
    return bool(gold) and bool(
        library.verify(gold, _parsed(library, found), timeout_seconds=None, raise_on_error=False)
    )


def _parsed(library: ModuleType, answer: str) -> list[Any]:
    boxed = f"\\boxed{{{answer.strip().strip('$')}}}"
    return library.parse(boxed, parsing_timeout=None, raise_on_error=False)


@cache
def math_verify() -> ModuleType:
    """The library. Raises ModuleNotFoundError with the command that installs it."""
    try:
        import math_verify as library
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "task 'math' needs math-verify: pip install 'igpo[math]'", name=error.name
        ) from error
    import logging

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return library
