"""The three ways to a gradient: equal, and in memory that does not grow with the draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from igpo.rl.algorithms import Algorithm
from igpo.rl.explorer import no_exploration
from igpo.rl.gradient import accumulate
from igpo.rl.likelihood import Likelihood, add_up, evaluate, keep_apart, mean_field, step_map
from igpo.rl.objective import Clipped, Divisor, Needs
from igpo.types import PolicyBatch, Seed

SEED = Seed(5).at(1)


@dataclass(frozen=True)
class Surprise:
    """A loss with every coupling there is: exp of the mean over draws, times the group's sum; or a sum over draws."""

    kind: str  # draws | rows | groups

    @property
    def needs(self) -> Needs:
        return Needs(
            True, False, draws="apart", separable=self.kind == "draws", groups=self.kind == "groups"
        )

    def rows(self, advantages):
        return torch.arange(len(advantages))

    def divisor(self, batch: PolicyBatch, rows, inner: int) -> Divisor:
        return Divisor(float(len(batch.targets)), 1.0)

    def __call__(self, logprob, batch, advantages, inner, divisor):
        old = batch.old_logprob[inner]
        old = logprob.detach() if old is None else old
        change = (logprob - old).sum(-1) / logprob.shape[-1]  # (B, J)
        if self.kind == "draws":
            terms = (change.exp() * advantages[:, None]).sum()
        elif self.kind == "rows":
            terms = (change.mean(1).exp() * advantages).sum()
        else:
            terms = (change.mean(1).exp() * advantages).sum() ** 2
        return -terms / divisor.size, {"rows": float(len(logprob))}


def built(objective, *, constant_memory: bool, num_iterations: int = 2, num_slices: int = 5):
    likelihood = Likelihood(
        partial(step_map, num_iterations=num_iterations, num_slices=num_slices),
        num_iterations, needs_reference=False, entropy_filter=1.0, mask_after_eos=False, batch_size=7,
        combine=keep_apart if objective.needs.draws == "apart" else add_up,
    )  # fmt: skip
    return Algorithm(no_exploration, len, likelihood, objective, constant_memory)  # type: ignore[arg-type]


def clipped(ratio: str, beta: float = 0.0) -> Clipped:
    return Clipped(0.2, 0.2, ratio, beta, "k3", "grpo")


OBJECTIVES = {
    **{kind: Surprise(kind) for kind in ("draws", "rows", "groups")},
    **{f"clip {ratio}": clipped(ratio) for ratio in ("token", "sequence")},
}


def graded(toy, count: int = 3):
    rollouts = toy.rolled(toy.canvas(toy.prompts(count)))
    size = len(rollouts.tokens)
    return toy.graded(rollouts, torch.arange(size) % 3 == 0)


def gradient(toy, algorithm: Algorithm, *, inner: int, size: int, moved: bool = True):
    """loss, metrics and gradient of one inner update, after the policy moved away from the old one."""
    policy, batch = toy.Policy(dtype=torch.float64), graded(toy)
    prepared = algorithm.likelihood.prepare(policy, batch, SEED)
    if moved:
        with torch.no_grad():
            policy.mix.add_(0.01 * torch.linspace(-1, 1, policy.mix.numel()).view_as(policy.mix))
    advantages = torch.linspace(-1, 1, 12, dtype=torch.float64)
    policy.forwards.clear()
    rows = algorithm.objective.rows(advantages)
    parts = list(accumulate(algorithm, policy, prepared, advantages, inner, rows, size))
    total = sum(loss for loss, _ in parts)
    found = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return total, found, sum(len(tokens) for tokens in policy.forwards)


@pytest.mark.parametrize("size", [12, 5, 1])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_way_gives_the_gradient_of_the_whole_graph(toy, name: str, size: int) -> None:
    objective = OBJECTIVES[name]
    truth = built(objective, constant_memory=False)
    loss, whole, _ = gradient(toy, truth, inner=1, size=12)
    if objective.needs.groups:  # two passes here too: the graph by hand
        policy, batch = toy.Policy(dtype=torch.float64), graded(toy)
        prepared = truth.likelihood.prepare(policy, batch, SEED)
        with torch.no_grad():
            policy.mix.add_(0.01 * torch.linspace(-1, 1, policy.mix.numel()).view_as(policy.mix))
        value, _ = objective(
            truth.likelihood(policy, prepared, 1), prepared,
            torch.linspace(-1, 1, 12, dtype=torch.float64), 1, Divisor(12.0, 1.0),
        )  # fmt: skip
        value.backward()
        loss, whole = value.item(), torch.cat([p.grad.flatten() for p in policy.parameters()])
    got, found, _ = gradient(toy, built(objective, constant_memory=True), inner=1, size=size)
    assert whole.abs().max() > 1e-5
    assert got == pytest.approx(loss, abs=1e-13)
    torch.testing.assert_close(found, whole, atol=1e-13, rtol=1e-10)


