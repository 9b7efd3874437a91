from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from igpo.rl.advantage import centred
from igpo.rl.objective import LOSS_TYPES, Clipped
from igpo.types import PolicyBatch, take

B, L = 6, 8
KINDS = [(kind, ratio) for kind in LOSS_TYPES for ratio in ("token", "sequence")]


def objective(**options) -> Clipped:
    fields = {
        "epsilon": 0.2, "epsilon_high": 0.2, "ratio": "token", "beta": 0.0, "kl": "k3", "loss_type": "grpo",
        "token_budget": B * L,
    }  # fmt: skip
    return Clipped(**(fields | options))


@pytest.fixture
def batch(toy):
    """batch(old, ref, mask) of one inner update."""

    def build(old, ref=None, mask=None) -> PolicyBatch:
        size, length = old.shape
        canvas = toy.canvas(toy.prompts(1), size)
        canvas = replace(canvas, frozen=torch.zeros(size, length, dtype=torch.bool))
        mask = torch.ones(size, length, dtype=torch.bool) if mask is None else mask
        return PolicyBatch(canvas, ((),), canvas.frozen.long(), (mask,), (old,), (ref,))

    return build


def value(spec: Clipped, logprob, batch, advantages):
    return spec(
        logprob, batch, advantages, 0, spec.divisor(batch, torch.arange(len(advantages)), 0)
    )


@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_on_policy_the_loss_is_minus_the_mean_advantage(batch, kind: str, ratio: str) -> None:
    logprob = -torch.rand(B, L, dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25, -0.25])
    spec = objective(loss_type=kind, ratio=ratio)
    loss, metrics = value(spec, logprob, batch(logprob.detach()), advantages)
    assert abs(loss.item()) < 1e-9
    assert metrics["logp/ratio_mean"] == pytest.approx(1, abs=1e-12)
    assert metrics["clip_ratio/region_mean"] == 0
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert (gradient != 0).all()
    shifted, _ = value(spec, logprob, batch(logprob.detach()), advantages + 2)
    assert shifted.item() == pytest.approx(-2, abs=1e-6)


@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_a_missing_old_policy_is_the_policy_itself(batch, kind: str, ratio: str) -> None:
    logprob = -torch.rand(B, L).requires_grad_()
    advantages = torch.randn(B)
    spec = objective(loss_type=kind, ratio=ratio)
    given = batch(logprob.detach())
    left_out = replace(given, old_logprob=(None,))
    loss, _ = value(spec, logprob, given, advantages)
    same, _ = value(spec, logprob, left_out, advantages)
    assert torch.equal(loss, same)
    gradients = [torch.autograd.grad(x, logprob)[0] for x in (loss, same)]
    assert torch.equal(*gradients)


def test_sequence_ratio_on_policy_is_sequence_mean_reinforce(batch) -> None:
    logprob = -torch.rand(B, L, dtype=torch.float64).requires_grad_()
    advantages = torch.randn(B)
    mask = torch.rand(B, L) < 0.6
    mask[:, 0] = True
    gradients = []
    for ratio in ("sequence", "token"):
        loss, _ = value(
            objective(ratio=ratio), logprob, batch(logprob.detach(), None, mask), advantages
        )
        gradients.append(torch.autograd.grad(loss, logprob)[0])
    expected = -advantages[:, None].double() / mask.sum(1, keepdim=True) * mask / B
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)


def test_golden_sequence_ratio(batch) -> None:
    old = torch.zeros(1, 4, dtype=torch.float64)
    new = torch.tensor([[0.4, 0.0, 0.0, -0.2]], dtype=torch.float64)
    for kind in ("grpo", "released"):
        _, metrics = value(
            objective(ratio="sequence", loss_type=kind), new, batch(old), torch.ones(1)
        )
        assert metrics["logp/ratio_mean"] == pytest.approx(1.05127, abs=1e-5)


