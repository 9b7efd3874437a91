"""How many positions each denoise step commits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from igpo.config import RolloutConfig

DREAM_EPS = 1e-3  # Dream's time grid ends here

Schedule = Callable[[int, int], list[int]]  # masked positions, steps -> commits of each step


def steps_per_block(length: int, cfg: RolloutConfig) -> int:
    """Denoise steps of a block of a completion of `length` tokens. Raises ValueError when the counts do not divide."""
    if cfg.block_length < 1 or length % cfg.block_length:
        divisors = [n for n in range(1, length + 1) if length % n == 0]
        raise ValueError(
            f"denoise: block_length must divide the {length} completion tokens, got {cfg.block_length}. "
            f"Choose one of {divisors}."
        )
    if cfg.unmask_schedule not in SCHEDULES:
        raise ValueError(
            f"denoise: unmask_schedule must be one of {sorted(SCHEDULES)}, got {cfg.unmask_schedule!r}."
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


def dream_schedule(masked: int, steps: int) -> list[int]:
    """Dream's numbers: floor(m (1 - s/t)) of the m still masked, t from 1 to 1e-3 in even steps; at last all."""
    counts = []
    for step in range(steps):
        now, then = (1 - (step + i) * (1 - DREAM_EPS) / steps for i in (0, 1))
        last = step == steps - 1
        counts.append(masked if last else int(masked * (1 - then / now)))
        masked -= counts[-1]
    return counts


SCHEDULES = {"even": transfer_schedule, "dream": dream_schedule}


def pseudo_order(length: int, rollout: RolloutConfig) -> Tensor:
    """(L,) int64: the step at which each position would be committed left to right by the schedule.

    Within a block, step s commits the next as many positions as the schedule gives to it.
    """
    steps = steps_per_block(length, rollout)
    counts = torch.tensor(SCHEDULES[rollout.unmask_schedule](rollout.block_length, steps))
    within = torch.arange(steps).repeat_interleave(counts)
    blocks = torch.arange(length // rollout.block_length)[:, None]
    return (within + steps * blocks).flatten()
