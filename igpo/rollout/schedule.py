"""How many positions each denoise step commits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from igpo.config import RolloutConfig


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
class Group:
    """Rows [first, last) of a block's working order; each had `masked` positions masked when the block began."""

    first: int
    last: int
    masked: int
    schedule: list[int]  # commits of each step


def groups(masked: list[int], steps: int) -> Iterator[Group]:
    """Runs of equal counts (sorted, most first), without those that have nothing to denoise."""
    first = 0
    for count, run in groupby(masked):
        last = first + len(list(run))
        if count:
            yield Group(first, last, count, transfer_schedule(count, steps))
        first = last
