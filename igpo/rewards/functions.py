"""Reward functions by name, in TRL's form: (prompts, completions, **columns) -> numbers, None where not applicable."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from . import shaping
from .answers import MARKER, number
from .pool import VerifierPool, shared_pool
from .references import columns_of, reference
from .tasks import check
from .verdict import Verdict

Values = Sequence[float | None]
RewardFunction = Callable[..., Any]  # returns Values or Awaitable[Values]

# the verifier's verdict and its score; not functions of the texts alone, so the grader supplies them
CORRECTNESS, SCORE = "correctness", "score"


def answer_format(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """1 for a completion whose last line is "#### NUMBER" and holds the only marker, else 0."""
    return [float(_is_formatted(text)) for text in completions]


def _is_formatted(text: str) -> bool:
    last = text.rstrip().rpartition("\n")[2]
    after = re.fullmatch(rf"{MARKER}\s*(\S+)", last)
    return text.count(MARKER) == 1 and after is not None and number(after[1]) is not None


REWARDS: dict[str, RewardFunction] = {
    "format": answer_format,
    "tags": shaping.tags,
    "boxed": shaping.boxed,
    "d1_xmlcount": shaping.d1_xmlcount,
    "igpo_format": shaping.igpo_format,
}


def make_reward(
    task: str,
    *,
    columns: Mapping[str, str] | None = None,
    compat: str | None = None,
    partial: bool = False,
    pool: VerifierPool | None = None,
    asynchronous: bool = False,
) -> RewardFunction:
    """A reward function of a task, for `reward_funcs` of a trainer (ours as "module:function", TRL's as it is).

        trainer = GRPOTrainer(reward_funcs=[make_reward("math")], …)      # the dataset has a column "answer"

    Args:
        task: as in `verify`.
        columns: our name -> the dataset's, of the columns that make the reference (columns_of(task): "answer";
            "numbers" and "target"; "puzzle" and "solution"; "tests", "cases" and "prefix").
        compat: as in `verify`.
        partial: the reward is Verdict.score instead of 1 or 0.
        pool: default: the pool this process shares.
        asynchronous: an `async def` function, so that verification overlaps with other reward functions.
    Returns:
        (prompts, completions, **columns) -> list of float, None for rows without a reference; a completion that could
        not be judged gets 0. Its __name__ is "TASK_reward".
    Raises:
        ValueError: the task or compat is unknown; when called, ReferenceColumnError or ReferenceValueError.
    """
    check(task, compat)
    names = {name: (columns or {}).get(name, name) for name in columns_of(task)}

    def submit(
        completions: Sequence[Any], given: Mapping[str, Any]
    ) -> list[Future[Verdict] | None]:
        present = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
        jobs: list[Future[Verdict] | None] = []
        for row, text in enumerate(shaping.texts(completions)):
            wanted = reference(task, {name: values[row] for name, values in present.items()})
            chosen = pool or shared_pool()
            jobs.append(None if wanted is None else chosen.submit(task, text, wanted, compat))
        return jobs

    def value(verdict: Verdict) -> float:
        return verdict.score if partial else float(verdict.correct)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> Values:
        jobs = submit(completions, given)
        return [None if job is None else value(job.result()) for job in jobs]

    async def async_reward(
        prompts: Sequence[Any], completions: Sequence[Any], **given: Any
    ) -> Values:
        jobs = submit(completions, given)
        return [None if job is None else value(await asyncio.wrap_future(job)) for job in jobs]

    made = async_reward if asynchronous else reward
    made.__name__ = made.__qualname__ = f"{task.rpartition(':')[2]}_reward"
    return made


gsm8k_reward = make_reward("gsm8k")
math_reward = make_reward("math")
countdown_reward = make_reward("countdown")
sudoku_reward = make_reward("sudoku", partial=True)
code_reward = make_reward("code", partial=True)


def load_function(name: str) -> RewardFunction:
    """A built-in by name, or "module:function". Raises ValueError."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        known = [CORRECTNESS, SCORE, *REWARDS]
        near = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
        raise ValueError(
            f"reward_funcs: must be {', '.join(known)} or module:function, got {name!r}. The nearest one is {near!r}."
        )
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward_funcs: {name!r}: there is no module {error.name!r} on the path."
        ) from error
    except AttributeError as error:
        raise ValueError(f"reward_funcs: {name!r}: {error}.") from error
    if callable(found):
        return found
    raise ValueError(f"reward_funcs: {name!r} must be callable, got {type(found).__name__}.")
