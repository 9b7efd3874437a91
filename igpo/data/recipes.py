"""Public datasets by name: where they are, and how a row of theirs becomes a problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from igpo.config import DataConfig
from igpo.text import last_box

from .preferences import is_pair, preference
from .sources import DataError, Row, Source, rows, short

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_METAMATH_ANSWER = "The answer is:"
_METAMATH_TYPES = ("GSM_AnsAug", "MATH_AnsAug")  # those IGPO trains on (arXiv:2509.10396, code)
_MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """The one schema of all datasets.

    question: the problem, without instructions.   solution: a worked solution without the line that states its answer,
    None when there is none.   answer: what is right, as text; None when unknown.   columns: for reward functions.
    pair: the chosen and the rejected completion of a preference dataset.
    """

    row: Row
    question: str
    solution: str | None = None
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    pair: tuple[str, str] | None = None


def strip_calculator_annotations(text: str) -> str:
    """GSM8K's worked solutions without their calculator marks.

    >>> strip_calculator_annotations("48/2 = <<48/2=24>>24 clips")
    '48/2 = 24 clips'
    """
    return _ANNOTATION.sub("", text)


def _others(row: Row, *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.record.items() if name not in used}


def _gsm8k(row: Row) -> Problem:
    text = row.text("answer")
    body, marker, answer = text.rpartition("####")
    if not marker or not answer.strip():
        row.fail("answer", "hold an answer after '####'", short(text))
    return Problem(
        row, row.text("question"), strip_calculator_annotations(body).strip(), answer.strip(), _others(row, "question")
    )  # fmt: skip


def _math(row: Row) -> Problem:
    solution = row.text("solution")
    answer = last_box(solution)
    if not answer:
        row.fail("solution", r"hold its answer in a \boxed{}", short(solution))
    return Problem(
        row, row.text("problem"), solution.strip(), answer, _others(row, "problem")
    )  # fmt: skip


def _math_test(row: Row) -> Problem:
    solution = row.record.get("solution")
    answer = row.text("answer", numbers=True).strip()
    return Problem(
        row, row.text("problem", "question"), solution, answer, _others(row, "problem", "question")
    )  # fmt: skip


def _metamath(row: Row) -> Problem | None:
    if row.text("type") not in _METAMATH_TYPES:
        return None
    response = row.text("response")
    body, marker, answer = response.rpartition(_METAMATH_ANSWER)
    if not marker or not answer.strip():
        row.fail("response", f"hold an answer after {_METAMATH_ANSWER!r}", short(response))
    body = re.sub(r"\n####[^\n]*$", "", body.rstrip())
    return Problem(row, row.text("query"), body.strip(), answer.strip(), _others(row, "query"))


def _openr1(row: Row) -> Problem:
    """The first generation that math-verify accepted is the trace, without its thoughts; else the given solution."""
    texts, verdicts = row.record.get("generations"), row.record.get("correctness_math_verify")
    right = [t for t, v in zip(texts or (), verdicts or (), strict=False) if v]
    trace = _THOUGHT.sub("", right[0]).strip() if right else row.record.get("solution")
    used = ("problem", "generations", "messages")
    return Problem(
        row, row.text("problem"), trace or None, row.text("answer").strip(), _others(row, *used)
    )  # fmt: skip


def _countdown(row: Row) -> Problem:
    numbers = row.value("nums", "numbers", "input")
    target = row.value("target", "output")
    try:
        parts = numbers.split(",") if isinstance(numbers, str) else numbers
        columns = {"numbers": [int(n) for n in parts], "target": int(target)}
    except (TypeError, ValueError):
        row.fail("numbers", "be whole numbers, and so the target", short((numbers, target)))
    question = f"Numbers: {columns['numbers']}\nTarget: {columns['target']}"
    return Problem(row, question, row.record.get("solution"), row.record.get("answer"), columns)


def _countdown3(row: Row) -> Problem | None:
    problem = _countdown(row)
    return problem if len(problem.columns["numbers"]) == 3 else None


def _sudoku(row: Row) -> Problem:
    puzzle, solution = row.text("puzzle", "Puzzle"), row.text("solution", "Solution")
    for column, grid, digits in (("puzzle", puzzle, "[0-4]{16}"), ("solution", solution, "[1-4]{16}")):  # fmt: skip
        if not re.fullmatch(digits, grid):
            row.fail(column, f"be 16 digits {digits[1:4]}", short(grid))
    columns = {"puzzle": puzzle, "solution": solution}
    return Problem(row, f"Puzzle: {puzzle}", row.record.get("trace"), solution, columns)


@dataclass(frozen=True)
class Recipe:
    """A public dataset.

    kind: what its prompts ask for (templates.py).   source: where it is read by default, None where it has no home.
    convert: a row as a problem, None for rows it leaves out.   unique: of several rows with the same question only the
    first counts.
    """

    kind: str
    source: Source | None
    convert: Callable[[Row], Problem | None]
    unique: bool = False


RECIPES: dict[str, Recipe] = {
    "gsm8k": Recipe("math", Source("openai/gsm8k", ("main",)), _gsm8k),
    "math": Recipe("math", Source("EleutherAI/hendrycks_math", _MATH_SUBJECTS), _math),
    "math500": Recipe("math", Source("HuggingFaceH4/MATH-500", split="test"), _math_test),
    "amc23": Recipe("math", Source("math-ai/amc23", split="test"), _math_test),
    "metamath": Recipe("math", Source("meta-math/MetaMathQA"), _metamath, unique=True),
    "openr1": Recipe("math", Source("open-r1/OpenR1-Math-220k", ("default",)), _openr1),
    "countdown": Recipe("countdown", Source("Jiayi-Pan/Countdown-Tasks-3to4"), _countdown),
    "countdown3": Recipe("countdown", Source("Jiayi-Pan/Countdown-Tasks-3to4"), _countdown3),
    "sudoku": Recipe("sudoku", None, _sudoku),
}


def parse(text: str, cfg: DataConfig) -> tuple[Recipe, Source]:
    """What a `train_file` or `eval_file` means: RECIPE, RECIPE@SPLIT, RECIPE=SOURCE, or SOURCE with the columns of cfg.

    >>> parse("gsm8k@test", DataConfig())[1]
    Source(place='openai/gsm8k', configs=('main',), split='test')

    Raises:
        DataError: a recipe without a home is named alone.
    """
    name, equals, place = text.partition("=")
    if equals and name in RECIPES:
        return RECIPES[name], Source.parse(place)
    name, at, split = text.partition("@")
    if name not in RECIPES:
        return Recipe("math", None, lambda row: of_columns(row, cfg)), Source.parse(text)
    recipe = RECIPES[name]
    if recipe.source is None:
        raise DataError(f"{name}: has no public home; say where its rows are: {name}=FILE.")
    home = recipe.source
    return recipe, Source(home.place, home.configs, split if at else home.split)


def problems(text: str, cfg: DataConfig, limit: int | None = None) -> Iterator[Problem]:
    """The problems of a dataset, the first `limit` of them. Raises DataError."""
    recipe, source = parse(text, cfg)
    seen: set[str] = set()
    count = 0
    for row in rows(source, streaming=cfg.streaming):
        if count == limit:
            return
        problem = recipe.convert(row)
        if problem is None or (recipe.unique and problem.question in seen):
            continue
        if recipe.unique:
            seen.add(problem.question)
        count += 1
        yield problem


def of_columns(row: Row, cfg: DataConfig) -> Problem:
    """A row of any dataset, read by the columns cfg names; a preference pair where it has `chosen` and `rejected`."""
    if is_pair(row):
        question, pair = preference(row, cfg.prompt_column)
        others = _others(row, cfg.prompt_column, "prompt")
        return Problem(
            row, question, columns={**others, "chosen": pair[0], "rejected": pair[1]}, pair=pair
        )
    question = row.text(cfg.prompt_column, advice="Set prompt_column to one of these.")
    raw = None
    if cfg.trace_column is not None:
        raw = _trace(row, cfg)
    body, marker, rest = (raw or "").rpartition(cfg.answer_marker)
    answer = _answer(row, cfg, raw, bool(marker), rest)
    solution = None
    if raw is not None:
        solution = strip_calculator_annotations(body if marker else raw).strip()
    return Problem(row, question, solution, answer, _others(row, cfg.prompt_column))


def _trace(row: Row, cfg: DataConfig) -> str | None:
    """A row without a trace (null) gets no hints, if its answer has a column of its own."""
    assert cfg.trace_column is not None
    advice = "Set trace_column to one of these."
    if row.value(cfg.trace_column, advice=advice) is None and cfg.answer_column is not None:
        return None
    return row.text(cfg.trace_column, advice=advice)


def _answer(
    row: Row, cfg: DataConfig, trace: str | None, has_marker: bool, after: str
) -> str | None:
    if cfg.answer_column is not None:
        advice = "Set answer_column to one of these."
        return row.text(cfg.answer_column, advice=advice, numbers=True).strip()
    if trace is None:
        return None
    if not has_marker or not after.strip():
        row.fail(
            cfg.trace_column, f"hold an answer after {cfg.answer_marker!r}", short(trace),
            "Set answer_marker, or answer_column when the answer has its own.",
        )  # fmt: skip
    return after.strip()
