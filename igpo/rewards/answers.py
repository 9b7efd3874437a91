"""Is the final answer of a completion the right one? Exact for numbers; other answers are compared as text.

Every function takes time linear in the text, whatever a policy has written: nothing is evaluated, and numbers are never
expanded.
"""

from __future__ import annotations

import re
from fractions import Fraction

from igpo.text import last_box

MARKER = "####"
LONGEST_NUMBER = 100  # characters; longer ones are compared as text
_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[-+]?\$?\.\d+")
_VALUE = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
_LATEX = re.compile(r"\\(?:left|right|,|;|!|text|mathrm|displaystyle)\b|\\[,;!]")


def has_answer(completion: str, answer: str) -> bool:
    """Does the completion end in this answer? See extract_answer and same_answer."""
    found = extract_answer(completion)
    return found is not None and same_answer(found, answer)


def extract_answer(completion: str) -> str | None:
    r"""The final answer of a completion: after its last "####", else in its last \boxed{}, else its last number.

    >>> extract_answer("9 + 9 = 18\n#### $18.")
    '$18.'
    >>> extract_answer(r"so x is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("She has 7 of 12 left")
    '12'
    """
    _, marker, after = completion.rpartition(MARKER)
    if marker:
        return after.strip().partition("\n")[0].strip() or None
    boxed = last_box(completion)
    if boxed is not None:
        return boxed
    return max(_NUMBER.finditer(completion), key=re.Match.end, default=[None])[0]


def same_answer(found: str, answer: str) -> bool:
    """Equal as numbers (1,000 = 1000.0, $18 = 18, 0.5 = 1/2), or equal as text up to spacing, case and LaTeX spacing.

    When the right answer is a number, text around the found number is allowed if there is no other number in it
    ("18 dollars").
    """
    wanted = number(answer)
    if wanted is None:
        return _normal(found) == _normal(answer)
    value = number(found)
    if value is None:
        inside = _NUMBER.findall(found[: 10 * LONGEST_NUMBER])
        value = number(inside[0]) if len(inside) == 1 else None
    return value == wanted


def number(text: str) -> Fraction | None:
    """The exact value of a decimal number or a fraction a/b, with thousands separators, $, % or a final period."""
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    sign = "-" if text.startswith("-") else ""
    text = (
        text.lstrip("+-").strip().lstrip("$").removesuffix(".").removesuffix("%").replace(",", "")
    )
    if not _VALUE.fullmatch(text):
        return None
    over, _, under = text.partition("/")
    if under and not int(under):
        return None
    value = Fraction(over) / int(under or 1)
    return -value if sign else value


def _normal(text: str) -> str:
    text = _LATEX.sub("", text.strip().strip("$").removesuffix("."))
    return "".join(text.split()).lower()
