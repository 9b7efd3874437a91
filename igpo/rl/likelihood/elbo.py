"""Draw functions of the evidence lower bound: random parts of the completion masked, terms weighted to be unbiased.

    log pi(o|c) >= E_{l ~ U{1..L}} E_{|S| = l} [(L/l) sum_{k in S} log p(o^k | c, z_S)]

Every weighting below has E[w 1(k in S)] = 1 for each position k, unless it says otherwise. L counts the positions that
may be masked. The M draws of an inner update have their l (or t) stratified: one random offset, M even steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from igpo.ops import forward_mask
from igpo.types import Draw, Rollouts, Seed

from .draws import InnerUpdate, on_canvas, prompt_mask, scorable

# (rollouts, positions that may be masked, u (B,) in [0, 1), seed) -> draws whose weights average to one
Sampler = Callable[[Rollouts, Tensor, Tensor, Seed], tuple[Draw, ...]]


def elbo(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    num_draws: int,
    sampler: Sampler,
    hint_mode: str = "score",
) -> list[InnerUpdate]:
    """(1/M) sum_j w_j sum_{k in S_j} log p(o^k | c, z_{S_j}); fresh draws in every inner update.

    sampler: makes one sample (a draw, or a complementary pair) from a uniform number per row.
    """
    positions, row_ids = scorable(rollouts, hint_mode), rollouts.canvas.row_ids.tolist()
    updates = []
    for inner in range(num_iterations):
        stream = seed.named(f"elbo/{inner}")
        offset = torch.tensor(
            [stream.generator(row).random() for row in row_ids], device=positions.device
        )
        draws: list[Draw] = []
        for j in range(num_draws):
            u = (offset + j / num_draws) % 1.0
            draws += sampler(rollouts, positions, u, stream.named(f"mask/{j}"))
        shared = [
            Draw(d.masked, d.score, d.weight / num_draws) for d in draws if d.weight is not None
        ]
        updates.append(InnerUpdate(tuple(shared), positions))
    return updates


def by_count(rollouts: Rollouts, positions: Tensor, u: Tensor, seed: Seed) -> tuple[Draw, ...]:
    """l ~ U{1..L} positions masked, weight L/l: finite variance. Source: arXiv:2502.09992 (LLaDA), equation 6."""
    total = positions.sum(1)
    count = 1 + (u * total).long().clamp(max=(total - 1).clamp(min=0))
    return (_draw(rollouts, subset(rollouts, positions, count, seed), total / count),)


def by_ratio(rollouts: Rollouts, positions: Tensor, u: Tensor, seed: Seed) -> tuple[Draw, ...]:
    """t ~ U(0, 1], every position masked with probability t, weight 1/t: the same mean, but the variance diverges as
    t -> 0. Source: arXiv:2502.09992 (LLaDA), equation 4; arXiv:2510.11683 (BGPO), equation 3."""
    ratio = 1.0 - u
    masked = _noised(rollouts, positions, ratio, seed, exact=False)
    return (_draw(rollouts, masked, 1.0 / ratio),)


def in_pairs(rollouts: Rollouts, positions: Tensor, u: Tensor, seed: Seed) -> tuple[Draw, ...]:
    """l ~ U{0..L}: the mean of (L+1)/l over S and of (L+1)/(L-l) over its complement; an empty part is 0.

    Source: the released code of arXiv:2512.03759 (ESPO).
    """
    total = positions.sum(1)
    count = (u * (total + 1)).long().clamp(max=total)
    masked = subset(rollouts, positions, count, seed)
    weights = [(total + 1) / (2.0 * part.clamp(min=1)) for part in (count, total - count)]
    return (
        _draw(rollouts, masked, weights[0]),
        _draw(rollouts, positions & ~masked, weights[1]),
    )


def complements(rollouts: Rollouts, positions: Tensor, u: Tensor, seed: Seed) -> tuple[Draw, ...]:
    """A share 0.1 + 0.9 u of the positions and its complement, each weighted L/m by its own size m.

    Not the ELBO: the complement is smaller than the first part most of the time, so E[w 1(k in S)] is 1 and the mix of
    mask ratios is not uniform. Source: the released code of arXiv:2510.08233 (DMPO), WDCE replicates.
    """
    total = positions.sum(1)
    count = ((0.1 + 0.9 * u) * total).round().long().clamp(min=1).minimum(total)
    masked = subset(rollouts, positions, count, seed)
    parts = ((masked, count), (positions & ~masked, total - count))
    return tuple(_draw(rollouts, part, total / (2.0 * m.clamp(min=1))) for part, m in parts)


def in_block(
    rollouts: Rollouts,
    positions: Tensor,
    u: Tensor,
    seed: Seed,
    *,
    block_length: int,
    p_mask: float = 0.0,
) -> tuple[Draw, ...]:
    """One random block: earlier blocks clean, later ones masked, l ~ U{1..b} of its b positions masked and scored.

    Weighted (blocks) (b/l). p_mask: clean tokens of prompt and completion are hidden, too, with this probability.
    Source: arXiv:2510.09541 (SPG), section 3.3 (p = 0.15).
    """
    length = positions.shape[1]
    blocks = length // block_length
    chosen = torch.tensor(
        [seed.generator(row).integers(blocks) for row in rollouts.canvas.row_ids.tolist()],
        device=positions.device,
    )[:, None]
    block = torch.arange(length, device=positions.device) // block_length
    inside = positions & (block == chosen)
    total = inside.sum(1)
    count = (1 + (u * total).long()).minimum(total)
    masked = subset(rollouts, inside, count, seed)
    hidden = on_canvas(rollouts, masked | (positions & (block > chosen)))
    if p_mask:
        hidden = hidden | prompt_mask(rollouts, p_mask, seed.named("prompt"))
        clean = positions & (block <= chosen) & ~masked
        ratio = torch.full((len(clean),), p_mask, device=clean.device)
        hidden = hidden | on_canvas(
            rollouts, _noised(rollouts, clean, ratio, seed.named("clean"), exact=False)
        )
    weight = blocks * total / count.clamp(min=1)
    return (Draw(hidden, masked, _spread(weight, masked)),)


def subset(rollouts: Rollouts, positions: Tensor, count: Tensor, seed: Seed) -> Tensor:
    """(B, L) bool: `count` ((B,) int64) of the positions of each row, uniformly chosen."""
    share = count.double() / positions.sum(1).clamp(min=1)
    return _noised(rollouts, positions, share.clamp(max=1.0), seed, exact=True)


def _noised(
    rollouts: Rollouts, positions: Tensor, ratio: Tensor, seed: Seed, *, exact: bool
) -> Tensor:
    canvas = rollouts.canvas
    _, masked = forward_mask(
        rollouts.completion, positions, ratio, mask_id=canvas.mask_id, seed=seed.value, step=seed.step,
        row_ids=canvas.row_ids, exact=exact,
    )  # fmt: skip
    return masked


def _draw(rollouts: Rollouts, masked: Tensor, weight: Tensor) -> Draw:
    return Draw(on_canvas(rollouts, masked), masked, _spread(weight, masked))


def _spread(weight: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, L) float32."""
    return weight.float()[:, None].expand_as(like)
