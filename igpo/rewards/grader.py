"""The grader: rollouts and their prompts in, rewards and verdicts out."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from igpo.config import RewardConfig
from igpo.types import Graded, Prompt, Rollouts

from .functions import CORRECTNESS, RewardFunction, Values, load_function
from .verify import verify

Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]
Verifier = Callable[[str, Prompt], bool]


class RewardError(RuntimeError):
    """A reward function answered with something that is no reward. Names the function and the row."""


def make_grader(tokenizer: Any, cfg: RewardConfig, *, verifier: Verifier | None = None) -> Grade:
    """A function that decodes completions, verifies them and adds up their rewards.

    Args:
        tokenizer: decodes a completion: its tokens before the first EOS, without special tokens.
        cfg: reward_funcs are "correctness" (1 where the verifier accepts), "format", or "module:function" in TRL's form
            `(prompts, completions, **columns) -> list[float | None]`; async functions are awaited together. They get
            every dataset column as a list. reward_weights has one number per function, or is empty for ones.
        verifier: (completion, prompt) -> bool; default: the final answer equals prompt.answer. It alone says which rows
            are correct, whatever their reward. A prompt without an answer has no correct completion by default, and
            "correctness" does not apply to it.
    Returns:
        (rollouts, prompts) -> Graded, where row b belongs to prompts[group_ids[b]]. A reward is the weighted sum over
        the functions that did not answer None.
    Raises:
        ValueError: here, when a name or the number of weights is wrong. RewardError: when grading, for a wrong number
        of values, a value that is not a finite number, or a row to which no function applies. What a reward function
        raises goes through.
    """
    names = cfg.reward_funcs
    if not names:
        raise ValueError("reward_funcs must name at least one function, got none.")
    weights = cfg.reward_weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights must have one number per reward function, got {len(weights)} for {len(names)}."
        )
    functions = {name: load_function(name) for name in names if name != CORRECTNESS}
    return _Grader(tokenizer, dict(zip(names, weights, strict=True)), functions, verifier)


@dataclass(frozen=True)
class _Grader:
    tokenizer: Any
    weights: Mapping[str, float]
    functions: Mapping[str, RewardFunction]
    verifier: Verifier | None

    def __call__(self, rollouts: Rollouts, prompts: Sequence[Prompt]) -> Graded:
        owners = [prompts[group] for group in rollouts.canvas.group_ids.tolist()]
        texts = completion_texts(rollouts, self.tokenizer)
        correct = [self._is_correct(text, owner) for text, owner in zip(texts, owners, strict=True)]
        parts = self._parts(texts, owners, correct)
        device = rollouts.tokens.device
        return Graded(
            rollouts=rollouts,
            rewards=self._total(parts, owners).float().to(device),
            correct=torch.tensor(correct, dtype=torch.bool, device=device),
            rescued=torch.zeros(len(texts), dtype=torch.bool, device=device),
            completions=tuple(texts),
            parts={name: part.float().to(device) for name, part in parts.items()},
        )

    def _is_correct(self, text: str, prompt: Prompt) -> bool:
        if self.verifier is not None:
            return bool(self.verifier(text, prompt))
        return prompt.answer is not None and verify(text, prompt.answer)

    def _parts(
        self, texts: Sequence[str], owners: Sequence[Prompt], correct: Sequence[bool]
    ) -> dict[str, Tensor]:
        """Name -> (B,) float64, NaN for None, in the order of reward_funcs."""
        found = _call(self.functions, [p.text for p in owners], texts, _columns(owners))
        if CORRECTNESS in self.weights:
            applies = [self.verifier is not None or p.answer is not None for p in owners]
            found[CORRECTNESS] = [
                float(c) if a else None for c, a in zip(correct, applies, strict=True)
            ]
        return {name: _checked(name, found[name], owners) for name in self.weights}

    def _total(self, parts: Mapping[str, Tensor], owners: Sequence[Prompt]) -> Tensor:
        values = torch.stack(list(parts.values()))
        absent = values.isnan()
        for row in absent.all(0).nonzero()[:, 0].tolist():
            raise RewardError(
                f"no reward function applies to a completion of dataset row {owners[row].row_id}: "
                f"{', '.join(parts)} all answered None. Add one that does."
            )
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)[:, None]
        return (values.masked_fill(absent, 0.0) * weights).sum(0)


def completion_texts(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Each completion up to its first EOS, decoded without special tokens."""
    eos = rollouts.canvas.eos_id
    texts = []
    for ids in rollouts.completion.tolist():
        end = ids.index(eos) if eos in ids else len(ids)
        texts.append(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return texts


def _columns(owners: Sequence[Prompt]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for prompt in owners for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in owners] for name in names}


def _call(
    functions: Mapping[str, RewardFunction], prompts: Sequence[str], completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> dict[str, Values]:  # fmt: skip
    """The functions' answers; those of async ones are awaited together, in a thread of their own, as the caller may
    run inside an event loop (notebooks do)."""
    answers: dict[str, Values] = {}
    waiting: dict[str, Awaitable[Values]] = {}
    for name, function in functions.items():
        result = function(prompts=list(prompts), completions=list(completions), **columns)
        if inspect.isawaitable(result):
            waiting[name] = result
        else:
            answers[name] = result
    if waiting:
        with ThreadPoolExecutor(1) as pool:
            results = pool.submit(asyncio.run, _gather(list(waiting.values()))).result()
        answers |= dict(zip(waiting, results, strict=True))
    return answers


async def _gather(waiting: Sequence[Awaitable[Values]]) -> list[Values]:
    return await asyncio.gather(*waiting)


def _checked(name: str, values: Values, owners: Sequence[Prompt]) -> Tensor:
    fails = partial(_fail, name)
    if not isinstance(values, Sequence | Tensor) or isinstance(values, str):
        fails("return a list of numbers", f"{type(values).__name__}")
    if len(values) != len(owners):
        fails("return one value per completion", f"{len(values)} for {len(owners)}")
    out = []
    for value, owner in zip(values, owners, strict=True):
        if value is None:
            out.append(math.nan)
            continue
        if isinstance(value, str) or not hasattr(value, "__float__") or not math.isfinite(value):
            fails("return finite numbers or None", f"{value!r} for dataset row {owner.row_id}")
        out.append(float(value))
    return torch.tensor(out, dtype=torch.float64)


def _fail(name: str, rule: str, got: str) -> None:
    raise RewardError(f"reward function {name!r} must {rule}, got {got}.")
