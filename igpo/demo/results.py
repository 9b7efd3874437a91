"""What an arm of the demo leaves behind: plain values, written as JSON and read by the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """The state of an arm after `step` training steps.

    rollouts: completions sampled so far, inpainted ones included.   forwards: sequences x model calls so far, training
    included.   reward: mean over the step's groups before any rescue.   all_wrong: fraction of its groups without a
    correct completion, before any rescue.   accuracy: held-out, None between evaluations.
    """

    step: int
    rollouts: int
    forwards: int
    seconds: float
    reward: float
    all_wrong: float
    accuracy: float | None = None


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

    before, after: held-out accuracy at temperature 0.   all_wrong_before, all_wrong_after: all-wrong fraction of groups
    of held-out problems at the training temperature.   hint_success: fraction of inpainted rollouts that verified
    correct, None for arms without any.
    """

    name: str
    before: float
    after: float
    all_wrong_before: float
    all_wrong_after: float
    hint_success: float | None
    points: tuple[Point, ...]
    frames: tuple[Frame, ...] = field(default=())

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
            "rollouts": self.rollouts,
            "forwards": self.forwards,
            "seconds": round(self.seconds, 1),
            "points": points,
        }
