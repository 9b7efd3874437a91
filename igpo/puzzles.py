"""Generated problems with worked solutions: Countdown, 4x4 Sudoku, addition; any number of them, from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .config import ConfigError, DataConfig
from .data import problems
from .logging import progress, say
from .options import PuzzleOptions
from .rewards.sudoku import UNITS, grids
from .types import Seed

_ATTEMPTS = (
    10_000  # failed draws in a row after which there are no more problems of this kind; chosen
)

Row = dict[str, Any]
Draw = Callable[[np.random.Generator, PuzzleOptions], Row | None]


def countdown(rng: np.random.Generator, options: PuzzleOptions) -> Row | None:
    """num_numbers numbers up to max_number and a target up to max_target that one expression over all of them makes,
    with whole and positive values on the way. Columns: numbers, target, solution (the steps), answer (the expression).
    """
    numbers = rng.integers(1, options.max_number + 1, options.num_numbers).tolist()
    pool = [(number, str(number)) for number in numbers]
    steps = []
    while len(pool) > 1:
        first, second = (pool.pop(int(rng.integers(len(pool)))) for _ in range(2))
        sign = str(rng.choice(list("+-*/")))
        value = _combined(first[0], sign, second[0])
        if value is None:
            return None
        steps.append(f"{first[0]} {sign} {second[0]} = {value}")
        pool.append((value, f"({first[1]} {sign} {second[1]})"))
    target, answer = pool[0][0], pool[0][1][1:-1]
    if target > options.max_target:
        return None
    return {
        "numbers": numbers,
        "target": target,
        "solution": "\n".join(steps),
        "answer": answer,
    }


def _combined(a: int, sign: str, b: int) -> int | None:
    """None where the value is not whole and positive."""
    if (sign == "-" and a <= b) or (sign == "/" and a % b):
        return None
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]


def sudoku(rng: np.random.Generator, options: PuzzleOptions) -> Row | None:
    """A grid with num_empty empty cells that can be filled one forced cell after the other, so it has one solution.
    Columns: puzzle, solution, trace (the cells, each with its reason)."""
    solution = str(rng.choice(grids()))
    cells = set(rng.permutation(16)[: options.num_empty].tolist())
    puzzle = "".join("0" if i in cells else digit for i, digit in enumerate(solution))
    trace = _forced_cells(puzzle)
    if trace is None:
        return None
    return {"puzzle": puzzle, "solution": solution, "trace": trace}


def _forced_cells(puzzle: str) -> str | None:
    """The reasons, cell by cell; None where none is forced."""
    grid, lines = list(puzzle), []
    while "0" in grid:
        found = _forced_cell(grid)
        if found is None:
            return None
        cell, digit, reason = found
        grid[cell] = digit
        lines.append(f"Row {cell // 4 + 1}, column {cell % 4 + 1}: {digit}, {reason}.")
    return "\n".join(lines)


def _forced_cell(grid: list[str]) -> tuple[int, str, str] | None:
    candidates = {
        cell: set("1234") - {grid[i] for unit in UNITS if cell in unit for i in unit}
        for cell in range(16)
        if grid[cell] == "0"
    }
    for cell, digits in candidates.items():
        if len(digits) == 1:
            (digit,) = digits
            return cell, digit, "the only digit missing around it"
    for name, units in (("row", UNITS[:4]), ("column", UNITS[4:8]), ("box", UNITS[8:])):
        for unit in units:
            for digit in "1234":
                places = [i for i in unit if digit in candidates.get(i, ())]
                if len(places) == 1:
                    return places[0], digit, f"as no other cell of its {name} can hold it"
    return None


def addition(rng: np.random.Generator, options: PuzzleOptions) -> Row:
    """Two numbers of num_digits digits. Columns: question, answer (the sum digit by digit, and after #### whole)."""
    low, high = 10 ** (options.num_digits - 1), 10**options.num_digits
    a, b = (int(n) for n in rng.integers(low if low > 1 else 0, high, 2))
    carry, lines = 0, []
    for place in range(options.num_digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        carry = total // 10
        rest = f", write {total % 10}, carry 1" if carry else f", write {total}"
        lines.append(f"{x} + {y}{carried} = {total}{rest}")
    return {"question": f"What is {a} + {b}?", "answer": "\n".join(lines) + f"\n#### {a + b}"}


DRAWS: Mapping[str, Draw] = {"countdown": countdown, "sudoku": sudoku, "addition": addition}


def generate(options: PuzzleOptions, excluded: frozenset[str] = frozenset()) -> Iterator[Row]:
    """num_problems different problems; the first n are the same for every larger num_problems.

    Args:
        options: puzzle is countdown, sudoku or addition.
        excluded: keys (see `key`) of problems to leave out, such as those of an evaluation set.
    Raises:
        ConfigError: an option cannot be meant, or there are no more different problems of this kind.
    """
    check(options)
    draw, seed = DRAWS[options.puzzle], Seed(options.seed).named(options.puzzle)
    seen, attempt = set(excluded), 0
    for made in range(options.num_problems):
        for _ in range(_ATTEMPTS):
            row = draw(seed.at(attempt).generator(), options)
            attempt += 1
            if row is not None and key(row) not in seen:
                break
        else:
            raise ConfigError(
                f"num_problems: there are hardly more than {made} different problems of this kind, got "
                f"{options.num_problems}. Ask for fewer, or widen their range."
            )
        seen.add(key(row))
        yield row


def key(row: Mapping[str, Any]) -> str:
    """What makes a problem the same as another: numbers in any order and target, puzzle, or question."""
    if "numbers" in row:
        return f"{sorted(row['numbers'])} {row['target']}"
    return str(row["puzzle"] if "puzzle" in row else row["question"])


def check(options: PuzzleOptions) -> None:
    """Raises ConfigError."""
    if options.puzzle not in DRAWS:
        raise ConfigError(f"puzzle must be one of {', '.join(DRAWS)}, got {options.puzzle!r}.")
    for name, low, high in (
        ("num_problems", 1, 10**9), ("num_numbers", 2, 8), ("max_number", 1, 10**6), ("max_target", 1, 10**9),
        ("num_empty", 1, 12), ("num_digits", 1, 15),
    ):  # fmt: skip
        value = getattr(options, name)
        if not low <= value <= high:
            raise ConfigError(f"{name} must lie in {low}..{high}, got {value}.")


def run(options: PuzzleOptions) -> None:
    """`igpo puzzles`: writes a JSONL file."""
    check(options)
    path = Path(options.output_file or f"{options.puzzle}.jsonl")
    excluded: set[str] = set()
    if options.exclude_file is not None:
        place = options.exclude_file
        named = place if options.puzzle == "addition" else f"{options.puzzle}={place}"
        for problem in problems(named, DataConfig(trace_column=None)):
            excluded.add(key({"question": problem.question, **problem.columns}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress(options.num_problems, options.puzzle) as advance,
        path.open("w", encoding="utf-8") as stream,
    ):
        for row in generate(options, frozenset(excluded)):
            stream.write(json.dumps(row) + "\n")
            advance()
    say(f"written: {path}")
