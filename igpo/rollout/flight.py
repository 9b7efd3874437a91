"""Rows in flight: where each of them stands, and which of them work at a step. On the host alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass
class InFlight:
    """A row that is being denoised.

    block: the one it is at.   step: of the block.   left: masked positions of the block.   schedule: commits of each
    step.   ready: False while it waits for something else than a commit (BlockCache).
    """

    row: int
    block: int
    left: int
    schedule: list[int]
    step: int = 0
    ready: bool = True

    @property
    def quota(self) -> int:
        return self.schedule[self.step] if self.step < len(self.schedule) else 0

    @property
    def remaining(self) -> list[int]:
        """Positions the schedule leaves masked after each step."""
        return [sum(self.schedule[step + 1 :]) for step in range(len(self.schedule))]

    def standing(self) -> tuple[bool, int, int, int, int]:
        """Sorts those that work first, the most masked positions first."""
        return not (self.ready and self.left), -self.left, -self.quota, self.block, self.step

    def advance(self, *, counted: bool) -> None:
        """After a step; counted: it committed what the schedule says."""
        if self.ready and self.step < len(self.schedule):
            self.left -= self.quota if counted else 0
            self.step += 1


@dataclass(frozen=True)
class Part:
    """Rows [first, last) of the working order, which stand alike: the same masked positions, block and step.

    quota: commits by the schedule.   tick: the step of the whole rollout.
    """

    first: int
    last: int
    left: int
    quota: int
    block: int
    step: int
    tick: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)


def working(live: Sequence[InFlight], steps: int, *, counted: bool) -> list[Part]:
    """The parts that work at this step, of rows in the order of their standing when the round began.

    counted: what the schedule gives nothing sits out. Else every row with masked positions works.
    """
    parts, first = [], 0
    for (idle, left, quota, block, step), run in groupby(live, key=InFlight.standing):
        last = first + len(list(run))
        if not idle and (quota or not counted):
            parts.append(Part(first, last, -left, -quota, block, step, block * steps + step))
        first = last
    return parts
