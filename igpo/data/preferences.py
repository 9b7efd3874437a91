"""Rows of preference datasets, in TRL's format: `prompt`, `chosen`, `rejected`, each text or messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .sources import Row, short

CHOSEN, REJECTED = "chosen", "rejected"
_MESSAGE = 'be text, or messages that end in {"role": "assistant", "content": text}'


def is_pair(row: Row) -> bool:
    return CHOSEN in row.record and REJECTED in row.record


def preference(row: Row, prompt_column: str) -> tuple[str, tuple[str, str]]:
    """(prompt, (chosen, rejected)) of a row.

    The prompt is text or one user message, in prompt_column or `prompt`. A completion is text or one assistant message,
    before which the prompt's own may stand once more.

    Raises:
        DataError: a column is missing, empty or of another form, or the two completions are the same.
    """
    value = row.value(prompt_column, "prompt", advice="Set prompt_column to one of these.")
    column = prompt_column if prompt_column in row.record else "prompt"
    prompt = _text(value, "user")
    if prompt is None:
        row.fail(column, 'be text or one message {"role": "user", "content": text}', short(value))
    chosen, rejected = (_completion(row, name, prompt) for name in (CHOSEN, REJECTED))
    if chosen == rejected:
        row.fail(CHOSEN, f"differ from {REJECTED!r}", short(chosen))
    return prompt, (chosen, rejected)


def _completion(row: Row, column: str, prompt: str) -> str:
    value = row.record[column]
    before, last = (value[:-1], value[-1:]) if isinstance(value, list) else ([], value)
    found = _text(last, "assistant")
    if found is None:
        row.fail(column, _MESSAGE, short(value))
    if before and _text(before, "user") != prompt:
        row.fail(column, "hold the prompt's message before its own, if any", short(before))
    return found


def _text(value: Any, role: str) -> str | None:
    """Text that is not empty, or that of the one message of this role; None for anything else."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content") if value[0].get("role") == role else None
    return value if isinstance(value, str) and value.strip() else None
