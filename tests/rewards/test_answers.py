"""Verification of final answers: what is found, what counts as equal, and that no completion can make it slow."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo.rewards import extract_answer, has_answer, same_answer
from igpo.rewards.answers import number


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 3\nno, wait\n#### 4\nand more", "4"),
        ("####", None),
        ("", None),
        (r"\boxed{7} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7 never closed 12", "12"),
        ("She has 7 of 1,200.50 left.", "1,200.50"),
        ("no number here", None),
        ("it costs -3/4 of that", "-3/4"),
    ],
)
def test_extracts_the_final_answer(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ("18", "18"), ("$18.", "18"), ("1,000", "1000"), ("1000.0", "1,000"), ("0.50", "1/2"), ("-3", "-3"),
        ("18 dollars", "18"), ("18%", "18"), (".5", "0.5"), ("+4", "4"), ("$-5$", "-5"), ("-$5", "-5"),
        (r"\left( 3, 4 \right)", "(3,4)"), ("Blue", "blue"), (r"x^2 + 1", "x^2+1"),
    ],
)  # fmt: skip
def test_equal_answers(found: str, answer: str) -> None:
    assert same_answer(found, answer)


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ("81", "18"), ("18 or 19", "18"), ("1.8", "18"), ("-18", "18"), ("118", "18"), ("1/0", "1"), ("", "0"),
        ("eighteen", "18"), ("x+1", "x-1"), ("0.333", "1/3"), ("1000000000000000000001", "1000000000000000000000"),
    ],
)  # fmt: skip
def test_different_answers(found: str, answer: str) -> None:
    assert not same_answer(found, answer)


@given(st.integers(-(10**30), 10**30), st.integers(0, 6))
def test_numbers_are_exact(value: int, places: int) -> None:
    scaled = Fraction(value, 10**places)
    digits = f"{abs(value):0{places + 1}d}"
    text = digits[: len(digits) - places] + (f".{digits[-places:]}" if places else "")
    text = ("-" if value < 0 else "") + text
    assert number(text) == scaled
    assert number(f"{value:,}") == value
    assert has_answer(f"so\n#### {text}", str(scaled))


@given(st.text(max_size=200), st.text(max_size=20))
def test_any_text_gets_a_verdict(completion: str, answer: str) -> None:
    assert has_answer(completion, answer) in (True, False)


@pytest.mark.parametrize(
    "completion",
    [
        "9**9**9**9",
        r"\boxed{" * 10**5,
        r"\boxed{" + "{" * 10**6,
        "#### " + "9" * 10**6,
        "1," * 5 * 10**5,
        "9/" * 5 * 10**5,
        "-$" * 5 * 10**5,
        "1e999999999",
        "\\" * 10**6,
    ],
    ids=lambda text: text[:8],
)
def test_hostile_completions_are_wrong_and_cheap(completion: str) -> None:
    start = time.process_time()
    assert not has_answer(completion, "18")
    assert not has_answer(completion, r"\frac{a}{b}")
    assert time.process_time() - start < 5  # seconds, for 1 MB; a quadratic scan would take an hour
