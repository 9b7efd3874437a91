"""The records that flow through a training step, and the legend of shape letters.

    P prompts of a step          G completions per prompt (num_generations)     B = P*G sequences
    T canvas length              S prompt columns, L completion columns, T = S + L
    N selected positions         V vocabulary         D hidden width            K denoise steps of a rollout

    prompt -> canvas -> rollout -> graded -> rescued -> advantages -> log-probs -> loss -> step

Records are frozen: a stage takes records and returns new ones. Imports nothing of igpo.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

GIVEN = -1  # step_map of a position that was on the canvas before the first denoise step (a hint)

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Seed:
    """A place in the tree of random streams. Equal paths give equal numbers on every machine.

    >>> Seed(3).at(10).named("inpaint") == Seed(3).at(10).named("inpaint")
    True
    """

    value: int
    step: int = 0

    def at(self, step: int) -> Seed:
        """The stream of training step `step`; ops mix (value, step, row id, position) in their counters."""
        return replace(self, step=step)

    def named(self, name: str) -> Seed:
        """An independent stream for one purpose ("rollout", "inpaint", "draws", …)."""
        digest = hashlib.blake2b(f"{self.value}/{name}".encode(), digest_size=8).digest()
        return replace(self, value=int.from_bytes(digest, "little") >> 1)  # 63 bits: fits int64

    def generator(self, row_id: int = 0) -> np.random.Generator:
        """A numpy generator for this stream, step and row, for the few draws that are not ops."""
        digest = hashlib.blake2b(f"{self.value}/{self.step}/{row_id}".encode(), digest_size=16)
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


@dataclass(frozen=True)
class Prompt:
    """One problem.

    text: as shown to a reward function.   ids: its tokens.   row_id: its place in the dataset, the key of its random
    streams.   answer: ground truth, None when there is none.   trace: a worked solution, for hints; trace_ids its
    tokens, of which the first hint_length may be shown (the final answer comes after them).   pair: the tokens of the
    chosen and the rejected completion of a preference dataset, EOS included; None elsewhere.   columns: every other
    dataset column, passed to reward functions.
    """

    text: str
    ids: tuple[int, ...]
    row_id: int
    answer: str | None = None
    trace: str | None = None
    trace_ids: tuple[int, ...] = ()
    hint_length: int = 0
    pair: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Canvas:
    """B sequences about to be denoised: S prompt columns (left-padded), then L completion columns.

    tokens: (B, T) int64, mask_id where to generate.   attention_mask: (B, T) bool, False on padding.
    position_ids: (B, T) int64, 0 at the first real token.   frozen: (B, L) bool, completion positions given as hints.
    row_ids: (B,) int64, identity of the sequence for random streams: rollouts depend on (seed, step, row id) only.
    group_ids: (B,) int64 in [0, P): the prompt each sequence belongs to.
    """

    tokens: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    frozen: Tensor
    row_ids: Tensor
    group_ids: Tensor
    prompt_length: int  # S
    mask_id: int
    eos_id: int | None = (
        None  # the token that ends a completion, and fills what an early stop leaves
    )
    stop_token_ids: frozenset[int] = frozenset()  # others that end one: the end of a chat turn
    entropy_bound: Tensor | None = None  # (B,) in place of RolloutConfig's, for every row its own

    @property
    def completion(self) -> Tensor:
        """(B, L) the completion columns."""
        return self.tokens[:, self.prompt_length :]

    @property
    def ends(self) -> frozenset[int]:
        """All tokens that end a completion: its text, length and reward are of what comes before the first."""
        return self.stop_token_ids | ({self.eos_id} if self.eos_id is not None else set())

    def is_end(self, tokens: Tensor) -> Tensor:
        """Of the shape of tokens, bool: one of `ends`."""
        return torch.isin(
            tokens, torch.tensor(sorted(self.ends), dtype=torch.int64, device=tokens.device)
        )


@dataclass(frozen=True)
class Predictions:
    """Complete answers the policy gives on the way: R canvases of a rollout, every masked position filled at once.

    steps: (B, R) int64, the canvas is the one before this denoise step.   tokens: (B, R, L) int64, the completion with
    the predicted tokens where it was masked.   logprob: (B, R, L) float32, nats, of these; 0 elsewhere.
    """

    steps: Tensor
    tokens: Tensor
    logprob: Tensor


@dataclass(frozen=True)
class Rollouts:
    """Denoised canvases and how they came about.

    canvas: what was denoised.   tokens: (B, T) int64, the result.
    step_map: (B, L) int64: the denoise step (0-based) that committed the token; GIVEN for hints; num_steps[b] for
    positions filled with EOS by the early stop (never scored as the policy's choice). Masking step_map >= t rebuilds
    the canvas before step t, except under a remasking sampler: there it is the last of several commits.
    commit_logprob, commit_entropy: (B, L) float32, nats, under softmax(logits/temperature) at the moment of the commit;
    0 where nothing was drawn.   num_steps: (B,) int64.   num_forwards: sequences x model
    calls spent on the batch.
    """

    canvas: Canvas
    tokens: Tensor
    step_map: Tensor
    commit_logprob: Tensor
    commit_entropy: Tensor
    num_steps: Tensor
    num_forwards: int
    predictions: Predictions | None = None  # where an explorer made some
    # (B, L, top_k) int32, cfg.record_support: the ids a token was drawn from, most probable first, -1 where there are
    # fewer or nothing was drawn. commit_logprob and commit_entropy are then of softmax(logits/temperature) over these.
    support: Tensor | None = None

    @property
    def completion(self) -> Tensor:
        """(B, L) the completion columns."""
        return self.tokens[:, self.canvas.prompt_length :]


@dataclass(frozen=True)
class Graded:
    """Rollouts with their verdicts.

    rewards: (B,) float32, the weighted sum of reward functions.   correct: (B,) bool, the verifier's verdict.
    parts: name -> (B,) float32, NaN where a function returned None.   completions: B texts.
    rescued: (B,) bool, rows an explorer put in (IGPO's inpainted ones).   metrics: of grading and exploring.
    credit: what an explorer says parts of a completion earned, (B, L) for tokens or (B, R) for predictions; or None.
    """

    rollouts: Rollouts
    rewards: Tensor
    correct: Tensor
    rescued: Tensor
    completions: tuple[str, ...]
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    credit: Tensor | None = None
    # what became of the verifier of each row where it gave up: timeout, memory, crash; None where it judged
    failures: tuple[str | None, ...] | None = None


@dataclass(frozen=True)
class Draw:
    """One evaluation of a likelihood: what is masked, which positions are read, with which weight.

    The same draw is evaluated under the policy, the old policy and the reference (common random numbers). Its canvas is
    rebuilt from the completed one when it is forwarded; nothing of that size is kept.
    masked: (B, T) bool, what the canvas hides.   score: (B, L) bool.   weight: (B, L) float32 or None for ones.
    step: (B,) int64, the denoise step whose canvas this is; None when it is none of the rollout's.
    targets: (B, L) int64, the tokens to score; None: the completion.
    beside_clean: every block is read behind the finished blocks before it (`BlockPolicy.hidden_of_blocks`) instead of
    behind what of them is on this canvas.
    """

    masked: Tensor
    score: Tensor
    weight: Tensor | None = None
    step: Tensor | None = None
    targets: Tensor | None = None
    beside_clean: bool = False

    def canvas(self, tokens: Tensor, mask_id: int) -> Tensor:
        """(B, T) int64: the canvas to forward, of the completed one."""
        return tokens.masked_fill(self.masked, mask_id)


@dataclass(frozen=True)
class PolicyBatch:
    """What the inner updates need of a graded batch. Every tuple has one entry per inner update.

    draws: the draws of that update, J of them.   targets: (B, L) int64, the completion.   A value is what the
    likelihood makes of the draws' log-probs: (B, L), or (B, J, L) where it keeps the draws apart.
    token_mask: bool, shape of a value: what enters the loss.   old_logprob, ref_logprob: values in float32, or None
    where the objective does not need them.   weight: (B, J, 1) or (B, J, L) float32, of each draw's terms of the loss;
    None for ones.   first: (B, J, L), every draw's log-probs under the policy before the first inner update; None where
    they were not evaluated or are not worth keeping.   support: (B, L, K) of the rollouts, where log-probs are over the
    tokens that could be drawn; None: over all.
    """

    canvas: Canvas
    draws: tuple[tuple[Draw, ...], ...]
    targets: Tensor
    token_mask: tuple[Tensor, ...]
    old_logprob: tuple[Tensor | None, ...]
    ref_logprob: tuple[Tensor | None, ...]
    weight: tuple[Tensor | None, ...] = ()
    first: Tensor | None = None
    support: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """(B, T) int64: prompt and completion."""
        return torch.cat([self.canvas.tokens[:, : self.canvas.prompt_length], self.targets], 1)


class Policy(Protocol):
    """What rollouts and likelihoods ask of a model: hidden states, and the head to apply where needed."""

    def hidden(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """(B, T) int64 -> (B, T, D): row i, through the head, predicts token i."""
        ...

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        ...

    @property
    def head_bias(self) -> Tensor | None:
        """(V,) or None."""
        ...


class BlockPolicy(Policy, Protocol):
    """A policy whose attention is causal between blocks of block_length positions."""

    @property
    def block_length(self) -> int | None:
        """Of its blocks, which count from a row's first token; None when it has none after all."""
        ...

    def hidden_of_blocks(
        self,
        noisy: Tensor,
        clean: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """(B, T) int64, twice -> (B, T, D): as `hidden` of clean up to the block of a row, and noisy in it."""
        ...


def take(record: Any, rows: Tensor) -> Any:
    """The record restricted to `rows` ((N,) int64), in that order; nested records and tuples of B too."""
    return _map_rows(
        record, lambda value: value[rows], lambda value: tuple(value[i] for i in rows.tolist())
    )


def put(record: Any, rows: Tensor, source: Any) -> Any:
    """The record with `rows` ((N,) int64) replaced by the N rows of `source`, a record of the same type.

    Counts that belong to the whole batch (num_forwards, metrics, prompt_length, …) stay those of `record`.
    """
    changes = {}
    for item in fields(record):
        old, new = getattr(record, item.name), getattr(source, item.name)
        if isinstance(old, Tensor):
            changes[item.name] = old.index_copy(0, rows, new.to(old.dtype))
        elif is_dataclass(old):
            changes[item.name] = put(old, rows, new)
        elif isinstance(old, Mapping) and item.name == "parts":
            changes[item.name] = {k: v.index_copy(0, rows, new[k]) for k, v in old.items()}
        elif isinstance(old, tuple):
            merged = list(old)
            for row, value in zip(rows.tolist(), new, strict=True):
                merged[row] = value
            changes[item.name] = tuple(merged)
    return replace(record, **changes)


def _map_rows(record: Any, of_tensor: Callable, of_tuple: Callable) -> Any:
    changes = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = of_tensor(value)
        elif is_dataclass(value):
            changes[item.name] = _map_rows(value, of_tensor, of_tuple)
        elif isinstance(value, Mapping) and item.name == "parts":
            changes[item.name] = {k: of_tensor(v) for k, v in value.items()}
        elif item.name in ("draws", "token_mask", "old_logprob", "ref_logprob", "weight"):
            changes[item.name] = _nested(value, of_tensor, of_tuple)
        elif isinstance(value, tuple):
            changes[item.name] = of_tuple(value)
    return replace(record, **changes)


def _nested(value: Any, of_tensor: Callable, of_tuple: Callable) -> Any:
    """Tuples of draws or tensors, one entry per inner update or draw rather than per row."""
    if isinstance(value, tuple):
        return tuple(_nested(entry, of_tensor, of_tuple) for entry in value)
    if isinstance(value, Tensor):
        return of_tensor(value)
    return None if value is None else _map_rows(value, of_tensor, of_tuple)
