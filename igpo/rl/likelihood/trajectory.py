"""Draw functions along the trajectory: canvases the rollout really passed through, rebuilt from its step map.

Masking step_map >= t gives the canvas before denoise step t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igpo.types import GIVEN, Draw, Rollouts, Seed

from .draws import InnerUpdate, on_canvas


def step_map(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    num_slices: int,
    hint_mode: str = "score",
    hint_order: Tensor | None = None,
) -> list[InnerUpdate]:
    """log p(o^k | the canvas at the start of the slice of denoise steps that committed o^k).

    Each row's steps are cut into num_slices runs of consecutive steps, the cuts drawn anew for every inner update; a
    run's canvas is rebuilt by masking step_map >= its first step. One slice is mean-field on the generated tokens; as
    many slices as steps is the trajectory's own log-likelihood. EOS filled in by the early stop is masked and not
    scored.

    Hints have no step. hint_mode "score" reads them from one more canvas, fully masked; "condition" leaves them visible
    without gradient; "replay" gives every token of a row with hints the step hint_order says ((L,) int64, e.g.
    rollout.pseudo_order: left to right), as if the policy had written the row in that order.

    Source: arXiv:2509.06949 (TraceRL, slices of equal length; random cuts are ours).
    """
    canvas, order, num_steps = rollouts.canvas, rollouts.step_map, rollouts.num_steps
    filled = (order != GIVEN) & (order >= num_steps[:, None])
    if hint_mode == "replay":
        assert hint_order is not None, "replay needs an order"
        hinted = (order == GIVEN).any(1)
        steps = hint_order.to(order.device)
        order = torch.where(hinted[:, None], steps, order)
        num_steps = torch.where(hinted, steps.max() + 1, num_steps)
    generated = (order != GIVEN) & ~filled
    hints = order == GIVEN if hint_mode == "score" else torch.zeros_like(generated)
    extra = (Draw(on_canvas(rollouts, torch.ones_like(hints)), hints),) if hints.any() else ()
    updates = []
    for inner in range(num_iterations):
        stream = seed.named(f"slices/{inner}")
        edges = torch.tensor(
            [
                _slice_edges(int(count), num_slices, stream.generator(int(row)))
                for row, count in zip(canvas.row_ids, num_steps, strict=True)
            ],
            device=order.device,
        )  # (B, num_slices + 1)
        draws = []
        for low, high in zip(edges.T[:-1, :, None], edges.T[1:, :, None], strict=True):
            read = generated & (order >= low) & (order < high)
            draws.append(Draw(on_canvas(rollouts, order >= low), read, step=low[:, 0]))
        updates.append(InnerUpdate((*draws, *extra), generated | hints))
    return updates


def _slice_edges(num_steps: int, num_slices: int, rng) -> list[int]:
    """0 = e_0 < e_1 < … = num_steps; edges repeat at the end (empty slices) when there are more slices than steps."""
    cuts = min(num_slices - 1, max(0, num_steps - 1))
    inside = sorted((1 + rng.permutation(max(0, num_steps - 1))[:cuts]).tolist())
    return [0, *inside, *[num_steps] * (num_slices - cuts)]


def slices(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    shrink: int,
    steps_per_block: int,
    hint_mode: str = "score",
) -> list[InnerUpdate]:
    """log p(o^k | the canvas at the start of the run of `shrink` steps that committed o^k), every run of every block.

    Within a block of steps_per_block steps each run of `shrink` consecutive steps is one draw; terms of a draw are
    averaged over its tokens. shrink = 1 is the trajectory's own log-likelihood; all steps of one block in one run is
    mean-field. The same in every inner update. Hints: "condition" leaves them visible; "score" reads them from the full
    mask, in one more draw. Source: arXiv:2509.06949 (TraceRL).
    """
    order, num_steps = rollouts.step_map, rollouts.num_steps
    block = order.div(steps_per_block, rounding_mode="floor")
    runs = -(-steps_per_block // shrink)
    run = block * runs + (order - block * steps_per_block) // shrink
    generated = (order != GIVEN) & (order < num_steps[:, None])
    count = int(run[generated].max()) + 1 if bool(generated.any()) else 1
    draws = [
        Draw(
            on_canvas(rollouts, (order != GIVEN) & (run >= index)),
            generated & (run == index),
            step=torch.full_like(num_steps, index),
        )
        for index in range(count)
    ]
    counted = generated
    if hint_mode == "score" and bool((order == GIVEN).any()):
        hints, everything = order == GIVEN, torch.ones_like(generated)
        draws.append(Draw(on_canvas(rollouts, everything), hints))
        counted = generated | hints
    return [InnerUpdate(tuple(draws), counted, per_token(draws))] * num_iterations


def per_token(draws: Sequence[Draw]) -> Tensor:
    """(B, J, 1): one over the number of tokens each draw reads."""
    sizes = torch.stack([draw.score.sum(1) for draw in draws], 1)
    return 1.0 / sizes.clamp(min=1)[..., None].float()


def step_mc(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    num_draws: int,
    proposal: str = "uniform",
) -> list[InnerUpdate]:
    """M = num_draws denoise steps t_j ~ q: log p(o^k | canvas before t_j) of what step t_j committed.

    Terms of a draw are weighted 1/(m q(t_j) M).
    m: steps up to the last that committed something else than EOS; later ones are not scored. proposal: "uniform"; or
    "entropy", in proportion to the entropy of what a step committed. Both are unbiased for the mean over the m steps.
    The uniforms of a row are stratified: one in each of num_draws equal parts, in random order. Hints stay visible and
    get no gradient.

    Source: arXiv:2510.04019 (AGRPO), its released code; there the strata span the whole batch.
    """
    order, rows = rollouts.step_map, rollouts.canvas.row_ids.tolist()
    committed = (
        order[:, None] == torch.arange(int(rollouts.num_steps.max()), device=order.device)[:, None]
    )
    written = committed & (rollouts.completion != _eos(rollouts))[:, None]  # (B, K, L)
    steps = torch.arange(committed.shape[1], device=order.device)
    last = torch.where(written.any(2), steps, 0).amax(1)
    live = committed.any(2) & (steps <= last[:, None])
    mass = live.double()
    if proposal == "entropy":
        entropy = (committed * rollouts.commit_entropy.double()[:, None]).sum(2)
        mass = entropy.clamp(min=1e-8) * live
    chance = mass / mass.sum(1, keepdim=True).clamp(min=1e-300)
    updates = []
    for inner in range(num_iterations):
        stream = seed.named(f"steps/{inner}")
        u = torch.stack([_strata(num_draws, stream.generator(row)) for row in rows]).to(
            order.device
        )
        where = torch.searchsorted(chance.cumsum(1), u, right=True)
        drawn = where.clamp(max=chance.shape[1] - 1)  # (B, M)
        weight = 1.0 / (num_draws * live.sum(1, keepdim=True) * chance.gather(1, drawn))
        draws = tuple(
            Draw(
                on_canvas(rollouts, (order != GIVEN) & (order >= t)),
                (order == t) & live.gather(1, t),
                step=t[:, 0],
            )
            for t in drawn.T[..., None]
        )
        counted = torch.stack([draw.score for draw in draws]).any(0)
        updates.append(InnerUpdate(draws, counted, weight.nan_to_num(0, 0, 0).float()[..., None]))
    return updates


def block_exact(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    steps_per_block: int,
    hint_mode: str = "score",
) -> list[InnerUpdate]:
    """log p(o^k | finished blocks before, its block before the step that committed o^k): the trajectory's own.

    Draw r has every block at the canvas before its r-th step, beside the completed one, and reads what that step
    committed in all of them: as many draws as the longest block has steps. For block-causal policies, whose blocks do
    not see later ones. The same in every inner update. Hints: "condition" leaves them visible; "score" reads them from
    one more draw, whose blocks are masked. Source: arXiv:2512.22234 (DiRL), one-pass logits.
    """
    order, num_steps = rollouts.step_map, rollouts.num_steps
    generated = (order != GIVEN) & (order < num_steps[:, None])
    filled = (order != GIVEN) & ~generated
    # every block starts a new run of steps_per_block steps and commits from its first step on
    rank = order % steps_per_block
    count = int(rank[generated].max()) + 1 if bool(generated.any()) else 1
    draws = [
        Draw(
            on_canvas(rollouts, filled | generated & (rank >= index)),
            generated & (rank == index),
            beside_clean=True,
        )
        for index in range(count)
    ]
    counted = generated
    if hint_mode == "score" and bool((order == GIVEN).any()):
        hints, everything = order == GIVEN, torch.ones_like(generated)
        draws.append(Draw(on_canvas(rollouts, everything), hints, beside_clean=True))
        counted = generated | hints
    return [InnerUpdate(tuple(draws), counted)] * num_iterations


def two_mean_field(
    rollouts: Rollouts, seed: Seed, *, num_iterations: int, hint_mode: str = "score"
) -> list[InnerUpdate]:
    """Two canvases: what steps <= tau committed is read from the full mask, the rest from the canvas before step tau.

    tau ~ U{0..steps-1} per row and inner update; tau = 0 is mean-field. Hints ("score") are read from the full mask.
    EOS filled in by the early stop is masked and not scored. Source: arXiv:2510.02212 (DiFFPO), its 2-MF surrogate.
    """
    order, num_steps = rollouts.step_map, rollouts.num_steps
    scored = (order < num_steps[:, None]) & ((order != GIVEN) | (hint_mode == "score"))
    may_hide = torch.ones_like(scored) if hint_mode == "score" else order != GIVEN
    updates = []
    for inner in range(num_iterations):
        stream = seed.named(f"tau/{inner}")
        tau = torch.tensor(
            [
                stream.generator(row).integers(max(1, steps))
                for row, steps in zip(
                    rollouts.canvas.row_ids.tolist(), num_steps.tolist(), strict=True
                )
            ],
            device=order.device,
        )[:, None]
        draws = (
            Draw(on_canvas(rollouts, may_hide), scored & (order <= tau)),
            Draw(
                on_canvas(rollouts, (order != GIVEN) & (order >= tau)),
                scored & (order > tau),
                step=tau[:, 0],
            ),
        )
        updates.append(InnerUpdate(draws, scored))
    return updates


def _strata(count: int, rng) -> Tensor:
    """(count,) float64: one uniform number in each of `count` equal parts of [0, 1), in random order."""
    return torch.from_numpy((rng.permutation(count) + rng.random(count)) / count)


def _eos(rollouts: Rollouts) -> int:
    """A token that is not in the vocabulary when there is no EOS."""
    return -1 if rollouts.canvas.eos_id is None else rollouts.canvas.eos_id


def predicted(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    weighting: str = "none",
    reach: int | None = None,
) -> list[InnerUpdate]:
    """log p(x^k | canvas before step t) of the predicted tokens x of every masked position: one draw per prediction.

    reach: read only what steps t to t + reach - 1 committed (LINVIT: the steps of a block).

    weighting: "likelihood", each draw's sum is weighted L/(R l), l its masked positions and R the predictions (wd1++);
    "confidence", terms of the loss are weighted exp(logprob at prediction)/(R l) instead (MDPO); "none".

    Source: arXiv:2507.08838 (wd1++); arXiv:2508.13148 (MDPO).
    """
    made = rollouts.predictions
    assert made is not None, "an explorer makes them"
    length, count = rollouts.step_map.shape[1], made.steps.shape[1]
    draws, weights = [], []
    for r, step in enumerate(made.steps.T):
        masked = (rollouts.step_map != GIVEN) & (rollouts.step_map >= step[:, None])
        share = 1.0 / (count * masked.sum(1, keepdim=True).clamp(min=1)).float()
        of_value = (length * share).expand_as(masked) if weighting == "likelihood" else None
        read = masked & (rollouts.step_map < step[:, None] + (2**62 if reach is None else reach))
        targets = made.tokens[:, r].contiguous()
        draws.append(Draw(on_canvas(rollouts, masked), read, of_value, step, targets))
        weights.append(made.logprob[:, r].exp() * share)
    counted = torch.stack([draw.score for draw in draws]).any(0)
    weight = torch.stack(weights, 1) if weighting == "confidence" else None
    return [InnerUpdate(tuple(draws), counted, weight)] * num_iterations