@pytest.mark.parametrize(("kl", "golden"), [("k1", -0.1), ("k2", 0.005), ("k3", 0.0051709)])
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo"])
def test_golden_kl_adds_beta_times_the_estimate(batch, kind: str, kl: str, golden: float) -> None:
    """The reference is 0.1 above the policy: delta = log pi - log pi_ref = -0.1."""
    logprob = -torch.ones(B, L, dtype=torch.float64)
    given = batch(logprob, logprob + 0.1)
    spec = objective(beta=0.5, kl=kl, loss_type=kind)
    loss, metrics = value(spec, logprob, given, torch.zeros(B))
    assert metrics["kl"] == pytest.approx(golden, abs=1e-6)
    assert loss.item() == pytest.approx(0.5 * golden, abs=1e-6)
    loss, metrics = value(spec, logprob, batch(logprob, logprob - 0.1), torch.zeros(B))
    other = {"k1": 0.1, "k2": 0.005, "k3": 0.0048374}[kl]
    assert metrics["kl"] == pytest.approx(other, abs=1e-6)


def test_aggregations_agree_when_all_lengths_are_equal(batch) -> None:
    logprob, old = -torch.rand(B, L), -torch.rand(B, L)
    advantages = torch.randn(B)
    losses = [
        value(objective(loss_type=kind), logprob, batch(old), advantages)[0].item()
        for kind in LOSS_TYPES
    ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_aggregations_weigh_uneven_lengths_as_named(batch) -> None:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, :2], mask[1, :6] = True, True
    logprob, advantages = torch.zeros(2, 8), torch.tensor([1.0, 0.0])
    expected = {"grpo": 1 / 2, "bnpo": 2 / 8, "dr_grpo": 2 / 16, "released": 2 / 8}
    for kind, weight in expected.items():
        loss, _ = value(objective(loss_type=kind), logprob, batch(logprob, None, mask), advantages)
        assert loss.item() == pytest.approx(-weight), kind


