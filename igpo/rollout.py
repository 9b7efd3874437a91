"""Denoising rollouts: blocks left to right, and within a block the most confident tokens first (LLaDA's sampler)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from igpo.config import RolloutConfig
from igpo.ops import unmask_step
from igpo.ops._head import head_logits
from igpo.types import GIVEN, Canvas, Policy, Rollouts, Seed

OnStep = Callable[[int, Tensor], None]
CONFIDENCE = {"low_confidence": "prob", "random": "random"}  # cfg.remasking -> unmask_step's score


@torch.no_grad()
def denoise(
    policy: Policy,
    canvas: Canvas,
    cfg: RolloutConfig,
    seed: Seed,
    *,
    on_step: OnStep | None = None,
) -> Rollouts:
    """Fills the masked completion positions of every canvas.

    The L columns are cut into blocks of cfg.block_length, each given diffusion_steps * block_length / L steps. A step
    is one call of the policy on the whole canvas; it commits an even share of the positions that were masked when the
    block began (the remainder goes to the first steps), those of highest confidence. Committed tokens and hints never
    change, and mask_id is never drawn. Hints leave fewer positions, so fewer are committed a step. A row with nothing
    left to commit sits out the rest of the block's steps; one that came out all EOS (cfg.early_stop) stops, and EOS
    fills its masked positions.

    A row's tokens depend on (seed, its canvas, its row id) alone, not on the other rows or on rollout_batch_size, as
    far as the policy's own arithmetic does not.

    Args:
        policy: called in eval mode, without gradients; only positions that may be committed pass through its head.
        canvas: B canvases; completion positions are either mask_id or frozen.
        cfg: block_length must divide L, the number of blocks must divide diffusion_steps.
        seed: of this training step; `Seed.named` separates rollouts of one step that must differ.
        on_step: on_step(step, tokens) after each step, with a copy of all (B, T) tokens as they stand. Rows beyond
            rollout_batch_size run later, from step 0.
    Returns:
        Rollouts; steps are counted over the whole completion, the same for all rows of the batch. commit_logprob and
        commit_entropy are over the tokens that are not suppressed (mask_id is).
    Raises:
        ValueError: cfg does not fit the canvas, or a completion position is neither masked nor frozen.
        FloatingPointError: the policy's logits leave a position without a candidate (NaN, or all -inf).
    Source: LLaDA (arXiv:2502.09992), semi-autoregressive sampling with low-confidence remasking; early stop and hints
        as released with arXiv:2509.10396.
    """
    sampler = _Sampler(policy, canvas, cfg, seed, on_step)
    size = len(canvas.tokens)
    with _eval_mode(policy):
        for first in range(0, size, cfg.rollout_batch_size):
            sampler.run(list(range(first, min(first + cfg.rollout_batch_size, size))))
    return sampler.rollouts()


def steps_per_block(length: int, cfg: RolloutConfig) -> int:
    """Denoise steps of a block of a completion of `length` tokens. Raises ValueError when the counts do not divide."""
    if cfg.block_length < 1 or length % cfg.block_length:
        divisors = [n for n in range(1, length + 1) if length % n == 0]
        raise ValueError(
            f"denoise: block_length must divide the {length} completion tokens, got {cfg.block_length}. "
            f"Choose one of {divisors}."
        )
    blocks = length // cfg.block_length
    if not 1 <= cfg.diffusion_steps <= length or cfg.diffusion_steps % blocks:
        valid = list(range(blocks, length + 1, blocks))
        raise ValueError(
            f"denoise: diffusion_steps must be a multiple of the {blocks} blocks and at most {length}, got "
            f"{cfg.diffusion_steps}. Choose one of {valid}."
        )
    return cfg.diffusion_steps // blocks


def transfer_schedule(masked: int, steps: int) -> list[int]:
    """How many of `masked` positions each step commits: an even split, the remainder to the first steps."""
    return [masked // steps + (step < masked % steps) for step in range(steps)]


def pseudo_order(length: int, rollout: RolloutConfig) -> Tensor:
    """(L,) int64: the step at which each position would be committed left to right by the transfer schedule.

    Within a block, step s commits the next transfer_schedule(...)[s] positions.
    """
    steps = steps_per_block(length, rollout)
    counts = torch.tensor(transfer_schedule(rollout.block_length, steps))
    within = torch.arange(steps).repeat_interleave(counts)
    blocks = torch.arange(length // rollout.block_length)[:, None]
    return (within + steps * blocks).flatten()


@dataclass(frozen=True)
class _Group:
    """Rows [first, last) of a block's working order; each had `masked` positions masked when the block began."""

    first: int
    last: int
    masked: int
    schedule: list[int]  # commits of each step


