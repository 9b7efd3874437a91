"""TraceRL's diffusion value model: values along the trajectory, GAE over its slices, the clipped value loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.rollout import denoise
from igpo.types import Canvas, Graded, Metrics, Policy, PolicyBatch, Prompt, Rollouts, Seed

from .base import CriticNetwork, Lesson, read_all


@dataclass(frozen=True, kw_only=True)
class ValueLesson(Lesson):
    """old: (N, J, L), the values before the first update.   returns: (N, J, L), what they are to be."""

    old: Tensor
    returns: Tensor


@dataclass(frozen=True)
class ValueCritique:
    """V_k, one value per token that a slice commits, read from the canvas at the slice's start; see `gae`.

        loss = mean_i mean_k 1/2 max[(V_k - R_k)^2, (V_old,k + clip(V_k - V_old,k, +-epsilon) - R_k)^2]

    The reward of a trajectory is the advantage of its completion (centred, z-scored, … as scale_rewards says). Values
    in advantages, and V_old, are those before the batch's first update. batch_size: rows a forward.

    Source: arXiv:2509.06949 (TraceRL), section on its value model, and its released code (which z-scores the rewards).
    The mean over a completion's tokens, then over completions, is ours: that code divides by the canvas length for one
    model and means over slices for another.
    """

    gamma: float
    gae_lambda: float
    epsilon: float
    batch_size: int

    def roll_out(
        self, network: CriticNetwork, policy: Policy, canvas: Canvas, cfg: RolloutConfig, seed: Seed
    ) -> Rollouts:
        return denoise(policy, canvas, cfg, seed)

    @torch.no_grad()
    def judge(
        self, network: CriticNetwork, policy: Policy, prompts: Sequence[Prompt], graded: Graded, batch: PolicyBatch,
        advantages: Tensor, seed: Seed,
    ) -> tuple[Tensor, tuple[Lesson, ...], Metrics]:  # fmt: skip
        draws, mask = batch.draws[0], batch.token_mask[0]
        old = read_all(network, batch.canvas, batch.tokens, draws, self.batch_size)
        found, returns = gae(old, mask, advantages, self.gamma, self.gae_lambda)
        each = mask / mask.sum((1, 2), keepdim=True).clamp(min=1) / len(mask)
        lesson = ValueLesson(
            canvas=batch.canvas, tokens=batch.tokens, draws=draws, weight=each.to(old.dtype), old=old,
            returns=returns,
        )  # fmt: skip
        explained = _explained(returns[mask], old[mask])
        return found, (lesson,), {"critic/value_mean": float((old * each).sum()), **explained}

    def loss(self, values: Tensor, lesson: Lesson) -> tuple[Tensor, Metrics]:
        assert isinstance(lesson, ValueLesson), "of judge"
        near = lesson.old + (values - lesson.old).clamp(-self.epsilon, self.epsilon)
        free, clipped = ((v - lesson.returns).square() for v in (values, near))
        loss = (0.5 * torch.maximum(free, clipped) * lesson.weight).sum()
        outside = ((clipped > free) * lesson.weight).sum()
        return loss, {"critic/clip_ratio": float(outside.detach())}


def gae(
    values: Tensor, mask: Tensor, rewards: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of tokens, from the values of slices, which follow one another.

        R_k = r_k + gamma R*_next,   A_k = r_k - V_k + gamma V*_next + gamma lambda A*_next

    of token k in slice t, where next is t + 1, and V*, R*, A* are the means over a slice's tokens. r_k is the reward of
    the trajectory in its last slice and 0 before. Slices without a token are passed over.

    Args:
        values: (B, J, L).   mask: (B, J, L) bool, the tokens of each slice.   rewards: (B,).
    Returns:
        advantages, returns: (B, J, L), 0 outside mask.
    Source: arXiv:2509.06949 (TraceRL); arXiv:1506.02438 (GAE).
    """
    zero = values.new_zeros(len(values))
    later, seen = (zero, zero, zero), torch.zeros_like(mask[:, 0, 0])
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for j in reversed(range(values.shape[1])):
        own = mask[:, j]
        live, count = own.any(1), own.sum(1).clamp(min=1)
        reward = torch.where(live & ~seen, rewards.to(values.dtype), 0.0)
        value, total, advantage = later  # of the next slice
        returns[:, j] = (reward + gamma * total)[:, None] * own
        ahead = reward + gamma * value + gamma * gae_lambda * advantage
        advantages[:, j] = (ahead[:, None] - values[:, j]) * own
        means = ((x[:, j] * own).sum(1) / count for x in (values, returns, advantages))
        later = tuple(torch.where(live, new, past) for new, past in zip(means, later, strict=True))
        seen = seen | live
    return advantages, returns


def _explained(returns: Tensor, values: Tensor) -> Metrics:
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 what a constant does. Absent when all returns are equal."""
    spread = returns.double().var(correction=0) if len(returns) else torch.zeros(())
    if not spread > 0:
        return {}
    left = (returns - values).double().var(correction=0)
    return {"critic/explained_variance": float(1 - left / spread)}
