"""Reward functions by name, in TRL's form: (prompts, completions, **columns) -> numbers, None where not applicable."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from .verify import MARKER, number

Values = Sequence[float | None]
RewardFunction = Callable[..., Any]  # returns Values or Awaitable[Values]

# the verifier's verdict; not a function of the texts alone, so the grader supplies it
CORRECTNESS = "correctness"


def answer_format(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """1 for a completion whose last line is "#### NUMBER" and holds the only marker, else 0."""
    return [float(_is_formatted(text)) for text in completions]


def _is_formatted(text: str) -> bool:
    last = text.rstrip().rpartition("\n")[2]
    after = re.fullmatch(rf"{MARKER}\s*(\S+)", last)
    return text.count(MARKER) == 1 and after is not None and number(after[1]) is not None


REWARDS: dict[str, RewardFunction] = {"format": answer_format}


def load_function(name: str) -> RewardFunction:
    """A built-in by name, or "module:function". Raises ValueError."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        known = [CORRECTNESS, *REWARDS]
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
