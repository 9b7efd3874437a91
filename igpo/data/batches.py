"""Which problems a training step gets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from igpo.types import Prompt, Seed

from .sources import DataError


class Batches:
    """Which problems a step gets. Every epoch is a fresh permutation cut into whole steps, so that no step holds a
    problem twice; the fewer than prompts_per_step problems left over sit out that epoch."""

    def __init__(self, prompts: Sequence[Prompt], prompts_per_step: int, seed: Seed) -> None:
        if not 1 <= prompts_per_step <= len(prompts):
            raise DataError(
                f"prompts_per_step must be in 1..{len(prompts)} (the number of problems), got {prompts_per_step}."
            )
        self.prompts, self.size, self.seed = prompts, prompts_per_step, seed.named("data")
        self.steps_per_epoch = len(prompts) // prompts_per_step
        self._order = lru_cache(maxsize=1)(self._permutation)

    def at(self, step: int) -> list[Prompt]:
        """The problems of a step: a function of (seed, step) alone, so that a run can be resumed."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[place * self.size : (place + 1) * self.size]
        return [self.prompts[row] for row in rows]

    def _permutation(self, epoch: int) -> list[int]:
        return self.seed.at(epoch).generator().permutation(len(self.prompts)).tolist()


def batches(prompts: Sequence[Prompt], prompts_per_step: int, seed: Seed) -> Batches:
    """Raises DataError when there are fewer problems than prompts_per_step."""
    return Batches(prompts, prompts_per_step, seed)
