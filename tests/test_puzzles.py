"""Generated problems: solvable, with the solution they say, different from each other, the same for the same seed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from igpo.cli import main
from igpo.config import ConfigError, DataConfig
from igpo.data import problems
from igpo.options import PuzzleOptions
from igpo.puzzles import DRAWS, generate, key
from igpo.rewards import sudoku
from igpo.rewards.arithmetic import evaluate
from igpo.rewards.tasks import judge


def options(puzzle: str, **changes: int | str) -> PuzzleOptions:
    return replace(PuzzleOptions(puzzle=puzzle, num_problems=100), **changes)


@pytest.mark.parametrize("numbers", [2, 3, 5])
def test_countdown_solutions_reach_the_target(numbers: int) -> None:
    for row in generate(options("countdown", num_numbers=numbers, num_problems=60)):
        assert judge("countdown", f"<answer>{row['answer']}</answer>", row).correct
        assert 1 <= row["target"] <= 100
        assert all(1 <= n <= 100 for n in row["numbers"])
        for step in row["solution"].split("\n"):
            left, right = step.split("=")
            assert evaluate(left)[0] == Fraction(right.strip())
        assert step.endswith(f"= {row['target']}")


@pytest.mark.parametrize("empty", [1, 8, 10])
def test_sudokus_have_one_solution_and_the_trace_leads_to_it(empty: int) -> None:
    for row in generate(options("sudoku", num_problems=100, num_empty=empty)):
        assert sudoku.solutions(row["puzzle"]) == [row["solution"]]
        assert row["puzzle"].count("0") == empty
        grid = list(row["puzzle"])
        for r, c, digit in re.findall(r"Row (\d), column (\d): (\d)", row["trace"]):
            assert grid[4 * (int(r) - 1) + int(c) - 1] == "0"
            grid[4 * (int(r) - 1) + int(c) - 1] = digit
        assert "".join(grid) == row["solution"]


@pytest.mark.parametrize("digits", [1, 3, 15])
def test_sums_are_right(digits: int) -> None:
    for row in generate(options("addition", num_problems=40, num_digits=digits)):
        a, b = map(int, re.findall(r"\d+", row["question"]))
        assert row["answer"].endswith(f"#### {a + b}")
        written = "".join(re.findall(r"write (\d+)", row["answer"])[::-1])
        carried = "1" if row["answer"].split("\n")[-2].endswith("carry 1") else ""
        assert carried + written == str(a + b).zfill(digits)


@pytest.mark.parametrize("puzzle", DRAWS)
def test_problems_differ_and_follow_the_seed(puzzle: str) -> None:
    rows = list(generate(options(puzzle)))
    assert len({key(row) for row in rows}) == 100
    assert rows[:20] == list(generate(options(puzzle, num_problems=20)))
    assert rows != list(generate(options(puzzle, seed=4)))
    left_out = frozenset(key(row) for row in rows[:50])
    others = [key(row) for row in generate(options(puzzle), left_out)]
    assert not left_out & set(others)


def test_the_program_writes_what_the_recipes_read(tmp_path: Path) -> None:
    for puzzle in ("countdown", "sudoku", "addition"):
        first, second = tmp_path / "a" / f"{puzzle}.jsonl", tmp_path / f"{puzzle}2.jsonl"
        words = ["puzzles", f"puzzle={puzzle}", "num_problems=30"]
        assert main([*words, f"output_file={first}"]) == 0
        assert main([*words, f"output_file={second}", f"exclude_file={first}"]) == 0
        keys = [
            {key(json.loads(x)) for x in path.read_text().splitlines()} for path in (first, second)
        ]
        assert not keys[0] & keys[1]
        name = str(first) if puzzle == "addition" else f"{puzzle}={first}"
        found = list(problems(name, DataConfig()))
        assert len(found) == 30
        assert all(problem.solution and problem.answer for problem in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"puzzle": "chess"}, "puzzle must be one of countdown, sudoku, addition, got 'chess'"),
        ({"num_empty": 16}, r"num_empty must lie in 1..12, got 16"),
        ({"num_digits": 1, "puzzle": "addition", "num_problems": 101}, "hardly more than 100 different problems"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(generate(replace(PuzzleOptions(), **changes)))
