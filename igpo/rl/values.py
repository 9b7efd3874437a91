"""Explorers that ask how good a partly denoised canvas is, by finishing it several times.

Any canvas a rollout passed through can be resumed exactly: committed tokens are frozen, the rest is denoised again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igpo.canvas import GENERATIONS_PER_PROMPT
from igpo.config import RolloutConfig
from igpo.rollout import denoise, pseudo_order, steps_per_block
from igpo.types import Canvas, Graded, Policy, Predictions, Prompt, Rollouts, Seed

Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]


def resumed(canvas: Canvas, completion: Tensor, masked: Tensor) -> Canvas:
    """The canvas with `completion` ((B, L)) frozen in place but for `masked` ((B, L) bool)."""
    shown = completion.masked_fill(masked, canvas.mask_id)
    tokens = torch.cat([canvas.tokens[:, : canvas.prompt_length], shown], 1)
    return replace(canvas, tokens=tokens, frozen=~masked)


def mean_rewards(
    policy: Policy, canvases: Sequence[Canvas], prompts: Sequence[Prompt], cfg: RolloutConfig, grade: Grade,
    count: int, seed: Seed,
) -> tuple[Tensor, int]:  # fmt: skip
    """(C, B) float64: the mean reward of `count` completions of each row of C canvases; and the forwards they took.

    All are denoised as one batch; completion k of canvas c has row ids of its own among those of its prompt.
    Raises ValueError where a prompt has too few row ids for that.
    """
    copies = len(canvases) * count
    share = GENERATIONS_PER_PROMPT // copies
    last = int((canvases[0].row_ids % GENERATIONS_PER_PROMPT).max())
    if last >= share:
        raise ValueError(
            f"mean_rewards: row ids of a prompt must be below {share} to have {copies} completions each, got {last}. "
            "Lower num_generations or num_values."
        )
    moved = [
        replace(canvas, row_ids=canvas.row_ids + share * (c * count + k))
        for c, canvas in enumerate(canvases)
        for k in range(count)
    ]
    rollouts = denoise(policy, _stacked(moved), cfg, seed.named("value"))
    rewards = grade(rollouts, prompts).rewards.double()
    return rewards.view(len(canvases), count, -1).mean(1), rollouts.num_forwards


def _stacked(canvases: Sequence[Canvas]) -> Canvas:
    """Their rows, one canvas after the other."""
    names = ("tokens", "attention_mask", "position_ids", "frozen", "row_ids", "group_ids")
    return replace(canvases[0], **{n: torch.cat([getattr(c, n) for c in canvases]) for n in names})


@dataclass(frozen=True)
class VineExplorer:
    """Monte Carlo values at block boundaries: what each block of a completion added to the expected reward.

    V(z_b) is the mean reward of num_values fresh completions of the canvas before block b; before the first block the
    mean reward of the group stands for it, after the last the reward itself. `credit`: V(z_{b+1}) - V(z_b) for every
    token of block b, (B, L). Cost: num_values times the remaining steps, per boundary and row;
    all of them are denoised as one batch.

    Source: arXiv:2410.01679 (VinePPO), equation 6; blocks for its reasoning steps are ours.
    """

    rollout: RolloutConfig
    grade: Grade
    num_values: int

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], graded: Graded, seed: Seed
    ) -> Graded:
        rollouts, length = graded.rollouts, graded.rollouts.completion.shape[1]
        per_block = steps_per_block(length, self.rollout)
        blocks = length // self.rollout.block_length
        _, group = rollouts.canvas.group_ids.unique(return_inverse=True)
        rewards = graded.rewards.double()
        size = torch.bincount(group).double()
        values = [(size.new_zeros(len(size)).index_add(0, group, rewards) / size)[group]]
        masked = [rollouts.step_map >= block * per_block for block in range(1, blocks)]
        spent = rollouts.num_forwards
        if masked:
            canvases = [resumed(rollouts.canvas, rollouts.completion, hidden) for hidden in masked]
            found, forwards = mean_rewards(
                policy, canvases, prompts, self.rollout, self.grade, self.num_values, seed.named("vine")
            )  # fmt: skip
            # nothing left to denoise: the completion itself
            values += [
                torch.where(m.any(1), v, rewards) for m, v in zip(masked, found, strict=True)
            ]
            spent += forwards
        gained = torch.stack([*values, rewards], 1).diff(dim=1).float()  # (B, blocks)
        credit = gained.repeat_interleave(self.rollout.block_length, 1)
        return replace(graded, rollouts=replace(rollouts, num_forwards=spent), credit=credit)


@dataclass(frozen=True)
class CandidateExplorer:
    """Block after block, a group's G rows each propose a fill; one is chosen for all by its value.

    Q of a fill is the mean reward of num_values completions from it; the choice has probability softmax(Q/temperature)
    over the group, which is the optimal policy regularised to the model as prior. The rows all become the chosen
    completion, whose steps are taken to be left to right; `predictions` hold what each proposed for each block,
    `credit` (B, blocks) the softmax weights minus 1/G.

    Source: arXiv:2402.16181 (LINVIT), the KL-regularised value iteration with the model as prior; candidates of blocks,
    the centring and values by completion are ours, its optimistic bonus is left out.
    """

    rollout: RolloutConfig
    grade: Grade
    num_values: int
    temperature: float

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], graded: Graded, seed: Seed
    ) -> Graded:
        start, length = graded.rollouts.canvas, graded.rollouts.completion.shape[1]
        _, group = start.group_ids.unique(return_inverse=True)
        completion, proposed, credit = graded.rollouts.completion, [], []
        spent, blocks = graded.rollouts.num_forwards, length // self.rollout.block_length
        column = torch.arange(length, device=completion.device)
        for block in range(blocks):
            own, end = seed.named(f"block/{block}"), (block + 1) * self.rollout.block_length
            if block:  # the first block's fills are the rollout's own
                masked = (column >= end - self.rollout.block_length).expand_as(completion)
                fresh = denoise(policy, resumed(start, completion, masked), self.rollout, own)
                completion, spent = fresh.completion, spent + fresh.num_forwards
            proposed.append(completion)
            value, forwards = self._values(policy, prompts, graded, completion, end, own)
            weight = _softmax(value / self.temperature, group)
            credit.append(weight - 1.0 / torch.bincount(group).double()[group])
            completion = completion[_choose(weight, start, prompts, own)]
            spent += forwards
        first = torch.arange(blocks, device=completion.device) * steps_per_block(
            length, self.rollout
        )
        return self._chosen(
            prompts, graded, completion, proposed, torch.stack(credit, 1), first, spent
        )

    def _values(
        self, policy: Policy, prompts: Sequence[Prompt], graded: Graded, completion: Tensor, end: int, seed: Seed
    ) -> tuple[Tensor, int]:  # fmt: skip
        canvas = graded.rollouts.canvas
        masked = (torch.arange(completion.shape[1], device=completion.device) >= end).expand_as(
            completion
        )
        if not bool(masked.any()):
            return self.grade(_as(graded.rollouts, completion), prompts).rewards.double(), 0
        (value,), forwards = mean_rewards(
            policy, [resumed(canvas, completion, masked)], prompts, self.rollout, self.grade, self.num_values, seed
        )  # fmt: skip
        return value, forwards

    def _chosen(
        self, prompts: Sequence[Prompt], graded: Graded, completion: Tensor, proposed: Sequence[Tensor],
        credit: Tensor, first: Tensor, spent: int,
    ) -> Graded:  # fmt: skip
        rollouts = _as(graded.rollouts, completion)
        block = (
            torch.arange(completion.shape[1], device=completion.device) // self.rollout.block_length
        )
        tokens = torch.stack(
            [torch.where(block == b, fill, completion) for b, fill in enumerate(proposed)], 1
        )
        steps = first.expand(len(completion), -1).contiguous()
        made = Predictions(steps, tokens, torch.zeros(tokens.shape, device=tokens.device))
        final = self.grade(replace(rollouts, num_forwards=spent), prompts)
        length, rollout = completion.shape[1], self.rollout
        kept = replace(
            final.rollouts, predictions=made,
            step_map=pseudo_order(length, rollout).to(completion.device).expand_as(completion),
            num_steps=torch.full_like(rollouts.num_steps, rollout.diffusion_steps), support=None,
        )  # fmt: skip
        rescued = torch.ones_like(graded.rescued)
        metrics = {**graded.metrics, "reward/chosen": float(final.rewards.mean())}
        return replace(
            final, rollouts=kept, credit=credit.float(), rescued=rescued, metrics=metrics
        )


def _as(rollouts: Rollouts, completion: Tensor) -> Rollouts:
    prompt = rollouts.tokens[:, : rollouts.canvas.prompt_length]
    return replace(rollouts, tokens=torch.cat([prompt, completion], 1))


def _softmax(values: Tensor, group: Tensor) -> Tensor:
    weights = torch.zeros_like(values)
    for index in range(int(group.max()) + 1):
        rows = group == index
        weights[rows] = values[rows].softmax(0)
    return weights


def _choose(weight: Tensor, canvas: Canvas, prompts: Sequence[Prompt], seed: Seed) -> Tensor:
    """(B,) the row each row's group chose."""
    chosen = torch.empty_like(canvas.group_ids)
    for group in canvas.group_ids.unique().tolist():
        rows = (canvas.group_ids == group).nonzero()[:, 0]
        rows = rows[canvas.row_ids[rows].argsort()]  # whatever their order in the batch
        u = seed.named("choose").generator(prompts[group].row_id).random()
        place = int((weight[rows].cumsum(0) < u).sum().clamp(max=len(rows) - 1))
        chosen[rows] = rows[place]
    return chosen
