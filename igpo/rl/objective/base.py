"""What every objective is: its needs, which the trainer reads, and what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from igpo.types import Metrics, PolicyBatch


class Divisor(NamedTuple):
    """size: for the loss.   tokens: for the metrics, which are means over the loss's tokens.   draws: J.   used: the
    share of a token budget that the batch fills."""

    size: float
    tokens: float
    draws: int = 1
    used: float = 1.0


@dataclass(frozen=True)
class Needs:
    """What is evaluated for an objective, and nothing more.

    old, reference: values under the old policy and the reference.   level: "token" (a value's entries are log-probs of
    tokens), or "sequence" (only their sum has a meaning).   draws: the values it takes: "sum" (B, L) or "apart"
    (B, J, L); or the pairs of values (B, 2, L) "halves" and "bounds".   separable: the loss is a sum over draws, each
    of which can be back-propagated by itself.   groups: the loss of a row depends on other rows of its group.
    """

    old: bool
    reference: bool
    level: str = "token"
    draws: str = "sum"
    separable: bool = False
    groups: bool = False


class Objective(Protocol):
    """From values and advantages to a loss; a loss of rows is a share of the loss of the batch."""

    @property
    def needs(self) -> Needs: ...

    def rows(self, advantages: Tensor) -> Tensor:
        """(N,) int64: the rows to evaluate; the others have neither loss nor gradient."""
        ...

    def divisor(self, batch: PolicyBatch, rows: Tensor, inner: int) -> Divisor:
        """What the sums over `rows` of a batch are divided by."""
        ...

    def __call__(
        self, logprob: Tensor, batch: PolicyBatch, advantages: Tensor, inner: int, divisor: Divisor
    ) -> tuple[Tensor, Metrics]:
        """The loss of these rows, with gradient in logprob, and its metrics; both add up over micro-batches."""
        ...


def all_rows(advantages: Tensor) -> Tensor:
    return torch.arange(len(advantages), device=advantages.device)


def rows_with_advantage(advantages: Tensor) -> Tensor:
    """The rows whose advantage is not 0 throughout, or one row when there are none: an update of gradient 0 is an
    update."""
    everything = all_rows(advantages)
    found = everything[
        advantages.flatten(1).ne(0).any(1) if advantages.dim() > 1 else advantages != 0
    ]
    return found if found.numel() else everything[:1]


def divergence(kind: str, logprob: Tensor, other: Tensor) -> Tensor:
    """The estimates k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d of KL(pi || other), with d = logprob - other, elementwise.

    Source: Schulman, "Approximating KL divergence", 2020.
    """
    delta = logprob - other
    if kind == "k1":
        return delta
    return delta.square() / 2 if kind == "k2" else torch.expm1(-delta) + delta
