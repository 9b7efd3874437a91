"""AIRL-S: a discriminator of reference traces and rollouts whose log-odds are the reward of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.rollout import denoise
from igpo.types import (
    Canvas,
    Draw,
    Graded,
    Metrics,
    Policy,
    PolicyBatch,
    Prompt,
    Rollouts,
    Seed,
    take,
)  # fmt: skip

from ..likelihood import Likelihood
from ..traces import fits, stopped, written
from .base import CriticNetwork, Lesson, read_all
from .search import search


@dataclass(frozen=True, kw_only=True)
class DiscriminatorLesson(Lesson):
    """logprob: (N, J, 1), mean log-prob of a step's tokens under the old policy.   expert: the sequences are traces."""

    logprob: Tensor
    expert: bool

    @property
    def kind(self) -> str:
        return "the trace beside " if self.expert else ""


@dataclass(frozen=True)
class Discriminator:
    """A step (a slice of the trajectory) is told to be a reference trace's or the policy's by

        D = sigma(r),   r = f(z') - log pi(a | z)

    f: the critic's mean over the tokens the step committed, on the canvas z' after it; log pi: their mean log-prob on
    the canvas z before it, under the policy before the batch's first update. The critic minimises the cross-entropy,
    half of it the mean over traces of the mean over their steps, half that over rollouts. The policy's advantage is

        A_t = A + step_reward_weight (G_t - mean of G_t over the group),   G_t = (1/steps) sum_{s >= t} gamma^(s-t) r_s

    with A that of the outcome and r of the critic before its update. With num_candidates > 1 rollouts are searched for
    high f, block by block (`search`).

    Traces have no steps: they are written left to right by the rollout's schedule. When a step is a block (shrink of
    all steps of one), their canvases differ from a rollout's in nothing but the tokens. Groups whose prompt has no
    trace get rewards and do not teach.

    likelihood: that of the algorithm.   batch_size: rows a forward.

    Source: arXiv:2508.14313 (AIRL-S): D = e^f / (e^f + pi), the reward f - log pi of a step beside the outcome's, GRPO,
    f as what guides search. Ours, for diffusion: steps are slices, f reads the canvas after them, both terms are means
    over a step's tokens, the order of traces, the centring of G_t and its division by the number of steps. Its buffer
    of earlier samples is left out: each batch teaches once per inner update.
    """

    likelihood: Likelihood
    rollout: RolloutConfig
    gamma: float
    step_reward_weight: float
    num_candidates: int
    pad_id: int
    batch_size: int

    def roll_out(
        self, network: CriticNetwork, policy: Policy, canvas: Canvas, cfg: RolloutConfig, seed: Seed
    ) -> Rollouts:
        if self.num_candidates == 1:
            return denoise(policy, canvas, cfg, seed)
        return search(network, policy, canvas, cfg, seed, num_candidates=self.num_candidates)

    @torch.no_grad()
    def judge(
        self, network: CriticNetwork, policy: Policy, prompts: Sequence[Prompt], graded: Graded, batch: PolicyBatch,
        advantages: Tensor, seed: Seed,
    ) -> tuple[Tensor, tuple[Lesson, ...], Metrics]:  # fmt: skip
        groups = batch.canvas.group_ids
        length = batch.targets.shape[1]
        taught = torch.tensor(
            [fits(prompts[group], length) for group in groups.tolist()], device=groups.device
        )
        if not bool(taught.any()):
            raise ValueError(
                "critic: a step's prompts must have a reference trace to learn from, got none of at most "
                f"{length} tokens. Set data.trace_column, or raise max_completion_length."
            )
        traces = self._traces(policy, prompts, graded, taught, seed)
        everything = torch.ones_like(traces.canvas.group_ids, dtype=torch.bool)
        lessons = (_lesson(batch, taught, expert=False), _lesson(traces, everything, expert=True))
        odds = [
            log_odds(read_all(network, x.canvas, x.tokens, x.draws, self.batch_size), x)
            for x in lessons
        ]
        live, live_of_traces = (lesson.score.any(2) for lesson in lessons)
        gained = reward_to_go(odds[0], live, groups, self.gamma)
        credit = advantages[:, None] + self.step_reward_weight * gained.to(advantages.dtype)
        metrics = {
            "critic/accuracy": sum(_accuracy(*found) for found in zip(odds, lessons, strict=True)),
            "critic/step_reward": float(odds[0][live].mean()),
            "critic/step_reward_of_traces": float(odds[1][live_of_traces].mean()),
        }
        return credit[..., None], lessons, metrics

    def loss(self, values: Tensor, lesson: Lesson) -> tuple[Tensor, Metrics]:
        assert isinstance(lesson, DiscriminatorLesson), "of judge"
        odds = log_odds(values, lesson)
        wrong = F.softplus(-odds if lesson.expert else odds)
        return (wrong * lesson.weight[..., 0]).sum(), {}

    def _traces(
        self, policy: Policy, prompts: Sequence[Prompt], graded: Graded, taught: Tensor, seed: Seed
    ) -> PolicyBatch:
        """One row for each group that has a trace, evaluated under the policy."""
        groups = graded.rollouts.canvas.group_ids
        first = [int((groups == group).nonzero()[0]) for group in groups[taught].unique().tolist()]
        rows = take(graded, torch.tensor(first, device=groups.device))
        canvas = replace(rows.rollouts.canvas, frozen=torch.zeros_like(rows.rollouts.canvas.frozen))
        rollouts = written(
            prompts, replace(rows.rollouts, canvas=canvas), self.rollout, self.pad_id
        )
        rows = replace(rows, rollouts=stopped(rollouts, self.rollout))
        return replace(self.likelihood, needs_reference=False).prepare(policy, rows, seed)