@pytest.mark.parametrize(("kind", "ratio"), KINDS)
@pytest.mark.parametrize("sizes", [[6], [2, 4], [1] * 6, [4, 2]])
def test_losses_and_gradients_of_micro_batches_add_up(batch, kind: str, ratio: str, sizes) -> None:
    logprob = (-torch.rand(B, L, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(B, L) < 0.7
    mask[2] = False  # a row without a token in the loss
    given = batch(-torch.rand(B, L).double(), -torch.rand(B, L).double(), mask)
    advantages, order = torch.randn(B), torch.randperm(B)
    spec = objective(beta=0.1, loss_type=kind, ratio=ratio, epsilon_high=0.3)
    divisor = spec.divisor(given, torch.arange(B), 0)
    whole, whole_metrics = spec(logprob, given, advantages, 0, divisor)
    parts = [
        spec(logprob[rows], take(given, rows), advantages[rows], 0, divisor)
        for rows in order.split(sizes)
    ]
    total = torch.stack([loss for loss, _ in parts]).sum()
    torch.testing.assert_close(total, whole, atol=1e-7, rtol=1e-6)
    gradients = [torch.autograd.grad(x, logprob)[0] for x in (whole, total)]
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-6)
    if kind in ("bnpo", "released"):
        for name, number in whole_metrics.items():
            assert sum(m[name] for _, m in parts) == pytest.approx(number, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(("advantage", "difference"), [(1.0, math.log(1.5)), (-1.0, math.log(0.5))])
@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_a_clipped_ratio_has_no_gradient(batch, kind, ratio, advantage, difference) -> None:
    old = -torch.ones(B, L, dtype=torch.float64)
    logprob = (old + difference).requires_grad_()
    spec = objective(loss_type=kind, ratio=ratio, epsilon=0.2, epsilon_high=0.28)
    loss, metrics = value(spec, logprob, batch(old), torch.full((B,), advantage))
    assert loss.item() == pytest.approx(-1.28 if advantage > 0 else 0.8, rel=1e-6)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(1)
    assert (torch.autograd.grad(loss, logprob)[0] == 0).all()
    loss, metrics = value(spec, logprob, batch(old), torch.full((B,), -advantage))
    assert metrics["clip_ratio/region_mean"] == 0
    assert (torch.autograd.grad(loss, logprob)[0] != 0).all()


def test_released_ratio_reaches_dropped_tokens_and_others_do_not(batch) -> None:
    logprob = (-torch.rand(2, L, dtype=torch.float64)).requires_grad_()
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[0, 3] = False
    for kind, reaches in (("grpo", False), ("released", True)):
        spec = objective(ratio="sequence", loss_type=kind)
        loss, _ = value(spec, logprob, batch(logprob.detach(), None, mask), torch.ones(2))
        gradient = torch.autograd.grad(loss, logprob)[0]
        assert bool(gradient[0, 3] != 0) == reaches


@pytest.mark.parametrize(("correct", "group"), [(1, 4), (2, 4), (4, 8)])
def test_gradient_of_a_rescued_group(batch, correct: int, group: int) -> None:
    """rho_c (1 - rho_c) (mean g_correct - mean g_wrong), in float64."""
    parameter = torch.randn(5, dtype=torch.float64, requires_grad=True)
    features = torch.randn(group, L, 5, dtype=torch.float64)
    logprob = -torch.nn.functional.softplus(features @ parameter)
    right = torch.arange(group) < correct
    share = correct / group
    advantages = right.double() - share
    spec = objective(ratio="sequence")
    loss, _ = value(spec, logprob, batch(logprob.detach()), advantages)
    (got,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    g_correct, g_wrong = (
        torch.autograd.grad(logprob[rows].mean(1).mean(), parameter, retain_graph=True)[0]
        for rows in (right, ~right)
    )
    expected = share * (1 - share) * (g_correct - g_wrong)
    torch.testing.assert_close(-got, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_an_empty_mask_gives_zero_loss_and_gradient(batch, kind: str, ratio: str) -> None:
    logprob = (-torch.rand(B, L)).requires_grad_()
    given = batch(logprob.detach(), logprob.detach(), torch.zeros(B, L, dtype=torch.bool))
    loss, metrics = value(
        objective(loss_type=kind, ratio=ratio, beta=0.1), logprob, given, torch.ones(B)
    )
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logprob)[0] == 0).all()
    assert all(math.isfinite(number) for number in metrics.values())


def test_equal_rewards_give_no_gradient(batch, toy) -> None:
    logprob = (-torch.rand(4, toy.length)).requires_grad_()
    rollouts = toy.rolled(toy.canvas(toy.prompts(1)))
    same = toy.graded(rollouts, torch.ones(4, dtype=torch.bool), torch.full((4,), 0.3))
    loss, _ = value(objective(), logprob, batch(logprob.detach()), centred(same))
    assert (torch.autograd.grad(loss, logprob)[0] == 0).all()


def test_rows_without_advantage_are_left_out_only_where_they_add_nothing() -> None:
    advantages = torch.tensor([0.0, 0.5, 0.0, -0.5])
    assert objective(beta=0.0).rows(advantages).tolist() == [1, 3]
    assert objective(beta=0.0).rows(advantages * 0).tolist() == [0]
    assert objective(beta=0.1).rows(advantages).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_leaving_them_out_changes_neither_loss_nor_gradient(batch, kind: str, ratio: str) -> None:
    logprob = -torch.rand(B, L).double()
    mask = torch.rand(B, L) < 0.8
    given = batch(logprob + 0.1 * torch.randn(B, L), None, mask)
    advantages = torch.randn(B)
    advantages[::2] = 0
    spec, found = objective(beta=0.0, loss_type=kind, ratio=ratio), []
    for rows in (torch.arange(B), spec.rows(advantages)):
        leaf = logprob.clone().requires_grad_()
        divisor = spec.divisor(given, rows, 0)
        loss, metrics = spec(leaf[rows], take(given, rows), advantages[rows], 0, divisor)
        loss.backward()
        found.append((loss.detach(), leaf.grad, metrics["logp/ratio_mean"] * divisor.tokens))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert 0 < found[1][2] < found[0][2]  # the mean ratio is of the rows that were evaluated
