"""GSM8K: the final answer is a number, compared exactly."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from igpo.text import LONGEST_ANSWER, boxed_or_tagged, last_answer_tag, last_match, turn

from .answers import MARKER, number
from .verdict import Verdict, reference_error

_LATEX = re.compile(
    r"\\(?:text|mathrm|mathbf|left|right|displaystyle)\b|\\[,;!:()\[\] ]|[{}$]|\\%|%"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{?\s*([0-9]+)\s*\}?\s*\{?\s*([0-9]+)\s*\}?")
_NUMBER = re.compile(
    r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|(?<![\w.])-?\.[0-9]+"
)


def judge(completion: str, reference: Any) -> Verdict:
    """The number in the last box, else in the last answer tag, else after the last ####, else the last number.

    Thousands separators, currency, units, percent signs and LaTeX spellings are understood; of "9 * 2 = 18" the right
    side counts; a box with several numbers and no "=" is no answer. reference: a number, text that is one, or a worked
    solution with one after its last ####.
    """
    wanted = number(final(reference)) if not isinstance(reference, bool) else None
    if wanted is None:
        raise reference_error("gsm8k", "be a number", reference)
    found, value = extract(turn(completion))
    return Verdict.of(value == wanted, found)


def final(reference: Any) -> str:
    """A reference as text; of a worked solution, what follows its ####."""
    return str(reference).rpartition(MARKER)[2].strip()


def extract(text: str) -> tuple[str | None, Fraction | None]:
    """The answer as it stands in the text, and its value. A place that holds no number gives way to the next."""
    _, marker, after = text.rpartition(MARKER)
    marked = after.strip().partition("\n")[0] if marker else None
    first = None
    for place in (boxed_or_tagged(text), last_answer_tag(text), marked):
        if place is None:
            continue
        value = value_of(place)
        if value is not None:
            return place, value
        first = place if first is None else first
        if len(_NUMBER.findall(place)) > 1:
            return place, None
    last = last_match(_NUMBER, text)
    return (first, None) if last is None else (last[0], number(last[0]))


def value_of(text: str) -> Fraction | None:
    r"""The one number of an answer.

    >>> value_of(r"9 \times 2 = \$1{,}800 \text{ dollars}")
    Fraction(1800, 1)
    """
    if len(text) > LONGEST_ANSWER:
        return None
    text = _FRACTION.sub(r"\1/\2", text.rpartition("=")[2].replace("{,}", ",").replace("\\$", ""))
    found = _NUMBER.findall(_LATEX.sub(" ", text).replace("- ", "-"))
    return number(found[0]) if len(found) == 1 else None