def test_forwards_of_each_way(toy) -> None:
    """12 rows, 5 slices: the second pass costs as much again, but not while the policy is the old one."""
    counts = {
        (name, inner): gradient(
            toy, built(OBJECTIVES[name], constant_memory=True), inner=inner, size=5, moved=False
        )[2]
        for name in ("draws", "rows")
        for inner in (0, 1)
    }
    assert counts == {("draws", 0): 60, ("draws", 1): 60, ("rows", 0): 60, ("rows", 1): 120}


def test_a_loss_without_a_gradient_still_leaves_one(toy) -> None:
    policy, batch = toy.Policy(dtype=torch.float64), graded(toy)
    algorithm = built(Surprise("rows"), constant_memory=True)
    prepared = algorithm.likelihood.prepare(policy, batch, SEED)
    policy.forwards.clear()
    nothing = torch.zeros(12, dtype=torch.float64)
    list(accumulate(algorithm, policy, prepared, nothing, 0, torch.arange(12), 5))
    assert (policy.weight.grad == 0).all()
    assert [len(tokens) for tokens in policy.forwards] == [1]


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("old", [True, False])
def test_nothing_is_evaluated_that_the_objective_does_not_ask_for(
    toy, old: bool, num_iterations: int
) -> None:
    policy, batch = toy.Policy(), graded(toy)
    likelihood = Likelihood(
        partial(mean_field, num_iterations=num_iterations), num_iterations, needs_reference=False,
        entropy_filter=1.0, mask_after_eos=False, batch_size=12, needs_old=old,
    )  # fmt: skip
    prepared = likelihood.prepare(policy, batch, SEED)
    evaluated = old and num_iterations > 1
    assert len(policy.forwards) == evaluated
    assert (prepared.old_logprob[0] is not None) == evaluated


def peak_bytes(work) -> int:
    """The most memory that torch's CPU allocator held at once for `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.cumsum(0).max())


@pytest.mark.parametrize("name", ["draws", "rows", "clip sequence"])
def test_peak_memory_does_not_grow_with_the_draws(toy, name: str) -> None:
    def peak(num_slices: int, constant_memory: bool) -> int:
        policy, batch = toy.Policy(width=512), graded(toy)
        algorithm = built(
            OBJECTIVES[name], constant_memory=constant_memory, num_slices=num_slices, num_iterations=1
        )  # fmt: skip
        prepared = algorithm.likelihood.prepare(policy, batch, SEED)
        advantages = torch.linspace(-1, 1, 12)

        def work() -> None:
            list(accumulate(algorithm, policy, prepared, advantages, 0, torch.arange(12), 12))

        work()  # the gradients themselves are allocated once
        return peak_bytes(work)

    few, many = peak(2, True), peak(8, True)
    assert many < 1.1 * few
    assert peak(8, False) > 2.5 * peak(2, False)


def test_no_logits_of_all_positions(toy) -> None:
    """2048 tokens, 4096 words: scoring and its gradient stay below the 33.5 MB of logits, whichever backend runs."""
    rollouts = toy.rolled(toy.canvas(toy.prompts(8), 16))
    size, words = len(rollouts.tokens), 4096
    policy, batch = toy.Policy(), toy.graded(rollouts, torch.arange(size) % 3 == 0)
    policy.weight = nn.Parameter(torch.randn(words, 10))
    policy.bias = nn.Parameter(torch.zeros(words))
    algorithm = built(clipped("token"), constant_memory=True, num_slices=1, num_iterations=1)
    prepared = algorithm.likelihood.prepare(policy, batch, SEED)
    rows, advantages = torch.arange(size), torch.linspace(-1, 1, size)

    def work() -> None:
        list(accumulate(algorithm, policy, prepared, advantages, 0, rows, size))

    assert evaluate(policy, prepared, 0).shape == (size, 1, toy.length)
    work()
    assert peak_bytes(work) < 0.8 * size * toy.length * words * 4


def test_draws_that_updates_share_are_evaluated_once(toy) -> None:
    policy, batch = toy.Policy(), graded(toy)
    full = mean_field(batch.rollouts, SEED, num_iterations=1)[0]

    def shared(rollouts, seed):
        own = step_map(rollouts, seed, num_iterations=3, num_slices=2)
        return [replace(update, draws=(*full.draws, *update.draws)) for update in own]

    likelihood = Likelihood(
        shared, 3, needs_reference=False, entropy_filter=1.0, mask_after_eos=False, batch_size=12
    )
    likelihood.prepare(policy, batch, SEED)
    assert len(policy.forwards) == 1 + 3 * 2