class _Sampler:
    """One call of denoise: its constants, and the results of all B rows, which the blocks fill in."""

    def __init__(
        self,
        policy: Policy,
        canvas: Canvas,
        cfg: RolloutConfig,
        seed: Seed,
        on_step: OnStep | None,
    ) -> None:
        _check(policy, canvas, cfg)
        size, length = canvas.completion.shape
        masked = canvas.completion == canvas.mask_id
        self.policy, self.canvas, self.cfg, self.on_step = policy, canvas, cfg, on_step
        self.steps = steps_per_block(length, cfg)
        self.masked = masked.unflatten(1, (-1, cfg.block_length)).sum(-1).tolist()  # row, block
        self.seed = seed.named(f"rollout/{seed.step}").value
        self.suppressed = torch.tensor(
            (canvas.mask_id, *cfg.suppress_tokens), device=canvas.tokens.device
        )
        self.tokens = canvas.tokens.clone()
        self.step_map = torch.full_like(canvas.completion, GIVEN)
        self.logprob = torch.zeros(size, length, device=canvas.tokens.device)
        self.entropy = torch.zeros_like(self.logprob)
        self.num_steps = [cfg.diffusion_steps] * size
        self.num_forwards = 0

    def run(self, live: list[int]) -> None:
        """Denoises these rows, block after block; those that stop early leave."""
        for block in range(self.cfg.diffusion_steps // self.steps):
            if not live:
                return
            # most masked positions first: the rows that still commit at a step are a prefix
            live.sort(key=lambda row: -self.masked[row][block])
            rows = torch.tensor(live, device=self.tokens.device)
            self._denoise_block(block, live, rows)
            live = self._close_block(block, live, rows)

    def rollouts(self) -> Rollouts:
        num_steps = torch.tensor(self.num_steps, dtype=torch.int64, device=self.tokens.device)
        return Rollouts(
            self.canvas, self.tokens, self.step_map, self.logprob, self.entropy, num_steps, self.num_forwards
        )  # fmt: skip

    def _denoise_block(self, block: int, live: list[int], rows: Tensor) -> None:
        groups = list(_groups([self.masked[row][block] for row in live], self.steps))
        attention_mask, position_ids = (
            self.canvas.attention_mask[rows],
            self.canvas.position_ids[rows],
        )
        for step in range(self.steps):
            active = [group for group in groups if group.schedule[step] > 0]
            if not active:
                return
            size = active[-1].last
            hidden = self.policy.hidden(
                self.tokens[rows[:size]], attention_mask[:size], position_ids[:size]
            )
            self.num_forwards += size
            for group in active:
                part = slice(group.first, group.last)
                self._commit(block, step, group, rows[part], hidden[part])
            if self.on_step is not None:
                self.on_step(block * self.steps + step, self.tokens.clone())

    def _commit(self, block: int, step: int, group: _Group, rows: Tensor, hidden: Tensor) -> None:
        """Commits the step's share of a group. What is left is known from the schedule: the host asks nothing."""
        start = block * self.cfg.block_length
        shift = self.canvas.prompt_length
        masked = self._block_tokens(block, rows) == self.canvas.mask_id
        left = group.masked - sum(group.schedule[:step])
        # the masked columns in ascending order; a draw is keyed by its place among them, a matter of this row alone
        columns = masked.byte().argsort(dim=1, descending=True, stable=True)[:, :left] + start
        there, local = rows[:, None], torch.arange(len(rows), device=rows.device)[:, None]
        result = unmask_step(
            head_logits(
                hidden[local, columns + shift], self.policy.head_weight, self.policy.head_bias
            ),
            self.tokens[there, columns + shift],
            mask_id=self.canvas.mask_id,
            num_unmask=group.schedule[step],
            temperature=self.cfg.temperature,
            confidence=CONFIDENCE[self.cfg.remasking],
            suppress_tokens=self.suppressed,
            seed=self.seed,
            step=block * self.steps + step,
            row_ids=self.canvas.row_ids[rows],
        )
        self.tokens[there, columns + shift] = result.tokens
        for record, value in (
            (self.step_map, torch.full_like(columns, block * self.steps + step)),
            (self.logprob, result.logprob.float()),
            (self.entropy, result.entropy.float()),
        ):
            record[there, columns] = torch.where(result.committed, value, record[there, columns])

    def _close_block(self, block: int, live: list[int], rows: Tensor) -> list[int]:
        """Fills rows that ended in this block with EOS; returns the others. The one host synchronisation of a block."""
        tokens, eos_id = self._block_tokens(block, rows), self.canvas.eos_id
        left = (tokens == self.canvas.mask_id).any(1)
        stops = self.cfg.early_stop and eos_id is not None
        ended = (tokens == eos_id).all(1) if stops else torch.zeros_like(left)
        left, ended = torch.stack((left, ended)).tolist()
        if any(left):
            raise FloatingPointError(
                "denoise: the policy's logits must offer a candidate for every masked position, got none (NaN, or all "
                f"-inf) in block {block} of rows {[row for row, bad in zip(live, left, strict=True) if bad]}. "
                "Check the model's weights and dtype."
            )
        finished = [row for row, end in zip(live, ended, strict=True) if end]
        if finished and eos_id is not None:
            self._fill_rest(block, finished, eos_id)
        return [row for row, end in zip(live, ended, strict=True) if not end]

    def _fill_rest(self, block: int, finished: list[int], eos_id: int) -> None:
        end = (block + 1) * self.cfg.block_length
        num_steps = (block + 1) * self.steps
        rows = torch.tensor(finished, device=self.tokens.device)
        rest, steps = self.tokens[:, self.canvas.prompt_length + end :], self.step_map[:, end:]
        masked = rest[rows] == self.canvas.mask_id
        rest[rows] = torch.where(masked, eos_id, rest[rows])
        steps[rows] = torch.where(masked, num_steps, steps[rows])
        for row in finished:
            self.num_steps[row] = num_steps

    def _block_tokens(self, block: int, rows: Tensor) -> Tensor:
        start = self.canvas.prompt_length + block * self.cfg.block_length
        return self.tokens[:, start : start + self.cfg.block_length][rows]


def _groups(masked: list[int], steps: int) -> Iterator[_Group]:
    """Runs of equal counts (sorted, most first), without those that have nothing to denoise."""
    first = 0
    for count, run in groupby(masked):
        last = first + len(list(run))
        if count:
            yield _Group(first, last, count, transfer_schedule(count, steps))
        first = last


@contextmanager
def _eval_mode(policy: Policy) -> Iterator[None]:
    """Eval mode for a policy that has modes; every module gets its own back."""
    training = {m: m.training for m in policy.modules()} if isinstance(policy, nn.Module) else {}
    if isinstance(policy, nn.Module):
        policy.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _check(policy: Policy, canvas: Canvas, cfg: RolloutConfig) -> None:
    if cfg.remasking not in CONFIDENCE:
        raise ValueError(
            f"denoise: remasking must be one of {sorted(CONFIDENCE)}, got {cfg.remasking!r}."
        )
    if cfg.rollout_batch_size < 1:
        raise ValueError(
            f"denoise: rollout_batch_size must be positive, got {cfg.rollout_batch_size}."
        )
    vocabulary = policy.head_weight.shape[0]
    if any(not 0 <= token < vocabulary for token in cfg.suppress_tokens):
        raise ValueError(
            f"denoise: suppress_tokens must be in [0, {vocabulary}), got {cfg.suppress_tokens}."
        )
    wrong = (canvas.completion == canvas.mask_id) == canvas.frozen
    if bool(wrong.any()):
        raise ValueError(
            "denoise: canvas.frozen must be True exactly where a completion position is not mask_id, got "
            f"{int(wrong.sum())} positions where it is not. Use with_hints to place tokens."
        )
