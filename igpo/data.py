"""Problems from JSONL files (GSM8K's format and anything like it), and which of them a training step gets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from .config import DataConfig
from .types import Prompt, Seed

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"(?<![\d.,])\d[\d,]*(?:\.\d+)?(?!\d)")


class DataError(ValueError):
    """A file of problems is not what the configuration says. Names file, line and column."""


def strip_calculator_annotations(text: str) -> str:
    """GSM8K's worked solutions without their calculator marks.

    >>> strip_calculator_annotations("48/2 = <<48/2=24>>24 clips")
    '48/2 = 24 clips'
    """
    return _ANNOTATION.sub("", text)


def load_prompts(
    path: str | Path | None, cfg: DataConfig, tokenizer: Any, *, limit: int | None = None
) -> list[Prompt]:
    """Reads a JSONL file: one object per line with a prompt, and usually a worked solution and an answer.

    The prompt is put into the tokenizer's chat template, or, without one, becomes BOS (if there is one), the text and a
    newline. The completion the policy should give is "SOLUTION\\nMARKER ANSWER" and EOS: trace_ids, of which the first
    hint_length end before the last place in the solution where the answer stands (IGPO never shows the answer or its
    last copy; arXiv:2509.10396, section 3). Calculator annotations are removed.

    Args:
        path: the file, UTF-8. Blank lines are skipped. None, an option without a value, is an error.
        cfg: names of the columns. The answer is in answer_column, or else follows answer_marker in the trace.
        tokenizer: a fast tokenizer with eos_token.
        limit: reads the first `limit` problems only.
    Returns:
        One Prompt per line; row_id is its 0-based line number.
    Raises:
        DataError: no such file, no problems, or a line that is not as cfg says. Nothing is skipped or cut.
    """
    if path is None:
        raise DataError("a JSONL file of problems must be named, got none.")
    path = Path(path)
    rows = [_Row(path, number, record, cfg) for number, record in _records(path, limit)]
    if not rows:
        raise DataError(f"{path}: must hold at least one problem, got none.")
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(
            f"tokenizer must be a fast one (offsets are needed to place hints), got {kind}."
        )
    all_ids = prompt_ids([row.question for row in rows], tokenizer)
    for row, ids in zip(rows, all_ids, strict=True):
        if len(ids) > cfg.max_prompt_length:
            row.fail(
                cfg.prompt_column, f"be at most max_prompt_length={cfg.max_prompt_length} tokens", f"{len(ids)}",
                "Raise max_prompt_length or remove the line; prompts are never cut.",
            )  # fmt: skip
    traces = [row.trace or "" for row in rows]
    tokens = tokenizer(traces, add_special_tokens=False, return_offsets_mapping=True)
    tokenized = zip(rows, all_ids, tokens["input_ids"], tokens["offset_mapping"], strict=True)
    return [_prompt(row, ids, t, o, tokenizer.eos_token_id) for row, ids, t, o in tokenized]


def prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """The tokens prompts are rolled out from: the chat template, or BOS (if there is one), text and a newline."""
    if tokenizer.chat_template:
        messages = [[{"role": "user", "content": text}] for text in texts]
        all_ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return [tuple(ids) for ids in all_ids]
    first = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    all_ids = tokenizer([text + "\n" for text in texts], add_special_tokens=False)["input_ids"]
    return [(*first, *ids) for ids in all_ids]


def _prompt(
    row: _Row,
    ids: tuple[int, ...],
    trace: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    eos_id: int,
) -> Prompt:
    """trace: its tokens; offsets: the characters (start, stop) each of them stands for."""
    end = hint_end(row.solution, row.answer)
    hint_length = next((i for i, (_, stop) in enumerate(offsets) if stop > end), len(offsets))
    return Prompt(
        text=row.question, ids=ids, row_id=row.line - 1, answer=row.answer, trace=row.trace,
        trace_ids=() if row.trace is None else (*trace, eos_id), hint_length=hint_length, columns=row.columns,
    )  # fmt: skip


def hint_end(solution: str, answer: str | None) -> int:
    """How many characters of a worked solution stand before the last copy of its answer; all without a copy.

    Numbers are compared by value: 1,000 is a copy of 1000, and 172 holds no copy of 72.
    """
    if answer is None:
        return len(solution)
    value = _number(answer)
    if value is not None:
        found = [m.start() for m in _NUMBER.finditer(solution) if _number(m[0]) == value]
    else:
        pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
        found = [m.start() for m in re.finditer(pattern, solution)]
    return found[-1] if found else len(solution)


def _number(text: str) -> Fraction | None:
    text = text.strip().lstrip("$").rstrip(".%").replace(",", "").removeprefix("-")
    plain = re.fullmatch(r"\d{1,100}(\.\d{1,100})?", text)
    return Fraction(text) if plain else None


@dataclass
class _Row:
    """One line of the file, checked against the configuration."""

    path: Path
    line: int
    record: dict[str, Any]
    cfg: DataConfig

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.question = self._text(cfg.prompt_column, "prompt_column")
        raw = None if cfg.trace_column is None else self._text(cfg.trace_column, "trace_column")
        body, marker, rest = (raw or "").rpartition(cfg.answer_marker)
        self.answer = self._answer(raw, bool(marker), rest)
        self.solution = strip_calculator_annotations(body if marker else raw or "").strip()
        self.trace = None
        if raw is not None:
            end = "" if self.answer is None else f"\n{cfg.answer_marker} {self.answer}"
            self.trace = self.solution + end
        self.columns = {k: v for k, v in self.record.items() if k != cfg.prompt_column}

    def _answer(self, trace: str | None, has_marker: bool, after: str) -> str | None:
        cfg = self.cfg
        if cfg.answer_column is not None:
            return self._text(cfg.answer_column, "answer_column", numbers=True).strip()
        if trace is None:
            return None
        if not has_marker or not after.strip():
            advice = "Set answer_marker, or answer_column when the answer has its own."
            self.fail(
                cfg.trace_column,
                f"hold an answer after {cfg.answer_marker!r}",
                _short(trace),
                advice,
            )
        return after.strip()

    def _text(self, column: str, key: str, *, numbers: bool = False) -> str:
        if column not in self.record:
            names = ", ".join(self.record)
            self.fail(column, "be there", f"only {names}", f"Set {key} to one of these.")
        value = self.record[column]
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            self.fail(
                column, "be text that is not empty", _short(value), f"Set {key} to another column?"
            )
        return value

    def fail(self, column: str | None, rule: str, got: str, advice: str) -> NoReturn:
        raise DataError(
            f"{self.path}:{self.line}: column {column!r} must {rule}, got {got}. {advice}"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _records(path: Path, limit: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line number, object) of the lines that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text, byte {error.start} is not.") from error
    found = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and found == limit:
            return
        found += 1
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: must be JSON: {error.msg}, column {error.colno}."
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: must be a JSON object, got {_short(record)}.")
        yield number, record


class Batches:
    """Which problems a step gets. Every epoch is a fresh permutation cut into whole steps, so that no step holds a
    problem twice; the fewer than prompts_per_step problems left over sit out that epoch."""

    def __init__(self, prompts: Sequence[Prompt], prompts_per_step: int, seed: Seed) -> None:
        if not 1 <= prompts_per_step <= len(prompts):
            raise DataError(
                f"prompts_per_step must be in 1..{len(prompts)} (the number of problems), got {prompts_per_step}."
            )
        self.prompts, self.size, self.seed = prompts, prompts_per_step, seed.named("data")
        self.steps_per_epoch = len(prompts) // prompts_per_step
        self._order = lru_cache(maxsize=1)(self._permutation)

    def at(self, step: int) -> list[Prompt]:
        """The problems of a step: a function of (seed, step) alone, so that a run can be resumed."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[place * self.size : (place + 1) * self.size]
        return [self.prompts[row] for row in rows]

    def _permutation(self, epoch: int) -> list[int]:
        return self.seed.at(epoch).generator().permutation(len(self.prompts)).tolist()


def batches(prompts: Sequence[Prompt], prompts_per_step: int, seed: Seed) -> Batches:
    """Raises DataError when there are fewer problems than prompts_per_step."""
    return Batches(prompts, prompts_per_step, seed)
