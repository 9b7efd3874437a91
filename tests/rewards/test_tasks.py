"""Verdicts on what a real policy wrote: case by case those of the published scorer, and every departure from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo.rewards import ReferenceValueError, sudoku
from igpo.rewards.arithmetic import ExpressionError, evaluate, plain
from igpo.rewards.tasks import judge

DATA = Path(__file__).parent.parent / "data"
PUBLISHED = {"gsm8k": 783, "math500": 130, "countdown": 53, "sudoku": 240}
TASKS = {"math500": "math"}


def cases(shared: Path, name: str) -> Iterator[tuple[int, str, Any]]:
    """(row, completion, reference) of the outputs of LLaDA-8B-Instruct that have a reference."""
    path = shared / f"data/llada_generations/{name}_128.jsonl"
    for row, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        case = json.loads(line)
        reference = case["ground_truth"]
        if name == "sudoku":
            reference = [case["question"].split(": ")[1].strip(), reference]
        if reference is not None:  # two GSM8K rows have none
            yield row, case["generations"], reference


@pytest.mark.parametrize("name", PUBLISHED)
def test_d1_verdicts_are_the_published_ones_case_by_case(shared: Path, name: str) -> None:
    published = json.loads((DATA / "llada_8b_d1_verdicts.json").read_text())[name]
    cells = 8 if name == "sudoku" else 1  # empty cells of every puzzle
    total, wrong = 0.0, []
    for row, text, reference in cases(shared, name):
        found = judge(TASKS.get(name, name), text, reference, compat="d1").score * cells
        total += found
        if found != int(published[row]):
            wrong.append(row)
    assert not wrong
    assert total == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_departure_from_the_published_verdicts_is_listed(shared: Path, name: str) -> None:
    lines = (DATA / "llada_8b_disagreements.jsonl").read_text(encoding="utf-8").splitlines()
    listed = {x["row"]: x for x in map(json.loads, lines) if x["task"] == name}
    found = {}
    for row, text, reference in cases(shared, name):
        task = TASKS.get(name, name)
        ours, theirs = judge(task, text, reference), judge(task, text, reference, compat="d1")
        if ours.correct != theirs.correct:
            found[row] = (ours.correct, ours.extracted)
    assert found == {row: (x["ours"], x["found"]) for row, x in listed.items()}
    assert all(x["reason"] for x in listed.values())


@pytest.mark.parametrize(
    ("task", "completion", "reference"),
    [
        ("gsm8k", r"<answer>\boxed{\$1{,}800}</answer>", "1,800"),
        ("gsm8k", r"\boxed{9 \times 2 = 18 \text{ dollars}}", 18),
        ("gsm8k", r"\boxed{\frac{1}{2}}", 0.5),
        ("gsm8k", r"\boxed{18\%}<|eot_id|>\boxed{19}", "18"),
        ("gsm8k", "so it is 18.", "He has 9\n#### 18"),
        ("math", r"\boxed{x = \dfrac12}", r"\frac{1}{2}"),
        ("math", r"the set \boxed{\{1, 2\}}", r"\{2,1\}"),
        ("math", r"\boxed{\text{east}}", r"\text{east}"),
        ("math", r"\boxed{2\sqrt{3}}", r"so it is \boxed{\sqrt{12}}"),
        ("math", r"\boxed{27}", 27.0),
        ("countdown", r"\boxed{(30 - 20) \times 5 = 50}", [[30, 20, 5], 50]),
        ("countdown", r"<answer>\frac{30}{20} \cdot 6</answer>", {"numbers": [6, 20, 30], "target": 9}),
        ("sudoku", "<answer>\n12 34\n34 12\n21 43\n43 21\n</answer>", ["0" * 16, "1234341221434321"]),
        ("sudoku", "<answer>1234341221434321</answer>", {"puzzle": "1200" + "0" * 12}),
    ],
)  # fmt: skip
def test_right_answers(task: str, completion: str, reference: Any) -> None:
    verdict = judge(task, completion, reference)
    assert verdict.correct
    assert verdict.score == 1.0


@pytest.mark.parametrize(
    ("task", "completion", "reference"),
    [
        ("gsm8k", r"\boxed{10 or 18}", 18),
        ("gsm8k", r"\boxed{180}", 18),
        ("gsm8k", "", 18),
        ("math", r"\boxed{(2, 1)}", "(1,2)"),
        ("math", r"\boxed{\frac{1}{3}}", "0.333"),
        ("math", "no formula, no box", "1"),
        ("countdown", r"\boxed{30 - 20}", [[30, 20, 5], 10]),  # a number is missing
        ("countdown", r"\boxed{30 - 20 + 5 - 5}", [[30, 20, 5], 10]),  # one is used twice
        ("countdown", r"\boxed{30 - 20 * 5 = 10}", [[30, 20, 5], 10]),  # the claim is wrong
        ("countdown", r"\boxed{2**3}", [[2, 3], 8]),
        ("countdown", r"\boxed{5 / (3 - 3)}", [[5, 3, 3], 0]),
        ("countdown", r"\boxed{10/3*3}", [[10, 3, 3], 9]),
        ("countdown", r"\boxed{٣ + 2}", [[3, 2], 5]),  # not an ASCII digit
        ("sudoku", "<answer>1234341221434312</answer>", ["0" * 16, "1234341221434321"]),
        ("sudoku", "<answer>1234341221434321</answer>", ["4" + "0" * 15, None]),  # a given changed
        ("sudoku", "<answer>12343412214343211</answer>", ["0" * 16, "1234341221434321"]),
    ],
)  # fmt: skip
def test_wrong_answers(task: str, completion: str, reference: Any) -> None:
    assert not judge(task, completion, reference).correct


@pytest.mark.parametrize(
    ("task", "reference", "message"),
    [
        ("gsm8k", "about 3", r"reference of task 'gsm8k' must be a number, got 'about 3'"),
        ("gsm8k", True, "must be a number, got True"),
        ("math", "", "must not be empty"),
        ("math", [1], r"must be text or a number, got \[1\]"),
        ("countdown", {"numbers": [1, 2]}, r'must be \{"numbers"'),
        ("countdown", [["1"], 1], r"must be .* got \[\['1'\], 1\]"),
        ("sudoku", "1234", "must be .* 16 digits 0-4"),
        ("sudoku", ["11" + "0" * 14, None], "must have a solution, got '1100000000000000'"),
        ("code", {"tests": "a", "cases": [{}]}, r'must be \{"tests"'),
        ("code", "assert", r'must be \{"tests"'),
    ],
)
def test_bad_references_are_named(task: str, reference: Any, message: str) -> None:
    with pytest.raises(ReferenceValueError, match=message):
        judge(task, "1", reference)


@pytest.mark.parametrize(
    ("task", "compat", "message"),
    [
        ("maths", None, "task must be one of gsm8k, math, countdown, sudoku, code, or module:function, got 'maths'"),
        ("math", "d2", 'compat must be None or "d1", got \'d2\''),
        ("code", "d1", "compat=\"d1\" has gsm8k, math, countdown, sudoku, got task 'code'"),
        ("nowhere:f", None, "task 'nowhere:f': No module named 'nowhere'"),
        ("math:nope", None, "has no attribute 'nope'"),
        ("math:gcd", None, "must return a Verdict or a bool, got 1"),
    ],
)  # fmt: skip
def test_bad_tasks_are_named(task: str, compat: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(task, 1 if task == "math:gcd" else "1", 1, compat=compat)  # type: ignore[arg-type]


def test_there_are_288_grids_and_scores_follow_the_nearest_solution() -> None:
    assert len(sudoku.grids()) == 288
    puzzle = "1000" + "0000" + "2143" + "4321"
    assert len(sudoku.solutions(puzzle)) == 2
    for grid in sudoku.solutions(puzzle):
        assert judge("sudoku", f"<answer>{grid}</answer>", [puzzle, None]).correct
    half = judge("sudoku", "<answer>1234111121434321</answer>", [puzzle, None])
    assert (half.correct, half.score) == (False, pytest.approx(4 / 7))


PIECES = (
    "\\boxed{", "\\boxed ", "}", "{", "\\frac", "\\sqrt", "<answer>", "</answer>", "####", "\\text{ ", "```", "=", "/",
    "12",
    "1,000", "x", ".", "-", "(", ")", "\n", " ", "%", "$", "^", "٣", "\ud800",
)  # fmt: skip
REFERENCES = {
    "gsm8k": "18", "math": r"\frac{1}{2}", "countdown": [[1, 2, 3], 6],
    "sudoku": ["1234341221434300", "1234341221434321"],
}  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_any_text_gets_a_verdict(text: str) -> None:
    for task, reference in REFERENCES.items():
        for compat in (None, "d1") if task != "math" else ("d1",):  # math-verify has its own tests
            assert 0 <= judge(task, text, reference, compat=compat).score <= 1


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        "({0[0]} {0[1]} {0[2]})".format
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_values_are_those_of_python_in_exact_arithmetic(text: str) -> None:
    exact = re.sub(r"[0-9]+", r"Fraction(\g<0>)", text)
    try:
        truth = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ExpressionError, match="division by zero"):
            evaluate(text)
        return
    assert evaluate(text) == (truth, [int(n) for n in re.findall("[0-9]+", text)])


@pytest.mark.parametrize(
    "text",
    ["9**9", "1(2)", "1 2", "(1", "1)", "", "1+", "a", "1//2", "1.5", "(" * 30 + "1" + ")" * 30, "1+" * 200 + "1"],
)  # fmt: skip
def test_no_arithmetic(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_spellings_of_operators() -> None:
    assert evaluate(plain(r"\left(8 \div 2\right) \times 3 − 1"))[0] == 11
    assert evaluate("-(3 - 5)")[0] == 2
