"""Tasks by name, and the judgement of one completion in this process. pool.py does the same in killable ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from . import countdown, d1, gsm8k, mathematics, programs, sandbox, sudoku
from .sandbox import Limits
from .verdict import Verdict

Judge = Callable[[str, Any], Verdict]

TASKS: dict[str, Judge] = {
    "gsm8k": gsm8k.judge,
    "math": mathematics.judge,
    "countdown": countdown.judge,
    "sudoku": sudoku.judge,
}
D1: dict[str, Judge] = {
    "gsm8k": d1.gsm8k,
    "math": d1.math,
    "countdown": d1.countdown_task,
    "sudoku": d1.sudoku_task,
}
CODE = "code"
COMPATS = (None, "d1")


def judge(
    task: str, completion: str, reference: Any, *, compat: str | None = None, limits: Limits | None = None
) -> Verdict:  # fmt: skip
    """As `verify`, without its protection: a hostile completion may keep this process busy."""
    check(task, compat)
    if task == CODE:
        return programs.judge(completion, reference, limits or Limits())
    if task in TASKS:
        return (D1 if compat == "d1" else TASKS)[task](completion, reference)
    return _verdict(task, _load(task)(completion, reference))


def check(task: str, compat: str | None = None) -> None:
    """Raises ValueError for an unknown task or a compat it does not have."""
    names = (*TASKS, CODE)
    if task not in names and ":" not in task:
        raise ValueError(
            f"verify: task must be one of {', '.join(names)}, or module:function, got {task!r}."
        )
    if compat not in COMPATS:
        raise ValueError(f'verify: compat must be None or "d1", got {compat!r}.')
    if compat == "d1" and task not in D1:
        raise ValueError(
            f'verify: compat="d1" has {", ".join(D1)}, got task {task!r}. Leave compat out.'
        )


def prepare(task: str) -> None:
    """Loads what a task needs, so that no completion is charged with it. Raises what its judgement would."""
    if task == "math":
        mathematics.math_verify()
    elif task == CODE:
        sandbox.check_platform()
    elif ":" in task:
        _load(task)


def _load(name: str) -> Callable[[str, Any], Any]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"verify: task {name!r}: {error}.") from error


def _verdict(task: str, found: object) -> Verdict:
    if isinstance(found, Verdict):
        return found
    if isinstance(found, bool):
        return Verdict.of(found, None)
    raise ValueError(f"verify: task {task!r} must return a Verdict or a bool, got {found!r}.")
