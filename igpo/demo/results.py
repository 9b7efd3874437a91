"""What an arm of the demo leaves behind: plain values, written as JSON and read by the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """The state of an arm after `step` training steps.

    rollouts: completions sampled so far, those around hints included.   forwards: sequences x model calls spent on
    them.   reward: mean over the step's completions before any rescue.   all_wrong: fraction of the step's groups
    without a correct completion, before any rescue; unrescued: after it, the groups that taught nothing.   accuracy:
    held-out, None between evaluations.
    """

    step: int
    rollouts: int
    forwards: int
    seconds: float
    reward: float
    all_wrong: float
    unrescued: float
    accuracy: float | None = None


def over_steps(values: Sequence[float]) -> float:
    """Mean over the training steps of one value per point: the first point, before any step, is left out."""
    return sum(values[1:]) / max(1, len(values) - 1)


@dataclass(frozen=True)
class Frame:
    """A finished completion with its history: the step that wrote each token (-1: a hint), and the verdict."""

    prompt: str
    tokens: tuple[str, ...]
    step_map: tuple[int, ...]
    correct: bool
    title: str


@dataclass(frozen=True)
class ArmResult:
    """One arm, one seed.

    before, after: held-out accuracy at temperature 0.   all_wrong_before, all_wrong_after: fraction of held-out groups
    without a correct completion, at the training temperature.   all_wrong, unrescued: of the training groups, mean over
    all steps.   hint_success: fraction of second attempts that verified correct, None for arms without any.
    """

    name: str
    before: float
    after: float
    all_wrong_before: float
    all_wrong_after: float
    hint_success: float | None
    hint_lift: float | None
    points: tuple[Point, ...]
    frames: tuple[Frame, ...] = field(default=())

    @property
    def all_wrong(self) -> float:
        return over_steps([p.all_wrong for p in self.points])

    @property
    def unrescued(self) -> float:
        return over_steps([p.unrescued for p in self.points])

    @property
    def rollouts(self) -> int:
        return self.points[-1].rollouts if self.points else 0

    @property
    def forwards(self) -> int:
        return self.points[-1].forwards if self.points else 0

    @property
    def seconds(self) -> float:
        return self.points[-1].seconds if self.points else 0.0

    def summary(self) -> dict[str, Any]:
        """The arm's entry in summary.json."""
        head = asdict(self)
        points = head.pop("points")
        head.pop("frames")
        return {
            **head,
            "all_wrong": self.all_wrong,
            "unrescued": self.unrescued,
            "rollouts": self.rollouts,
            "forwards": self.forwards,
            "seconds": round(self.seconds, 1),
            "points": points,
        }
