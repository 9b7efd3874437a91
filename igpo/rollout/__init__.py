"""Denoising rollouts: blocks left to right, and within a block the most confident tokens first (LLaDA's sampler)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from igpo.config import RolloutConfig
from igpo.types import Canvas, Policy, Rollouts, Seed

from .filters import is_filtered
from .rules import REMASKING
from .sampler import OnStep, Sampler
from .schedule import pseudo_order, steps_per_block, transfer_schedule
from .shared import over_processes

__all__ = [
    "REMASKING",
    "OnStep",
    "denoise",
    "is_filtered",
    "pseudo_order",
    "steps_per_block",
    "transfer_schedule",
]


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
    block began (the remainder goes to the first steps), those of highest confidence. Hints never change, committed
    tokens only with remasking=remdm_conf and rcr, and mask_id is never drawn. cfg.remasking and the keys after it
    choose other published rules (docs/sampling.md): with threshold, factor or entropy_bound a step commits at least its
    share, often more, and a row whose block is complete goes on to the next one (the host waits for the device once a
    step; else once a block).

    Hints leave fewer positions, so fewer are committed a step. A row with nothing left to commit sits out the rest of
    the block's steps, and passes over blocks that are given; one that came out all EOS (cfg.early_stop) stops, and EOS
    fills its masked positions. A row that is finished leaves, and the next one enters: cfg.rollout_batch_size of them
    are in flight for as long as there are so many, each at its own block.

    A block-causal policy (policy.block_length is a number) is denoised in its own blocks: they count from the first
    token of the prompt, whose last tokens so share the first block, and cfg.block_length must be theirs. Each gets the
    steps of a block, and a row stops after the block that holds the first token that ends it (Canvas.ends), for later
    blocks change nothing before them. With cfg.use_cache keys and values of finished blocks are kept and only the
    current block is computed, which is exact (SDAR, arXiv:2510.06303); a row that enters takes the place of one that
    left. With full attention, cfg.approximate_cache does the like for what is outside the block, as an
    approximation.

    A row's tokens depend on (seed, its canvas, its row id) alone, not on the other rows or on rollout_batch_size, as
    far as the policy's own arithmetic does not. Within `igpo.ranks.process_group` the processes share the rows out; all
    must call it alike, and each gets every row (on_step sees its own).

    Args:
        policy: called in eval mode, without gradients; only positions that may be committed pass through its head.
        canvas: B canvases; completion positions are either mask_id or frozen.
        cfg: block_length must divide L, the number of blocks must divide diffusion_steps; equal to policy.block_length.
        seed: of this training step; `Seed.named` separates rollouts of one step that must differ.
        on_step: on_step(step, tokens) after each step, with a copy of all (B, T) tokens as they stand. Rows then wait
            for each other after every block, and those beyond rollout_batch_size run later, from step 0.
    Returns:
        Rollouts; steps are counted over the whole completion, the same for all rows of the batch (a block-causal policy
        whose blocks a completion does not fill evenly has one block of steps more). commit_logprob and
        commit_entropy are over the tokens that are not suppressed (mask_id is).
    Raises:
        ValueError: cfg does not fit the canvas, or a completion position is neither masked nor frozen.
        FloatingPointError: the policy's logits leave a position without a candidate (NaN, or all -inf).
    Source: LLaDA (arXiv:2502.09992), semi-autoregressive sampling with low-confidence remasking; early stop and hints
        as released with arXiv:2509.10396.
    """

    def denoised(canvas: Canvas) -> Rollouts:
        return Sampler(policy, canvas, cfg, seed, on_step).run()

    with _eval_mode(policy):
        return over_processes(denoised, canvas)


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
