"""The scorer of the d1 protocol (arXiv:2504.12216), rule by rule, for numbers that compare with published ones.

Its known defects are kept: "1,000" is 1, the first box of a GSM8K completion counts, a Sudoku grid is padded or cut to
16 digits and compared with the one stored solution. Written from the rules; nothing is evaluated. One difference:
** and // are no arithmetic here, so an expression that uses them is wrong.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from . import countdown, sudoku
from .arithmetic import ExpressionError, evaluate
from .gsm8k import final
from .mathematics import reference_text
from .verdict import Verdict, reference_error

_BOXED = re.compile(r"\\boxed\{(.*?)\}")
_NUMBER = re.compile(r"-?\d+\.?\d*")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_EQUATION = re.compile(r"([0-9+\-*/() ]+)=[0-9. ]+")
_GRID = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<answer>.*?```\s*([\d\s]+)```",
        r"<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)",
        r"</answer>\s*(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)",
        r"(\d{16})\s*</answer>",
        r"\b(\d{16})\b",
    )
)


def gsm8k(completion: str, reference: Any) -> Verdict:
    """The first box that holds a number (its first one), else the last number of the first answer tag, as a float."""
    wanted = None if isinstance(reference, bool) else _float(final(reference).replace(",", ""))
    if wanted is None:
        raise reference_error("gsm8k", "be a number", reference)
    for box in _BOXED.findall(completion):
        content = box.strip()
        if content.strip("."):
            value = _float(content)
            numbers = _NUMBER.findall(content)
            if value is None and numbers:
                value = _float(numbers[0])
            if value is not None:
                return Verdict.of(value == wanted, box)
    tag = _ANSWER.search(completion)
    content = tag[1].strip() if tag else ""
    value = _float(content)
    numbers = _NUMBER.findall(content)
    if value is None and numbers:
        value = _float(numbers[-1])
    return Verdict.of(value == wanted, content or None)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def math(completion: str, reference: Any) -> Verdict:
    """The last box, or the whole completion without one; else the first answer tag; equal as normalised text."""
    wanted = reference_text(reference)
    box = _last_box(completion)
    found = box
    if not found:
        tag = _ANSWER.search(completion)
        found = tag[1].strip() if tag else box
    return Verdict.of(found is not None and _same(found, wanted), found)


def countdown_task(completion: str, reference: Any) -> Verdict:
    """As `math` finds it; the left side of an equation; every integer of it is used once; the value within 1e-5."""
    numbers, target = countdown.problem(reference)
    found = _last_box(completion)
    if found is None:
        tag = _ANSWER.search(completion)
        found = tag[1].strip() if tag else completion
    for spelling, operator in ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*")):
        found = found.replace(spelling, operator)
    equation = _EQUATION.search(found)
    found = equation[1].strip() if equation else found
    used = sorted(int(n) for n in re.findall(r"[0-9]{1,20}", found))
    if used != sorted(numbers):
        return Verdict.of(False, found)
    try:
        value, _ = evaluate(found.strip())
    except ExpressionError:
        return Verdict.of(False, found)
    return Verdict.of(abs(value - target) < Fraction(1, 100_000), found)


def sudoku_task(completion: str, reference: Any) -> Verdict:
    """The fraction of the empty cells that equal the stored solution; correct where all do."""
    puzzle, solution = sudoku.problem(reference)
    if solution is None:
        raise reference_error("sudoku", 'have a "solution" for compat="d1"', reference)
    found = ""
    for pattern in _GRID:
        match = pattern.search(completion)
        if match and match[1].strip():
            found = "".join(match[1].split())
            break
    empty = [i for i in range(16) if puzzle[i] == "0"]
    padded = found.ljust(16, "0")
    right = sum(padded[i] == solution[i] for i in empty)
    score = right / len(empty) if empty else 0.0
    return Verdict(score == 1.0, score, found or None)


def _last_box(text: str) -> str | None:
    r"""What stands in the last \boxed or \fbox; the text itself without one; None where its braces do not close."""
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    if start < 0:
        return text
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if text[end] == "}" and depth == 0:
            whole = text[start : end + 1]
            return whole[len("\\boxed{") : -1] if whole.startswith("\\boxed{") else whole
    return None


def _same(found: str, wanted: str) -> bool:
    try:
        return _stripped(found) == _stripped(wanted)
    except ExpressionError:  # what the rules have no reading for is compared as it stands
        return found == wanted


def _stripped(text: str) -> str:
    """The string normalisation of the MATH benchmark (arXiv:2103.03874), in the order of its rules."""
    for mark in ("\n", "\\!"):
        text = text.replace(mark, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for mark in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(mark, "")
    before, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ExpressionError("several units")
    text = before if units else text
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text.startswith(".") else text
    name, *values = text.split("=")
    if len(values) == 1 and len(name) <= 2:
        text = values[0]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    text = r"\frac{1}{2}" if text == "0.5" else text
    return _stacked(text)


def _braced_roots(text: str) -> str:
    head, *parts = text.split("\\sqrt")
    if not all(parts):
        raise ExpressionError("a root of nothing")
    return head + "".join("\\sqrt" + (p if p[0] == "{" else f"{{{p[0]}}}{p[1:]}") for p in parts)


def _braced_fractions(text: str) -> str:
    head, *parts = text.split("\\frac")
    made = head
    for part in parts:
        if not part:
            raise ExpressionError("a fraction of nothing")
        if part[0] == "{":
            made += "\\frac" + part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            made += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            made += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return made


def _stacked(text: str) -> str:
    """a/b of two integers as a fraction. Anything else around one slash has no reading."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    if not all(re.fullmatch(r"[+-]?[0-9_]{1,4000}", side.strip()) for side in sides):
        raise ExpressionError("a slash between other than integers")
    plain = all(re.fullmatch(r"0|-?[1-9][0-9]*", side) for side in sides)
    return rf"\frac{{{sides[0]}}}{{{sides[1]}}}" if plain else text
