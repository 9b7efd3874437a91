"""Search over partial canvases: of several fills of a block, the one a critic scores highest."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.rollout import denoise, steps_per_block
from igpo.types import Canvas, Draw, Policy, Rollouts, Seed, put, take

from ..values import resumed
from .base import CriticNetwork, read_all


@torch.no_grad()
def search(
    network: CriticNetwork, policy: Policy, canvas: Canvas, cfg: RolloutConfig, seed: Seed, *, num_candidates: int
) -> Rollouts:  # fmt: skip
    """As `denoise`, but block after block each row takes the best of num_candidates fills.

    The score of a fill is the critic's mean over its tokens, on the canvas with the later blocks masked; the first of
    equal ones is taken. The first candidate is the continuation the row has, which for the first block is that of
    `denoise` with the same seed. The others denoise all that is left anew, so every block costs num_candidates - 1
    times the remaining steps: with b blocks (num_candidates - 1)(b + 1)/2 rollouts more.

    Source: arXiv:2508.14313 (AIRL-S) searches with its reward among steps of text, by best-of-N, beam search and tree
    search; this greedy choice of blocks is ours.
    """
    best = denoise(policy, canvas, cfg, seed)
    per_block = steps_per_block(canvas.completion.shape[1], cfg)
    spent = best.num_forwards
    # a block-causal policy may have one block more
    for block in range(canvas.completion.shape[1] // cfg.block_length + 1):
        first = block * per_block
        unfinished = (best.step_map >= first) & (best.num_steps > first)[:, None]
        rows = unfinished.any(1).nonzero()[:, 0]
        if not len(rows):
            break
        kept, open_ = take(best, rows), unfinished[rows]
        start = resumed(kept.canvas, kept.completion, open_)
        top, step = kept, (first, first + per_block)
        high = _score(network, kept, step, cfg.rollout_batch_size)
        for k in range(1, num_candidates):
            fresh = denoise(policy, start, cfg, seed.named(f"search/{block}/{k}"))
            spent += fresh.num_forwards
            other = _continued(kept, fresh, open_)
            score = _score(network, other, step, cfg.rollout_batch_size)
            better = (score > high).nonzero()[:, 0]
            top, high = put(top, better, take(other, better)), torch.maximum(high, score)
        best = put(best, rows, top)
    return replace(best, num_forwards=spent)


def _score(network: CriticNetwork, rollouts: Rollouts, step: tuple[int, int], size: int) -> Tensor:
    """(B,) the critic's mean over what steps [step) committed, on the canvas after them."""
    order, prompt = rollouts.step_map, rollouts.canvas.prompt_length
    written = (order >= step[0]) & (order < step[1])
    draw = Draw(F.pad(order >= step[1], (prompt, 0)), written)
    values = read_all(network, rollouts.canvas, rollouts.tokens, (draw,), size)[:, 0]
    return values.sum(1) / written.sum(1).clamp(min=1)


def _continued(kept: Rollouts, fresh: Rollouts, unfinished: Tensor) -> Rollouts:
    """The rows of `kept` as they are, but for what was unfinished, which `fresh` wrote."""
    prompt = kept.canvas.prompt_length

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(unfinished, new, old)

    support = kept.support
    if support is not None and fresh.support is not None:
        support = torch.where(unfinished[..., None], fresh.support, support)
    return replace(
        kept,
        tokens=torch.where(F.pad(unfinished, (prompt, 0)), fresh.tokens, kept.tokens),
        step_map=chosen(fresh.step_map, kept.step_map),
        commit_logprob=chosen(fresh.commit_logprob, kept.commit_logprob),
        commit_entropy=chosen(fresh.commit_entropy, kept.commit_entropy),
        num_steps=fresh.num_steps,
        support=support,
    )
