"""4x4 Sudoku: grids as 16 digits, row by row, 0 for empty cells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import Any

from igpo.text import last_answer_tag, last_box, turn

from .verdict import Verdict, reference_error

UNITS = (
    *(tuple(range(4 * r, 4 * r + 4)) for r in range(4)),
    *(tuple(range(c, 16, 4)) for c in range(4)),
    *((b, b + 1, b + 4, b + 5) for b in (0, 2, 8, 10)),
)
_RUN = re.compile(r"(?<![0-9])[1-4]{16}(?![0-9])")


def judge(completion: str, reference: Any) -> Verdict:
    """The grid in the last answer tag, else the last box, else the last run of 16 digits 1-4 in the text.

    Correct is a full grid that keeps the givens and obeys the rules, whether or not it is the stored solution (a puzzle
    may have several). score: the fraction of the empty cells that agree with the nearest solution; 0 without a grid of
    16 digits, or where a given was changed.
    reference: {"puzzle": 16 digits, "solution": 16 digits (optional)}, or the pair [puzzle, solution].
    """
    puzzle, _ = problem(reference)
    found = extract(turn(completion))
    if found is None or len(found) != 16 or not keeps_givens(found, puzzle):
        return Verdict.of(False, found)
    empty = [i for i in range(16) if puzzle[i] == "0"]
    agreeing = (sum(found[i] == grid[i] for i in empty) for grid in solutions(puzzle))
    correct = is_valid(found)
    return Verdict(correct, 1.0 if correct else max(agreeing) / len(empty), found)


def extract(text: str) -> str | None:
    """The digits of the answer; layouts with spaces, line breaks and table bars are understood."""
    for inside in (last_answer_tag(text), last_box(text)):
        if inside is not None:
            digits = re.sub(r"[\s|,\-+\[\]`]", "", inside)
            if re.fullmatch(r"[0-9]+", digits):
                return digits
    runs = _RUN.findall(text)
    return runs[-1] if runs else None


def keeps_givens(grid: str, puzzle: str) -> bool:
    return all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))


def is_valid(grid: str) -> bool:
    """Every row, column and 2x2 box holds 1, 2, 3 and 4."""
    return all({grid[i] for i in unit} == set("1234") for unit in UNITS)


@cache
def grids() -> tuple[str, ...]:
    """All 288 full grids, in ascending order."""
    rows = ["".join(p) for p in permutations("1234")]
    pairs = [(a, b) for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]
    return tuple(
        sorted(a + b + c + d for a, b in pairs for c, d in pairs if is_valid(a + b + c + d))
    )


def solutions(puzzle: str) -> list[str]:
    """The full grids that keep the givens of a puzzle."""
    return [grid for grid in grids() if keeps_givens(grid, puzzle)]


def problem(reference: Any) -> tuple[str, str | None]:
    """(puzzle, stored solution) of a reference. Raises ReferenceValueError."""
    puzzle = solution = None
    if isinstance(reference, Mapping):
        puzzle, solution = reference.get("puzzle"), reference.get("solution")
    elif isinstance(reference, Sequence) and not isinstance(reference, str) and len(reference) == 2:
        puzzle, solution = reference
    full = solution is None or (isinstance(solution, str) and re.fullmatch("[1-4]{16}", solution))
    if not isinstance(puzzle, str) or not re.fullmatch("[0-4]{16}", puzzle) or not full:
        rule = (
            'be {"puzzle": 16 digits 0-4, "solution": 16 digits 1-4 or none} or [puzzle, solution]'
        )
        raise reference_error("sudoku", rule, reference)
    if not solutions(puzzle):
        raise reference_error("sudoku", "have a solution", puzzle)
    return puzzle, solution
