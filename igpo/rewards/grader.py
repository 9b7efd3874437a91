"""The grader: rollouts and their prompts in, rewards and verdicts out."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from igpo.config import RewardConfig
from igpo.types import Graded, Prompt, Rollouts

from .answers import has_answer
from .functions import CORRECTNESS, SCORE, RewardFunction, Values, load_function
from .pool import VerifierPool, shared_pool
from .references import ANSWER_TASKS, ReferenceColumnError, reference
from .tasks import check
from .verdict import ReferenceValueError, Verdict

Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]
Verifier = Callable[[str, Prompt], bool]

ANSWER = (
    "answer"  # the task that compares final answers in this process, in time linear in the text
)


class RewardError(RuntimeError):
    """A reward function answered with something that is no reward. Names the function and the row."""


def make_grader(tokenizer: Any, cfg: RewardConfig, *, verifier: Verifier | None = None) -> Grade:
    """A function that decodes completions, verifies them and adds up their rewards.

    Args:
        tokenizer: decodes a completion: its tokens before the first that ends it (Canvas.ends), without special ones.
        cfg: reward_funcs are "correctness" (1 where the verifier accepts), "score" (the verdict's), names of
            igpo.rewards.REWARDS, or "module:function" in TRL's form `(prompts, completions, **columns) ->
            list[float | None]`; async functions are awaited together. They get every dataset column as a list, and
            completion_ids if they name it. reward_weights has one number per function, or is empty for ones. task says
            what is correct: "answer" compares the final answer with prompt.answer; the tasks of
            `igpo.rewards.verify` are judged in worker processes (verify_workers, verify_timeout_s).
        verifier: (completion, prompt) -> bool, instead of the task. It alone says which rows are correct, whatever
            their reward. A prompt without an answer (or reference) has no correct completion, and "correctness" does
            not apply to it.
    Returns:
        (rollouts, prompts) -> Graded, where row b belongs to prompts[group_ids[b]]. A reward is the weighted sum over
        the functions that did not answer None. metrics, of tasks judged in workers: verify/completions,
        verify/timeouts and verify/failures of this call.
    Raises:
        ValueError: here, when a name, the task or the number of weights is wrong. RewardError: when grading, for a
        wrong number of values, a value that is not a finite number, a row to which no function applies, or one whose
        reference is missing or not what the task needs. What a reward function raises goes through.
    """
    names = cfg.reward_funcs
    if not names:
        raise ValueError("reward_funcs must name at least one function, got none.")
    weights = cfg.reward_weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights must have one number per reward function, got {len(weights)} for {len(names)}."
        )
    functions = {name: load_function(name) for name in names if name not in (CORRECTNESS, SCORE)}
    if verifier is None:
        verifier = _text_verifier if cfg.task == ANSWER else None
        if cfg.task != ANSWER:
            check(cfg.task, cfg.compat)
        elif cfg.compat is not None:
            raise ValueError(f"compat must be none for task=answer, got {cfg.compat!r}. Set task.")
    return _Grader(tokenizer, dict(zip(names, weights, strict=True)), functions, verifier, cfg)


def _text_verifier(text: str, prompt: Prompt) -> bool:
    return prompt.answer is not None and has_answer(text, prompt.answer)


@dataclass(frozen=True)
class _Grader:
    tokenizer: Any
    weights: Mapping[str, float]
    functions: Mapping[str, RewardFunction]
    verifier: Verifier | None  # None: cfg.task, in the worker processes
    cfg: RewardConfig

    def __call__(self, rollouts: Rollouts, prompts: Sequence[Prompt]) -> Graded:
        owners = [prompts[group] for group in rollouts.canvas.group_ids.tolist()]
        ids = completion_ids(rollouts)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        verdicts, metrics = self._verdicts(texts, owners)
        parts = self._parts(texts, ids, owners, verdicts)
        device = rollouts.tokens.device
        correct = [verdict is not None and verdict.correct for verdict in verdicts]
        return Graded(
            rollouts=rollouts,
            rewards=self._total(parts, owners).float().to(device),
            correct=torch.tensor(correct, dtype=torch.bool, device=device),
            rescued=torch.zeros(len(texts), dtype=torch.bool, device=device),
            completions=tuple(texts),
            parts={name: part.float().to(device) for name, part in parts.items()},
            metrics=metrics,
            failures=tuple(None if v is None else v.failure for v in verdicts),
        )

    def _verdicts(
        self, texts: Sequence[str], owners: Sequence[Prompt]
    ) -> tuple[list[Verdict | None], dict[str, float]]:
        """None for rows with nothing to compare with."""
        if self.verifier is None:
            pool = shared_pool(self.cfg.verify_workers, self.cfg.verify_timeout_s)
            before = pool.metrics()
            verdicts = _judge(pool, texts, owners, self.cfg)
            return verdicts, {name: n - before[name] for name, n in pool.metrics().items()}
        judge, applies = self.verifier, self.verifier is not _text_verifier
        return [
            Verdict.of(bool(judge(text, owner)), None) if applies or owner.answer is not None else None
            for text, owner in zip(texts, owners, strict=True)
        ], {}  # fmt: skip

    def _parts(
        self, texts: Sequence[str], ids: Sequence[Sequence[int]], owners: Sequence[Prompt],
        verdicts: Sequence[Verdict | None],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Name -> (B,) float64, NaN for None, in the order of reward_funcs."""
        found = _call(self.functions, [p.text for p in owners], texts, ids, _columns(owners))
        found[CORRECTNESS] = [None if v is None else float(v.correct) for v in verdicts]
        found[SCORE] = [None if v is None else v.score for v in verdicts]
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


def _judge(
    pool: VerifierPool, texts: Sequence[str], owners: Sequence[Prompt], cfg: RewardConfig
) -> list[Verdict | None]:
    jobs = []
    for text, owner in zip(texts, owners, strict=True):
        row = dict(owner.columns)
        if cfg.task in ANSWER_TASKS or ":" in cfg.task:
            row["answer"] = owner.answer
        try:
            wanted = reference(cfg.task, row)
        except ReferenceColumnError as error:
            raise RewardError(f"dataset row {owner.row_id}: {error}") from error
        jobs.append(None if wanted is None else pool.submit(cfg.task, text, wanted, cfg.compat))
    verdicts: list[Verdict | None] = []
    for job, owner in zip(jobs, owners, strict=True):
        try:
            verdicts.append(None if job is None else job.result())
        except ReferenceValueError as error:
            raise RewardError(f"dataset row {owner.row_id}: {error}") from error
    return verdicts


def completion_ids(rollouts: Rollouts) -> list[list[int]]:
    """The tokens of each completion before the first that ends it (Canvas.ends)."""
    ends = rollouts.canvas.ends
    return [list(takewhile(lambda i: i not in ends, row)) for row in rollouts.completion.tolist()]


def completion_texts(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Each completion before its end, decoded without special tokens."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids(rollouts)]


def _columns(owners: Sequence[Prompt]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for prompt in owners for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in owners] for name in names}


def _call(
    functions: Mapping[str, RewardFunction], prompts: Sequence[str], completions: Sequence[str],
    ids: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]],
) -> dict[str, Values]:  # fmt: skip
    """The functions' answers; those of async ones are awaited together, in a thread of their own, as the caller may
    run inside an event loop (notebooks do)."""
    answers: dict[str, Values] = {}
    waiting: dict[str, Awaitable[Values]] = {}
    for name, function in functions.items():
        named = {"completion_ids": ids} if _names(function, "completion_ids") else {}
        result = function(prompts=list(prompts), completions=list(completions), **named, **columns)
        if inspect.isawaitable(result):
            waiting[name] = result
        else:
            answers[name] = result
    if waiting:
        with ThreadPoolExecutor(1) as pool:
            results = pool.submit(asyncio.run, _gather(list(waiting.values()))).result()
        answers |= dict(zip(waiting, results, strict=True))
    return answers


def _names(function: RewardFunction, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


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
