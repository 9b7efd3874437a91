"""What a verifier says about one completion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The judgement of one completion.

    correct: it solves the task.   score: in [0, 1]; 1 where correct, else the part that is right where the task has
    parts (cells of a Sudoku, tests of a program), or 0.   extracted: the answer as found, None when there is none.
    failure: why there is no judgement (then correct is False and score 0): "timeout", "memory", "crash", or None.
    """

    correct: bool
    score: float
    extracted: str | None = None
    failure: str | None = None

    @classmethod
    def of(cls, correct: bool, extracted: str | None) -> Verdict:
        """For tasks without parts."""
        return cls(correct, float(correct), extracted)


class ReferenceValueError(ValueError):
    """A reference (what the dataset says is right) is not what the task needs. Names the task and the value."""


def reference_error(task: str, rule: str, got: object) -> ReferenceValueError:
    text = repr(got)
    return ReferenceValueError(
        f"verify: the reference of task {task!r} must {rule}, got {text if len(text) <= 80 else text[:77] + '...'}."
    )