def _lesson(batch: PolicyBatch, taught: Tensor, *, expert: bool) -> DiscriminatorLesson:
    draws, old = batch.draws[0], batch.old_logprob[0]
    assert old is not None, "always_old"
    score = torch.stack([draw.score for draw in draws], 1)
    live, prompt = score.any(2), batch.canvas.prompt_length
    after = tuple(
        Draw(draw.masked & ~F.pad(draw.score, (prompt, 0)), draw.score, step=draw.step)
        for draw in draws
    )
    per_step = live / live.sum(1, keepdim=True).clamp(min=1) * taught[:, None]
    weight = 0.5 * per_step.to(old.dtype) / taught.sum().clamp(min=1)
    mean = (old * score).sum(2) / score.sum(2).clamp(min=1)
    return DiscriminatorLesson(
        canvas=batch.canvas, tokens=batch.tokens, draws=after, weight=weight[..., None], logprob=mean[..., None],
        expert=expert,
    )  # fmt: skip


def _accuracy(odds: Tensor, lesson: DiscriminatorLesson) -> float:
    """The share of the lesson's steps on the right side; half of it, as the weights add up to 1/2."""
    right = odds > 0 if lesson.expert else odds < 0
    return float((right * lesson.weight[..., 0]).sum())


def log_odds(values: Tensor, lesson: DiscriminatorLesson) -> Tensor:
    """(N, J): r = f - log pi of every step; 0 of steps without a token."""
    score = lesson.score
    f = (values * score).sum(2) / score.sum(2).clamp(min=1)
    return (f - lesson.logprob[..., 0]).masked_fill(~score.any(2), 0.0)


def reward_to_go(rewards: Tensor, live: Tensor, groups: Tensor, gamma: float) -> Tensor:
    """(B, J) float64: G_t minus its mean over the rows of the group that have step t, 0 where a row has no such step.

    rewards: (B, J).   live: (B, J) bool.   groups: (B,).   G_t = (1/steps) sum_{s >= t} gamma^(s-t) r_s, over the steps
    a row has.
    """
    later, total = (
        rewards.double().new_zeros(len(rewards)),
        torch.zeros_like(rewards, dtype=torch.float64),
    )
    for j in reversed(range(rewards.shape[1])):
        later = torch.where(live[:, j], rewards[:, j].double() + gamma * later, later)
        total[:, j] = later
    total = total / live.sum(1, keepdim=True).clamp(min=1) * live
    _, group = groups.unique(return_inverse=True)
    size = (int(group.max()) + 1 if len(group) else 0, rewards.shape[1])
    sums, counts = (total.new_zeros(size).index_add(0, group, x.double()) for x in (total, live))
    return (total - (sums / counts.clamp(min=1))[group]) * live
