"""What the dataset says is right, in the form a task's verifier takes: by the names of dataset columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# task -> the columns its reference is made of, the necessary ones first
NEEDED = {
    "gsm8k": ("answer",),
    "math": ("answer",),
    "countdown": ("numbers", "target"),
    "sudoku": ("puzzle",),
    "code": (),
}
OPTIONAL = {"sudoku": ("solution",), "code": ("tests", "cases", "prefix")}
ANSWER_TASKS = ("gsm8k", "math")


class ReferenceColumnError(ValueError):
    """A dataset lacks a column that a task's reference needs. Names task and column."""


def columns_of(task: str) -> tuple[str, ...]:
    """All columns a task reads; ("answer",) for "module:function"."""
    return (*NEEDED.get(task, ("answer",)), *OPTIONAL.get(task, ()))


def reference(task: str, row: Mapping[str, Any]) -> Any:
    """The reference of one row; None where the row has none.

    Raises:
        ReferenceColumnError: a necessary column is missing.
    """
    for name in NEEDED.get(task, ("answer",)):
        if name not in row:
            raise ReferenceColumnError(
                f"verify: task {task!r} needs column {name!r}, got {', '.join(row) or 'no columns'}. "
                "Name the dataset's column so."
            )
    found = {name: row[name] for name in columns_of(task) if row.get(name) is not None}
    if tuple(found) != ("answer",):
        return found or None
    return found["answer"]
