"""Intermediate predictions of a rollout, and the explorers that make them: MDPO's step rewards, wd1++'s completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.ops import unmask_step
from igpo.ops._head import head_logits
from igpo.types import GIVEN, Graded, Policy, Predictions, Prompt, Rollouts, Seed, take

Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]

HEAD_ROWS = 1024  # positions whose logits are held at a time (chosen: 0.5 GB at 128 k words)
STREAM = 1 << 16  # row ids times completion positions: what tells the random streams apart


def evenly(num_steps: Tensor, count: int) -> Tensor:
    """(B, count) int64: `count` steps from 0 on, evenly spread over each row's num_steps."""
    places = torch.arange(count, device=num_steps.device)
    return num_steps[:, None] * places // count


@torch.no_grad()
def predict(
    policy: Policy, rollouts: Rollouts, steps: Tensor, cfg: RolloutConfig, seed: Seed
) -> Predictions:
    """What the policy would answer at once on the canvases before `steps` ((B, R) int64).

    A token is drawn as the rollout draws it, at cfg.temperature, each position by itself; mask_id is never drawn. R
    forwards per row, and the logits of at most HEAD_ROWS positions at a time.
    """
    tokens, logprob = [], []
    for index, step in enumerate(steps.T):
        parts = [
            _fill(policy, take(rollouts, rows), step[rows], cfg, seed.named(f"predict/{index}"))
            for rows in torch.arange(len(step), device=step.device).split(cfg.rollout_batch_size)
        ]
        tokens.append(torch.cat([part[0] for part in parts]))
        logprob.append(torch.cat([part[1] for part in parts]))
    return Predictions(steps, torch.stack(tokens, 1), torch.stack(logprob, 1))


def _fill(
    policy: Policy, rollouts: Rollouts, step: Tensor, cfg: RolloutConfig, seed: Seed
) -> tuple[Tensor, Tensor]:
    canvas, length = rollouts.canvas, rollouts.completion.shape[1]
    masked = (rollouts.step_map != GIVEN) & (rollouts.step_map >= step[:, None])
    before = rollouts.completion.masked_fill(masked, canvas.mask_id)
    whole = torch.cat([rollouts.tokens[:, : canvas.prompt_length], before], 1)
    hidden = policy.hidden(whole, canvas.attention_mask, canvas.position_ids)
    states = hidden[:, canvas.prompt_length :][masked]
    place = torch.arange(length, device=step.device).expand_as(masked)[masked]
    streams = canvas.row_ids[:, None].expand_as(masked)[masked] * STREAM + place
    suppressed = torch.tensor((canvas.mask_id, *cfg.suppress_tokens), device=step.device)
    found, logprob = [], []
    for rows in torch.arange(len(states), device=step.device).split(HEAD_ROWS):
        result = unmask_step(
            head_logits(states[rows], policy.head_weight, policy.head_bias)[:, None],
            torch.full((len(rows), 1), canvas.mask_id, device=step.device),
            mask_id=canvas.mask_id,
            num_unmask=1,
            temperature=cfg.temperature,
            suppress_tokens=suppressed,
            seed=seed.value,
            step=seed.step,
            row_ids=streams[rows],
        )
        found.append(result.tokens[:, 0])
        logprob.append(result.logprob[:, 0].float())
    none = torch.zeros(masked.shape, device=step.device)
    return (
        before.masked_scatter(masked, torch.cat([before.new_empty(0), *found])),
        none.masked_scatter(masked, torch.cat([none.new_empty(0), *logprob])),
    )


@dataclass(frozen=True)
class PredictionExplorer:
    """Leaves the rollouts as they are and adds `count` predictions, at steps evenly spread from the empty canvas on.

    Source: arXiv:2507.08838 (wd1++), completions of the denoise trajectory.
    """

    rollout: RolloutConfig
    count: int

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], graded: Graded, seed: Seed
    ) -> Graded:
        rollouts = graded.rollouts
        steps = evenly(rollouts.num_steps, self.count)
        made = predict(policy, rollouts, steps, self.rollout, seed)
        spent = rollouts.num_forwards + steps.numel()
        return replace(graded, rollouts=replace(rollouts, predictions=made, num_forwards=spent))


@dataclass(frozen=True)
class StepRewardExplorer:
    """Predictions as PredictionExplorer's, graded; of each group the `kept` steps of largest total |advantage| stay.

    With r_t the reward of the prediction before step t, r_T that of the completion, T steps graded:
        A_t = (r_t - r_{t-1}) + 1 + mean(r_{t+1..T}),   z-scored over the group at each step;   r_{-1} = 0
    `credit` holds A of the steps that stay, (B, kept).

    Source: arXiv:2508.13148 (MDPO), section 4.1 and its released code; there the rollout records its predictions, here
    they are made afterwards, at count forwards a row.
    """

    rollout: RolloutConfig
    count: int
    kept: int
    grade: Grade

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], graded: Graded, seed: Seed
    ) -> Graded:
        explore = PredictionExplorer(self.rollout, self.count)
        graded = explore(policy, prompts, graded, seed)
        rollouts, made = graded.rollouts, graded.rollouts.predictions
        assert made is not None, "explore makes them"
        rewards = torch.stack(
            [self.grade(_with_completion(rollouts, made.tokens[:, r]), prompts).rewards for r in range(self.count)],
            1,
        )  # fmt: skip
        _, group = rollouts.canvas.group_ids.unique(return_inverse=True)
        advantages = step_advantages(rewards, graded.rewards, group)
        weight = advantages.new_zeros(int(group.max()) + 1, self.count).index_add(
            0, group, advantages.abs()
        )
        order = weight.argsort(dim=1, descending=True, stable=True)
        best = order[:, : self.kept].sort(dim=1).values[group]
        wide = best[..., None].expand(-1, -1, made.tokens.shape[-1])
        kept = Predictions(
            made.steps.gather(1, best), made.tokens.gather(1, wide), made.logprob.gather(1, wide)
        )
        metrics = {**graded.metrics, "reward/predictions": float(rewards.mean())}
        return replace(
            graded, rollouts=replace(rollouts, predictions=kept),
            credit=advantages.gather(1, best).float(), metrics=metrics,
        )  # fmt: skip


def step_advantages(rewards: Tensor, last: Tensor, group: Tensor, delta: float = 1e-6) -> Tensor:
    """(B, R) float64: the z-scored step advantages of StepRewardExplorer.

    rewards: (B, R) of predictions in the order of their steps.   last: (B,) of the completions.   group: (B,), dense.
    """
    r = torch.cat([rewards, last[:, None]], 1).double()
    gain = r.diff(dim=1, prepend=torch.zeros_like(r[:, :1]))[:, :-1]
    later = r.flip(1).cumsum(1).flip(1)[:, 1:]
    remaining = torch.arange(r.shape[1] - 1, 0, -1, device=r.device)
    raw = gain + 1.0 + later / remaining
    size = torch.bincount(group).double()[:, None]

    def mean(values: Tensor) -> Tensor:
        total = values.new_zeros(len(size), values.shape[1]).index_add(0, group, values)
        return (total / size)[group]

    deviation = raw - mean(raw)
    return deviation / (mean(deviation.square()).sqrt() + delta)


def _with_completion(rollouts: Rollouts, completion: Tensor) -> Rollouts:
    prompt = rollouts.tokens[:, : rollouts.canvas.prompt_length]
    return replace(rollouts, tokens=torch.cat([prompt, completion], 1), predictions=None)
