"""The gradient of an inner update, in memory that does not grow with the number of Monte Carlo draws.

A loss is a function of the log-probs x_j (B, L) of J draws. Three ways to its gradient, equal up to rounding:

    one graph       J draws of a micro-batch in one autograd graph: J times the memory, no extra forward
    draw by draw    a loss that is a sum over draws: forward and backward of one draw at a time
    two passes      any loss: all x_j without a graph; c_j = dloss/dx_j; then forward and backward of c_j . x_j for one
                    draw at a time. One extra forward per draw, saved while the policy is still the old one.

Source: the chain rule; arXiv:2510.11683 (BGPO) bounds the loss to make it a sum over draws instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from igpo.ranks import ranks
from igpo.types import Metrics, Policy, PolicyBatch, take

from .likelihood import Likelihood, evaluate
from .objective import Objective


class Scored(Protocol):
    """What of an algorithm the gradient depends on."""

    @property
    def likelihood(self) -> Likelihood: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def constant_memory(self) -> bool: ...


def accumulate(
    algorithm: Scored, policy: Policy, batch: PolicyBatch, advantages: Tensor, inner: int, rows: Tensor,
    size: int,
) -> Iterator[tuple[float, Metrics]]:  # fmt: skip
    """Adds the gradient of the batch's loss that comes from `rows`, `size` rows at a time.

    The loss is a sum over rows by a divisor of the whole batch, so `size` only sets the memory needed. Yields the loss
    and the metrics of each part as it is done; they add up to those of the batch. Where several processes train, each
    does its share of the rows, and what it adds and yields is a share too.
    """
    needs, several = algorithm.objective.needs, len(batch.draws[inner]) > 1
    apart = several and algorithm.constant_memory
    if needs.groups or (apart and not needs.separable):
        yield _two_passes(algorithm, policy, batch, advantages, inner, rows, size)
        return
    divisor = algorithm.objective.divisor(batch, rows, inner)
    for part in ranks().parts(rows, size):
        whole = (take(batch, part), advantages[part])
        for some, weights in _of_draws(*whole, inner) if apart else [whole]:
            value = algorithm.likelihood(policy, some, inner)
            loss, found = algorithm.objective(value, some, weights, inner, divisor)
            loss.backward()
            yield float(loss.detach()), found


def _two_passes(
    algorithm: Scored, policy: Policy, batch: PolicyBatch, advantages: Tensor, inner: int, rows: Tensor,
    size: int,
) -> tuple[float, Metrics]:  # fmt: skip
    some = take(batch, rows)
    if inner == 0 and some.first is not None:
        logprob = some.first.clone()
    else:
        logprob = _without_graph(algorithm, policy, some, inner, size)
    logprob.requires_grad_()
    value = algorithm.likelihood.combine(logprob, some.draws[inner])
    divisor = algorithm.objective.divisor(batch, rows, inner)
    loss, found = algorithm.objective(value, some, advantages[rows], inner, divisor)
    (coefficient,) = torch.autograd.grad(loss, logprob)
    _pull_back(algorithm, policy, some, inner, coefficient, size)
    # every process has all of the loss
    return (float(loss.detach()), found) if ranks().first else (0.0, {})


@torch.no_grad()
def _without_graph(
    algorithm: Scored, policy: Policy, batch: PolicyBatch, inner: int, size: int
) -> Tensor:
    rows = torch.arange(len(batch.targets), device=batch.targets.device)
    temperature = algorithm.likelihood.temperature

    def of(part: Tensor) -> tuple[Tensor]:
        return (evaluate(policy, take(batch, part), inner, temperature),)

    return ranks().by_rows(of, rows, size)[0]


def _pull_back(
    algorithm: Scored,
    policy: Policy,
    batch: PolicyBatch,
    inner: int,
    coefficient: Tensor,
    size: int,
) -> None:
    """Adds the gradient of sum(coefficient * x) by the parameters, one draw of `size` rows at a time.

    coefficient: (B, J, L). A row of a draw whose coefficients are all 0 is not forwarded, but for one if all are.
    """
    matters = coefficient.ne(0).any(-1)  # (B, J)
    if not bool(matters.any()):
        matters = torch.zeros_like(matters).index_fill(
            0, torch.tensor(0, device=matters.device), True
        )
        matters[:, 1:] = False
    for j in range(matters.shape[1]):
        for part in ranks().parts(matters[:, j].nonzero()[:, 0], size):
            draw = _only(take(batch, part), inner, slice(j, j + 1))
            value = evaluate(policy, draw, inner, algorithm.likelihood.temperature)[:, 0]
            (value * coefficient[part, j]).sum().backward()


def _of_draws(
    batch: PolicyBatch, advantages: Tensor, inner: int
) -> Iterator[tuple[PolicyBatch, Tensor]]:
    """The batch with one of its draws, for each that scores anything; the first, if none does."""
    draws = batch.draws[inner]
    scoring = [j for j, draw in enumerate(draws) if bool(draw.score.any())] or [0]
    for j in scoring:
        where = slice(j, j + 1)
        each = advantages.dim() == 3 and advantages.shape[1] == len(draws)
        yield _only(batch, inner, where), advantages[:, where] if each else advantages


def _only(batch: PolicyBatch, inner: int, where: slice) -> PolicyBatch:
    """The batch with some draws of the inner update; values that keep draws apart (B, J, L) are cut to them."""

    def cut(values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        if not values or (mine := values[inner]) is None or mine.dim() < 3:
            return values
        return (*values[:inner], mine[:, where], *values[inner + 1 :])

    draws = (*batch.draws[:inner], batch.draws[inner][where], *batch.draws[inner + 1 :])
    return replace(
        batch, draws=draws, token_mask=cut(batch.token_mask), old_logprob=cut(batch.old_logprob),
        ref_logprob=cut(batch.ref_logprob), weight=cut(batch.weight),
    )  # fmt: skip
