"""Which training problems are also in an evaluation set (decontamination)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .recipes import Problem

NGRAM = 13  # words; that of GPT-3 (arXiv:2005.14165, appendix C)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """train_row, eval_row: 0-based rows.   kind: "same" problem, or "ngram": they share a run of NGRAM words."""

    train_row: int
    eval_row: int
    kind: str


def overlaps(
    train: Sequence[Problem], evaluation: Sequence[Problem], ngram: int = NGRAM
) -> list[Overlap]:
    """Each training problem that an evaluation set holds, with the first such row.

    Words are compared without case and punctuation. Problems of numbers (Countdown: the numbers in any order, and the
    target; Sudoku: the puzzle) are the same or not; others also when a run of `ngram` words is shared, or, when one has
    fewer words, all of it.

    Raises:
        ValueError: ngram < 1.
    """
    if ngram < 1:
        raise ValueError(f"overlaps: ngram must be at least 1, got {ngram}.")
    same: dict[tuple[object, ...], int] = {}
    runs: dict[tuple[str, ...], int] = {}
    for problem in evaluation:
        same.setdefault(_key(problem), problem.row.row_id)
        for run in _runs(problem, ngram):
            runs.setdefault(run, problem.row.row_id)
    found = []
    for problem in train:
        row, key = problem.row.row_id, _key(problem)
        if key in same:
            found.append(Overlap(row, same[key], "same"))
            continue
        shared = next((runs[run] for run in _runs(problem, ngram) if run in runs), None)
        if shared is not None:
            found.append(Overlap(row, shared, "ngram"))
    return found


def _key(problem: Problem) -> tuple[object, ...]:
    columns = problem.columns
    if "numbers" in columns and "target" in columns:
        return ("countdown", *sorted(columns["numbers"]), columns["target"])
    if "puzzle" in columns:
        return ("sudoku", columns["puzzle"])
    return tuple(_words(problem.question))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(problem: Problem, ngram: int) -> Iterator[tuple[str, ...]]:
    if {"target", "puzzle"} & problem.columns.keys():
        return
    words = _words(problem.question)
    for start in range(max(1, len(words) - ngram + 1)):
        yield tuple(words[start : start + ngram])
