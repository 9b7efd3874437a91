"""Identities of objectives and advantages, by listing sequences of a small model in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tables import TablePolicy, chain, elbo, exhaustive, graded, orders, rolled, sequences

from igpo.rl import likelihood as lk
from igpo.rl import objective as ob
from igpo.rl.advantage import centred, softmax_difference
from igpo.rl.reweigh import target_weights
from igpo.types import PolicyBatch, Seed

L = 3
SEED = Seed(9).at(1)
REWARDS = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0, 0.0, 0.25, -0.5], dtype=torch.float64)


def batch_of(
    o, draws, *, old=None, ref=None, combine=lk.add_up, weight=None, groups=1
) -> PolicyBatch:
    """old, ref: policies."""
    canvas = rolled(o, groups=groups).canvas
    batch = PolicyBatch(canvas, (tuple(draws),), o, (), (None,), (None,), (weight,))
    made = []
    for policy in (old, ref):
        with torch.no_grad():
            made.append(None if policy is None else combine(lk.evaluate(policy, batch, 0), draws))
    mask = torch.ones(o.shape, dtype=torch.bool)
    if combine is lk.keep_apart:
        mask = mask[:, None] & torch.stack([draw.score for draw in draws], 1)
    return replace(batch, token_mask=(mask,), old_logprob=(made[0],), ref_logprob=(made[1],))


def loss_of(objective, policy, batch, advantages, combine=lk.add_up):
    value = combine(lk.evaluate(policy, batch, 0), batch.draws[0])
    divisor = objective.divisor(batch, torch.arange(len(batch.targets)), 0)
    return objective(value, batch, advantages, 0, divisor)[0]


def gradient(loss, policy):
    return torch.autograd.grad(loss, policy.table)[0]


def close(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0, check_dtype=False)


def near(policy: TablePolicy, scale: float) -> TablePolicy:
    moved = TablePolicy(L)
    with torch.no_grad():
        moved.table.copy_(policy.table + scale * TablePolicy(L, seed=5).table)
    return moved


def all_trajectories():
    """Every order with every sequence: completions (48, 3), step maps, and log-probabilities given a policy."""
    o = sequences(L).repeat(math.factorial(L), 1)
    order = [perm for perm in orders(L) for _ in range(2**L)]
    step_map = torch.stack([torch.tensor(perm).argsort() for perm in order])

    def logp(policy):
        parts = [chain(policy, sequences(L), perm) for perm in orders(L)]
        return torch.cat(parts) - math.log(math.factorial(L))

    return o, step_map, logp


@pytest.mark.parametrize("proposal", ["uniform", "entropy"])
def test_agrpo_is_the_policy_gradient(proposal: str) -> None:
    """m times its expected gradient is that of E[r] under random unmasking. Three strata of a uniform q are the three
    steps; draws of another q are weighted by it."""
    policy, (o, step_map, logp) = TablePolicy(L), all_trajectories()
    rewards = REWARDS.repeat(6)
    truth = gradient((logp(policy).exp() * rewards).sum(), policy)
    probability = logp(policy).exp().detach()
    entropy = torch.rand(len(o), L, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rollouts = replace(rolled(o, step_map), commit_entropy=entropy + 0.2)
    advantages, found = rewards * probability * len(o), []
    for copy in range(1 if proposal == "uniform" else 40):
        (update,) = lk.step_mc(
            rollouts, SEED.named(str(copy)), num_iterations=1, num_draws=L, proposal=proposal
        )
        objective = ob.ClippedDraws(0.2, 0.2, 0.0, "k3")
        batch = batch_of(o, update.draws, combine=lk.keep_apart, weight=update.weight)
        loss = loss_of(objective, policy, batch, advantages, lk.keep_apart)
        found.append(-L * gradient(loss, policy))
    mean = torch.stack(found).mean(0)
    if proposal == "uniform":
        close(mean, truth, 1e-7)  # weights are float32
        return
    error = torch.stack(found).std(0) / math.sqrt(40)
    assert ((mean - truth).abs() <= 5 * error + 1e-7).all()
    assert (mean - truth).norm() < 0.1 * truth.norm()


def test_entropy_proposal_weighs_by_its_chance() -> None:
    entropy = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)
    rollouts = replace(rolled(torch.tensor([[0, 1, 0]])), commit_entropy=entropy)
    (update,) = lk.step_mc(rollouts, SEED, num_iterations=1, num_draws=50, proposal="entropy")
    for draw, weight in zip(update.draws, update.weight[0, :, 0], strict=True):
        q = entropy[0, int(draw.step)] / entropy.sum()
        assert weight.item() == pytest.approx(1 / (3 * q.item() * 50), rel=1e-6)
    counts = torch.stack([draw.step[0] for draw in update.draws]).bincount(minlength=3)
    assert counts.sub(50 * entropy[0]).abs().max() <= 1.0  # strata


def test_elbo_and_mean_field_policy_gradients_are_biased() -> None:
    policy, (o, _, logp) = TablePolicy(L), all_trajectories()
    rewards, weight = REWARDS.repeat(6), logp(policy).exp().detach()
    truth = gradient((logp(policy).exp() * rewards).sum(), policy)
    everything = torch.ones(L, dtype=torch.bool)
    errors = {}
    for name, value in (
        ("elbo", elbo(policy, o)),
        ("mean-field", policy.logp(o, everything).sum(1)),
    ):
        found = gradient((weight * rewards * value).sum(), policy)
        errors[name] = float((found - truth).norm() / truth.norm())
    assert 0.01 < errors["elbo"] < errors["mean-field"]


@pytest.mark.parametrize("advantage", [2.0, -1.0])
def test_bgpo_is_the_elbo_ratio_on_policy_and_below_it_off_policy(advantage: float) -> None:
    policy, o = TablePolicy(L), sequences(L)
    draws, A = exhaustive(o)[:4], torch.full((len(sequences(L)),), advantage, dtype=torch.float64)
    objective = ob.Boundary()

    def ratio_objective(new, old):
        d = lk.add_up(
            lk.evaluate(new, batch_of(o, draws), 0) - lk.evaluate(old, batch_of(o, draws), 0), draws
        )
        return (d.sum(1).exp() * A).mean()

    batch = batch_of(o, draws, old=policy, combine=lk.keep_apart)
    bound = -loss_of(objective, policy, batch, A, lk.keep_apart)
    frozen = near(policy, 0.0)
    assert bound.item() == pytest.approx(advantage, abs=1e-12)
    close(gradient(bound, policy), gradient(ratio_objective(policy, frozen), policy))
    for scale in (0.1, 0.5, 2.0):
        moved = near(policy, scale)
        lower = -loss_of(objective, moved, batch, A, lk.keep_apart)
        assert lower <= ratio_objective(moved, policy) + 1e-12


def test_bgpo_gradient_is_length_times_espo() -> None:
    policy, o = TablePolicy(L), sequences(L)
    draws, A = exhaustive(o), REWARDS - REWARDS.mean()
    espo = ob.Clipped(0.2, 0.2, "sequence", 0.0, "k2", "grpo")
    one = loss_of(espo, policy, batch_of(o, draws, old=policy), A)
    other = loss_of(
        ob.Boundary(),
        policy,
        batch_of(o, draws, old=policy, combine=lk.keep_apart),
        A,
        lk.keep_apart,
    )
    close(gradient(other, policy), L * gradient(one, policy))


def test_spg_with_equal_bounds_is_reinforce() -> None:
    policy, o = TablePolicy(L), sequences(L)
    draws, A = exhaustive(o), REWARDS - REWARDS.mean()
    combine = lambda x, d: lk.bounds(x, d, power=1.5)  # noqa: E731
    batch = batch_of(o, draws)
    reinforce = -(A * elbo(policy, o)).sum() / o.numel()
    lower = loss_of(ob.Sandwich(0.0), policy, batch, A, combine)
    close(gradient(lower, policy), gradient(reinforce, policy))
    upper = loss_of(ob.Sandwich(1.0), policy, batch, A, combine)
    value = combine(lk.evaluate(policy, batch, 0), draws).sum(-1)
    by_hand = -(A * torch.where(A >= 0, value[:, 0], value[:, 1])).sum() / o.numel()
    close(upper, by_hand)
    good = A.clamp(min=0)
    losses = [loss_of(ob.Sandwich(m), policy, batch, good, combine).item() for m in (0.0, 1.0)]
    assert losses[0] == losses[1]  # the upper bound is of bad completions only


def test_wd1_weights() -> None:
    r = torch.tensor([1.0, 0, 0, 1, 0, 0])
    o = sequences(L)[:6]
    found = softmax_difference(graded(rolled(o), r))
    close(found, torch.tensor([0.21038, -0.10519, -0.10519, 0.21038, -0.10519, -0.10519]), 1e-5)
    assert abs(found.sum()) < 1e-7
    assert (softmax_difference(graded(rolled(o), torch.full((6,), 0.3))) == 0).all()
    two = torch.cat([r[:3], r[3:] * 5])
    whole = softmax_difference(graded(rolled(o, groups=2), two), psi=0.7)
    parts = [
        softmax_difference(graded(rolled(o[:3]), part), psi=0.7) for part in (two[:3], two[3:])
    ]
    close(whole, torch.cat(parts))


def test_dmpo_weights_are_wd1s_when_reference_and_sampler_agree() -> None:
    o, policy = sequences(L), TablePolicy(L)
    mine = graded(rolled(o), REWARDS.float())
    batch = batch_of(o, exhaustive(o), old=policy, ref=policy)

    def weights(batch, baseline="negative"):
        return target_weights(mine, batch, mine.rewards, 0, alpha=1.0, baseline=baseline)

    close(weights(batch), softmax_difference(mine), 1e-6)
    moved = batch_of(o, exhaustive(o), old=policy, ref=TablePolicy(L, seed=1))
    assert weights(moved).sum() == pytest.approx(0, abs=1e-6)
    assert weights(moved, baseline="group").sum() == pytest.approx(0, abs=1e-6)
    bare = weights(moved, baseline="none")
    assert bare.sum() == pytest.approx(1, abs=1e-6)
    assert (bare > 0).all()
    change = elbo(TablePolicy(L, seed=1), o) - elbo(policy, o)
    close(bare, (change + REWARDS).softmax(0).detach(), 1e-6)


def test_preferences_at_the_reference() -> None:
    policy, o = TablePolicy(L), sequences(L)
    draws, sign = exhaustive(o), torch.tensor([1.0, -1.0, 0, 0, 0, 0, 0, 0])
    objective = ob.Preference(0.5)
    loss = loss_of(objective, policy, batch_of(o, draws, ref=policy), sign)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    bound = elbo(policy, o)
    close(gradient(loss, policy), gradient(-0.25 * (bound[0] - bound[1]), policy))
    assert loss_of(objective, policy, batch_of(o, draws, ref=policy), 0 * sign).item() == 0


def test_kl_estimators() -> None:
    """All 0 at the reference; slopes 1, d, 1 - e^-d; E[grad k2] is the gradient of KL(pi || ref)."""
    d = torch.tensor([-0.3, 0.0, 0.1], dtype=torch.float64, requires_grad=True)
    for kind, slope in (
        ("k1", torch.ones(3)),
        ("k2", d.detach()),
        ("k3", 1 - (-d.detach()).exp()),
    ):
        value = ob.divergence(kind, d, torch.zeros_like(d))
        assert value[1] == 0
        close(torch.autograd.grad(value.sum(), d)[0], slope.double())
    assert ob.divergence("k3", d, 0 * d)[2].item() == pytest.approx(0.0048374, abs=1e-7)
    policy, ref, o = TablePolicy(L), TablePolicy(L, seed=1), sequences(L)
    order = (0, 1, 2)
    new, other = chain(policy, o, order), chain(ref, o, order).detach()
    assert new.exp().sum().item() == pytest.approx(1)
    exact = gradient((new.exp() * (new - other)).sum(), policy)
    new = chain(policy, o, order)
    sampled = gradient((new.exp().detach() * ob.divergence("k2", new, other)).sum(), policy)
    close(sampled, exact)


def test_bellman_residuals() -> None:
    """0 where the log-ratio is r/beta up to a constant of the group; they sum to 0 whatever the policy."""
    policy, ref, o = TablePolicy(L), TablePolicy(L, seed=1), sequences(L)
    draws = (*exhaustive(o), *exhaustive(o))
    draws = tuple(replace(draw, weight=draw.weight / 2) for draw in draws)
    batch = batch_of(o, draws, ref=ref, combine=lk.halves)
    change = (elbo(policy, o) - elbo(ref, o)).detach()
    objective = ob.BellmanResidual(0.5)
    solved = loss_of(objective, policy, batch, 0.5 * (change + 7.0), lk.halves)
    assert solved.item() == pytest.approx(0, abs=1e-18)
    loss = loss_of(objective, policy, batch, REWARDS, lk.halves)
    gap = elbo(policy, o) - elbo(ref, o) - REWARDS / 0.5
    by_hand = (gap - gap.mean()).square().mean()
    close(loss, by_hand)
    close(gradient(loss, policy), gradient(by_hand, policy))


def test_two_independent_estimates_make_an_unbiased_square() -> None:
    """E[e1 e2] is the square of the mean; E[e^2] is larger by the variance. Over all pairs of masks."""
    policy, ref, o = TablePolicy(L), TablePolicy(L, seed=1), sequences(L)[:2]
    objective, r = ob.BellmanResidual(1.0), REWARDS[:2]
    singles = exhaustive(o)
    p = [float(d.weight[0, 0] * d.score[0].sum()) / L for d in singles]  # P(S)
    product = square = 0.0
    for (i, a), (j, b) in itertools.product(enumerate(singles), repeat=2):
        pair = [replace(d, weight=d.weight / (2 * q)) for d, q in ((a, p[i]), (b, p[j]))]
        batch = batch_of(o, pair, ref=ref, combine=lk.halves)
        loss = loss_of(objective, policy, batch, r, lk.halves).item()
        product += p[i] * p[j] * loss
        square += p[i] * loss if i == j else 0.0
    gap = (elbo(policy, o) - elbo(ref, o) - r).detach()
    truth = (gap - gap.mean()).square().mean().item()
    assert product == pytest.approx(truth, abs=1e-9)
    assert square > truth + 1e-6


def test_centred_advantages_leave_the_constant_out() -> None:
    """On policy the loss of a centred group is 0 and its gradient that of E[r]: over all sequences, by their chance."""
    policy, o = TablePolicy(L), sequences(L)
    advantages = centred(graded(rolled(o), REWARDS))
    assert abs(advantages.sum()) < 1e-6
    (update,) = lk.slices(rolled(o), SEED, num_iterations=1, shrink=1, steps_per_block=L)
    batch = batch_of(o, update.draws, combine=lk.keep_apart, weight=update.weight)
    objective = ob.ClippedDraws(0.2, 0.2, 0.0, "k3")
    weight = chain(policy, o, (0, 1, 2)).exp().detach()
    for baseline in (0.0, 3.0):
        loss = loss_of(
            objective, policy, batch, weight * (REWARDS - baseline) * len(o), lk.keep_apart
        )
        truth = gradient((chain(policy, o, (0, 1, 2)).exp() * REWARDS).sum(), policy)
        close(-gradient(loss, policy), truth)
