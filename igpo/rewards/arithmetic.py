"""Exact values of arithmetic expressions: + - * / and parentheses over integers, by a parser of bounded depth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

LONGEST, DEEPEST = (
    200,
    20,
)  # characters and parentheses; chosen: far above every expression of these tasks
_SPELLINGS = (
    ("\\left", ""), ("\\right", ""), ("\\div", "/"), ("\\times", "*"), ("\\cdot", "*"), ("\\,", " "), ("\\(", " "),
    ("\\)", " "), ("×", "*"), ("÷", "/"), ("·", "*"), ("−", "-"), ("–", "-"), ("$", " "),
)  # fmt: skip
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_TOKEN = re.compile(r"\s*(?:([0-9]{1,20})|([-+*/()]))")


class ExpressionError(ValueError):
    """No arithmetic expression: what stands where."""


def plain(text: str) -> str:
    r"""An expression with LaTeX and Unicode spellings of its operators replaced.

    >>> plain(r"\frac{8}{2} \times 3")
    '((8)/(2)) * 3'
    """
    text = _FRACTION.sub(r"((\1)/(\2))", text)
    for spelling, operator in _SPELLINGS:
        text = text.replace(spelling, operator)
    return text.strip()


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the integers it uses, in order.

    >>> evaluate("(1 + 2) / 4")
    (Fraction(3, 4), [1, 2, 4])

    Raises:
        ExpressionError: anything but + - * / ( ) and integers of at most 20 digits, more than 200 characters or 20
        levels of parentheses, or a division by zero. Powers and juxtaposition are no arithmetic here.
    """
    if len(text) > LONGEST:
        raise ExpressionError(f"longer than {LONGEST} characters")
    parser = _Parser(text)
    value = parser.sum(0)
    if parser.token is not None:
        raise ExpressionError(f"{parser.token!r} after the end of the expression")
    return value, parser.integers


class _Parser:
    """sum = product (("+" | "-") product)*; product = atom (("*" | "/") atom)*; atom = ("-" | "+") atom | integer |
    "(" sum ")"."""

    def __init__(self, text: str) -> None:
        self.integers: list[int] = []
        self.tokens = _tokens(text)
        self.token = next(self.tokens, None)

    def take(self) -> str:
        taken = self.token
        if taken is None:
            raise ExpressionError("the expression ends too soon")
        self.token = next(self.tokens, None)
        return taken

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.token in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value += sign * self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.token in ("*", "/"):
            operator, right = self.take(), self.atom(depth)
            if operator == "/" and not right:
                raise ExpressionError("division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.take()
        if depth >= DEEPEST:
            raise ExpressionError(f"more than {DEEPEST} levels")
        if token in ("-", "+"):
            value = self.atom(depth + 1)
            return -value if token == "-" else value
        if token == "(":
            value = self.sum(depth + 1)
            if self.token != ")":
                raise ExpressionError("a parenthesis is not closed")
            self.take()
            return value
        if not token.isdigit():
            raise ExpressionError(f"{token!r} where a number is needed")
        self.integers.append(int(token))
        return Fraction(token)


def _tokens(text: str) -> Iterator[str]:
    place = 0
    text = text.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ExpressionError(f"{text[place:].lstrip()[:1]!r} is no arithmetic")
        yield found[1] or found[2]
        place = found.end()
