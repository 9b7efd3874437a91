"""DiFFPO's joint training of the sampler: the entropy bound of a rollout is drawn from a law that is trained, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.rollout import denoise
from igpo.types import Canvas, Draw, Graded, Metrics, Policy, PolicyBatch, Prompt, Rollouts, Seed

from .base import CriticNetwork, Lesson, read_all


@dataclass(frozen=True, kw_only=True)
class BoundLesson(Lesson):
    """drawn: (N, 1, 1), log gamma - log gamma_0 of the row.   old: (N, 1, 1), its mean before the first update.

    The weight is A_i / N.
    """

    drawn: Tensor
    old: Tensor


@dataclass(frozen=True)
class ThresholdCritique:
    """gamma ~ LogNormal(log gamma_0 + u(c), std) for every row of prompt c; u and the policy share one objective.

    u(c) is the mean of the critic over the completion of the masked canvas, 0 before training, and gamma_0 the
    rollout's entropy_bound. The reward of a completion is r - step_cost * steps / num_steps, for the policy and for u
    alike, where steps are those that committed something of the rollout's num_steps; and u ascends

        mean_i min(rho_i A_i, clip(rho_i, 1 +- epsilon) A_i),   rho_i = f_u(gamma_i | c) / f_u,old(gamma_i | c).

    advantage: from rewards, as for the policy.   batch_size: rows a forward.

    Source: arXiv:2510.02212 (DiFFPO) trains the bound of an entropy-bounded sampler per prompt, jointly with the
        policy. Its parametrisation was not found: law, cost and clipping are ours.
    """

    std: float
    step_cost: float
    epsilon: float
    num_steps: int
    advantage: Callable[[Graded], Tensor]
    batch_size: int

    def roll_out(
        self, network: CriticNetwork, policy: Policy, canvas: Canvas, cfg: RolloutConfig, seed: Seed
    ) -> Rollouts:
        assert cfg.entropy_bound is not None, "checks.bounded"
        drawn, _ = self._draw(network, canvas, canvas.tokens, seed)
        bound = math.log(cfg.entropy_bound) + drawn.double()
        return denoise(policy, replace(canvas, entropy_bound=bound.exp()), cfg, seed)

    @torch.no_grad()
    def judge(
        self, network: CriticNetwork, policy: Policy, prompts: Sequence[Prompt], graded: Graded, batch: PolicyBatch,
        advantages: Tensor, seed: Seed,
    ) -> tuple[Tensor, tuple[Lesson, ...], Metrics]:  # fmt: skip
        steps = working_steps(graded.rollouts)
        cost = steps / self.num_steps
        rewards = graded.rewards - self.step_cost * cost
        credit = self.advantage(replace(graded, rewards=rewards))
        drawn, old = self._draw(network, batch.canvas, batch.tokens, seed)
        lesson = BoundLesson(
            canvas=batch.canvas, tokens=batch.tokens, draws=(_masked(batch.canvas),),
            weight=(credit / len(credit)).to(old.dtype)[:, None, None], drawn=drawn[:, None, None],
            old=old[:, None, None],
        )  # fmt: skip
        found = {
            "rollout/working_steps": float(steps.mean()),
            "critic/log_bound": float(drawn.mean()),
        }
        return credit, (lesson,), found

    def loss(self, values: Tensor, lesson: Lesson) -> tuple[Tensor, Metrics]:
        assert isinstance(lesson, BoundLesson), "of judge"
        mean = values.mean(-1, keepdim=True)
        away, before = ((lesson.drawn - m) / self.std for m in (mean, lesson.old))
        ratio = ((before.square() - away.square()) / 2).exp()
        near = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        gain = torch.minimum(ratio * lesson.weight, near * lesson.weight)
        return -gain.sum(), {}

    @torch.no_grad()
    def _draw(
        self, network: CriticNetwork, canvas: Canvas, tokens: Tensor, seed: Seed
    ) -> tuple[Tensor, Tensor]:
        """(B,) log gamma - log gamma_0, and its mean u; the same whenever asked before the critic's next update."""
        values = read_all(network, canvas, tokens, (_masked(canvas),), self.batch_size)
        mean, stream = values[:, 0].mean(-1), seed.named("entropy bound")
        noise = [stream.generator(row).standard_normal() for row in canvas.row_ids.tolist()]
        return mean + self.std * torch.tensor(noise, dtype=mean.dtype, device=mean.device), mean


def _masked(canvas: Canvas) -> Draw:
    """The whole completion hidden and read."""
    everything = torch.ones_like(canvas.frozen)
    return Draw(F.pad(everything, (canvas.prompt_length, 0)), everything)


def working_steps(rollouts: Rollouts) -> Tensor:
    """(B,) float32: the denoise steps that committed something, a model call each."""
    drawn = (rollouts.step_map >= 0) & (rollouts.step_map < rollouts.num_steps[:, None])
    order = rollouts.step_map.masked_fill(~drawn, -1).sort(1).values
    first = F.pad(order.diff(dim=1) != 0, (1, 0), value=True)
    return (first & (order >= 0)).sum(1).float()
