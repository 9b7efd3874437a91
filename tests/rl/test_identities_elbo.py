"""Identities of the likelihood estimators, by listing every mask, order and sequence of a small model in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tables import TablePolicy, chain, chance, elbo, exhaustive, orders, rolled, sequences, subsets

from igpo.rl import likelihood as lk
from igpo.rl.likelihood.trajectory import _strata
from igpo.types import PolicyBatch, Seed

L = 3
SEED = Seed(9).at(1)
POLICY, OTHER = TablePolicy(L), TablePolicy(L, seed=1)
SAMPLERS = {
    "L/l": lk.by_count,
    "1/t": lk.by_ratio,
    "pairs": lk.in_pairs,
    "blocks": partial(lk.in_block, block_length=2),
}


def close(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0, check_dtype=False)


def batch_of(completion: torch.Tensor, draws) -> PolicyBatch:
    rollouts = rolled(completion)
    return PolicyBatch(rollouts.canvas, (tuple(draws),), completion, (), (None,), (None,))


def values(policy, completion: torch.Tensor, draws) -> torch.Tensor:
    return lk.evaluate(policy, batch_of(completion, draws), 0)


def in_pairs_exactly(policy, o):
    """F3: l ~ U{0..L}, weight (L+1)/l, the empty draw being 0."""
    return sum(
        (L * chance(S) / (L + 1)) * (L + 1) / int(S.sum()) * (policy.logp(o, S) * S).sum(1) for S in subsets(L)
    )  # fmt: skip


@torch.no_grad()
def test_forms_of_the_bound_are_equal() -> None:
    """F1 by quadrature over t, F2 and F3 by listing masks, F4 by listing orders; and our draws weighted by P(S)."""
    o = sequences(L)
    bound = elbo(POLICY, o)
    close(in_pairs_exactly(POLICY, o), bound)
    close(sum(chain(POLICY, o, order) for order in orders(L)) / math.factorial(L), bound)
    close(lk.add_up(values(POLICY, o, exhaustive(o)), exhaustive(o)).sum(1), bound)
    nodes, weights = np_legendre(12)
    by_t = 0.0
    for S in subsets(L):
        n = int(S.sum())
        mass = (weights * nodes ** (n - 1) * (1 - nodes) ** (L - n)).sum()
        by_t = by_t + mass * (POLICY.logp(o, S) * S).sum(1)
    close(by_t, bound, 1e-6)


def np_legendre(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@torch.no_grad()
def test_the_bound_is_below_the_likelihood_of_random_orders() -> None:
    o = sequences(L)
    chains = torch.stack([chain(POLICY, o, order) for order in orders(L)])
    true = chains.logsumexp(0) - math.log(len(chains))
    assert (elbo(POLICY, o) < true).all()
    independent = TablePolicy(L)
    independent.table.copy_(independent.table[:1].expand_as(independent.table))
    chains = torch.stack([chain(independent, o, order) for order in orders(L)])
    close(elbo(independent, o), chains.logsumexp(0) - math.log(len(chains)))
    assert true.exp().sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
@torch.no_grad()
def test_draws_are_unbiased_and_their_weights_have_mean_one(name: str) -> None:
    """4096 rows of one sequence, each with 4 stratified draws: within 5 standard errors."""
    length = 4
    policy = TablePolicy(length)
    o = torch.tensor([[0, 1, 1, 0]]).expand(4096, length)
    (update,) = lk.elbo(rolled(o), SEED, num_iterations=1, num_draws=4, sampler=SAMPLERS[name])
    weight = sum(draw.weight * draw.score for draw in update.draws)
    error = weight.std(0) / 64
    assert ((weight.mean(0) - 1).abs() < 5 * error).all(), weight.mean(0)
    found = lk.add_up(values(policy, o, update.draws), update.draws).sum(1)
    truth = elbo(policy, o[:1]) if name != "blocks" else of_blocks(policy, o[:1], 2)
    assert abs(found.mean() - truth.item()) < 5 * found.std() / 64


def of_blocks(policy, o, size: int):
    """Sum over blocks of the ELBO of the block: earlier blocks clean, later ones masked."""
    length, total = o.shape[1], 0.0
    for start in range(0, length, size):
        for S in subsets(size):
            hidden = torch.zeros(length, dtype=torch.bool)
            hidden[start : start + size] = S
            read = hidden.clone()
            hidden[start + size :] = True
            total = total + chance(S) * size / int(S.sum()) * (policy.logp(o, hidden) * read).sum(1)
    return total


@torch.no_grad()
def test_block_bound_has_the_bound_and_the_chain_as_its_ends() -> None:
    o = sequences(L)
    close(of_blocks(POLICY, o, L), elbo(POLICY, o))
    close(of_blocks(POLICY, o, 1), chain(POLICY, o, (0, 1, 2)))
    for draws in lk.elbo(
        rolled(o), SEED, num_iterations=1, num_draws=1, sampler=partial(lk.in_block, block_length=1)
    ):
        (draw,) = draws.draws
        assert (draw.score.sum(1) == 1).all()
        assert (draw.weight == L).all()
        for hidden, read in zip(draw.masked[:, 1:], draw.score, strict=True):
            assert torch.equal(hidden, torch.arange(L) >= read.nonzero().item())


@torch.no_grad()
def test_shared_draws_make_differences_quiet() -> None:
    o = torch.tensor([[0, 1, 1]]).expand(2000, L)
    near = TablePolicy(L)
    near.table.add_(0.05 * OTHER.table)
    one, two = (
        lk.elbo(rolled(o), SEED.named(n), num_iterations=1, num_draws=2, sampler=lk.by_count)[
            0
        ].draws
        for n in "ab"
    )
    bound = lambda policy, draws: lk.add_up(values(policy, o, draws), draws).sum(1)  # noqa: E731
    shared = bound(near, one) - bound(POLICY, one)
    apart = bound(near, one) - bound(POLICY, two)
    assert shared.var() < apart.var() / 20
    assert (bound(POLICY, one) - bound(POLICY, one) == 0).all()


@torch.no_grad()
def test_variances() -> None:
    """1/t is worse than L/l; complementary pairs never lose per token against two independent draws."""
    o = torch.tensor([[0, 1, 1, 0]]).expand(4000, 4)
    policy = TablePolicy(4)

    def estimate(sampler, draws: int, name: str = "v"):
        (update,) = lk.elbo(
            rolled(o), SEED.named(name), num_iterations=1, num_draws=draws, sampler=sampler
        )
        return lk.add_up(values(policy, o, update.draws), update.draws)

    by_ratio, by_count = (estimate(s, 1).sum(1).var() for s in (lk.by_ratio, lk.by_count))
    assert by_ratio > 2 * by_count
    assert (
        estimate(lk.by_count, 4).sum(1).var() < by_count / 4
    )  # strata: better than independent draws
    pair = estimate(lk.in_pairs, 1)
    single = lk.elbo(rolled(o), SEED, num_iterations=1, num_draws=1, sampler=lk.in_pairs)[0].draws
    halves = [2.0 * values(policy, o, single)[:, j] * draw.weight for j, draw in enumerate(single)]
    independent = 0.5 * (
        halves[0] + halves[1].roll(1, 0)
    )  # the complement of another row: independent
    assert (pair.var(0) <= independent.var(0)).all()


@torch.no_grad()
def test_upper_bound_is_above_and_grows_with_its_power() -> None:
    o = sequences(L)
    draws = exhaustive(o)
    x = values(POLICY, o, draws)
    found = [lk.bounds(x, draws, power=p).sum(-1) for p in (1e-6, 0.5, 1.0, 1.5, 2.0)]
    lower = elbo(POLICY, o)
    for pair in found:
        close(pair[:, 0], lower)
    upper = torch.stack([pair[:, 1] for pair in found])
    close(upper[0], lower, 1e-5)
    assert (upper.diff(dim=0) > 0).all()
    assert (upper[1:] >= lower).all()


@torch.no_grad()
def test_the_full_mask_is_the_draw_with_all_masked() -> None:
    o = sequences(L)
    rollouts = rolled(o)
    positions = torch.ones(o.shape, dtype=torch.bool)
    (full,) = lk.by_count(rollouts, positions, torch.full((len(o),), 0.999), SEED)
    (mean_field,) = lk.mean_field(rollouts, SEED, num_iterations=1)
    assert torch.equal(full.masked, mean_field.draws[0].masked)
    assert (full.weight == 1).all()
    (one_run,) = lk.slices(rollouts, SEED, num_iterations=1, shrink=L, steps_per_block=L)
    assert torch.equal(one_run.draws[0].masked, full.masked)
    assert one_run.draws[0].score.all()
    slow = [lk.two_mean_field(rollouts, SEED.named(str(i)), num_iterations=1)[0] for i in range(8)]
    early = torch.stack([update.draws[1].step == 0 for update in slow])
    assert early.any()
    for update, rows in zip(slow, early, strict=True):
        got = lk.add_up(values(POLICY, o, update.draws), update.draws)
        close(got[rows], POLICY.logp(o, positions[0])[rows])
        differs = update.draws[1].score.any(1)
        assert (got[differs] != POLICY.logp(o, positions[0])[differs]).any(1).all()


@torch.no_grad()
def test_single_steps_are_the_trajectory() -> None:
    o, order = sequences(L), torch.tensor([2, 0, 1])
    rollouts = rolled(o, order.expand(len(o), L))
    (update,) = lk.slices(rollouts, SEED, num_iterations=1, shrink=1, steps_per_block=L)
    total = lk.add_up(values(POLICY, o, update.draws), update.draws).sum(1)
    close(total, chain(POLICY, o, (1, 2, 0)))
    assert (update.weight == 1).all()


@torch.no_grad()
def test_coupled_reads_every_token_twice_and_weighs_it_one_and_a_half() -> None:
    constant = TablePolicy(4, scale=0.0)
    o = sequences(4).repeat(64, 1)
    (update,) = lk.coupled(rolled(o), SEED, num_iterations=1)
    full, one, two = update.draws
    assert full.score.all()
    assert torch.equal(one.score, ~two.score)
    found = lk.add_up(values(constant, o, update.draws), update.draws)
    standard_error = found.std() / math.sqrt(found.numel())
    assert abs(found.mean() - 1.5 * math.log(0.5)) < 5 * standard_error


def test_strata_are_uniform_and_their_mean_quiet() -> None:
    draws = torch.stack([_strata(12, SEED.generator(row)) for row in range(4000)])
    assert draws.mean(0).sub(0.5).abs().max() < 5 * math.sqrt(1 / 12 / 4000)
    assert draws.var(0).sub(1 / 12).abs().max() < 0.01
    assert draws.mean(1).var() < (1 / 12 / 12) / 10
