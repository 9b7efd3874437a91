"""Each algorithm's loss and gradient against its equation, written here with plain torch on the draws it made.

x(policy, j) are log-softmax values of the tokens on the canvas of draw j; S[j] what draw j masks and reads.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import SEED, config, gradient, moved, prepared

ROWS, GROUPS = 12, 3


class Case:
    """One algorithm's inner update 1, after the policy moved."""

    def __init__(self, toy, name: str, **changes) -> None:
        self.toy, self.cfg = toy, replace(config(name), **changes)
        self.step = prepared(toy, self.cfg)
        self.old, self.ref, self.new = self.step.policy, self.step.frozen, moved(self.step.policy)
        self.rollouts = self.step.graded.rollouts
        self.draws = self.step.batch.draws[1]
        self.S = [draw.score for draw in self.draws]
        self.A = self.step.advantages.double()
        self.group = self.rollouts.canvas.group_ids

    def x(self, policy, j: int) -> torch.Tensor:
        """(12, 16) log p(o^k | canvas of draw j), at every position."""
        tokens = torch.where(self.draws[j].masked, self.toy.mask, self.rollouts.tokens)
        logp = self.toy.logprobs(policy, self.rollouts.canvas, tokens)
        found = self.draws[j].targets
        targets = self.rollouts.completion if found is None else found
        return logp.gather(-1, targets[..., None])[..., 0]

    def read(self, policy, j: int) -> torch.Tensor:
        return self.x(policy, j) * self.S[j]

    def check(self, loss: torch.Tensor) -> None:
        found, value, _ = gradient(self.step)
        assert value == pytest.approx(loss.item(), abs=1e-7)
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in self.new.parameters()])
        assert expected.abs().max() > 1e-7
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-5)


def clip(ratio, advantage, low=0.8, high=1.2):
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def k3(new, other):
    return (other - new).exp() - 1 - (other - new)


def test_agrpo(toy) -> None:
    """-(1/(k B)) sum_i sum_j (1/m)/q sum_{k in U_t} [min(rho A, clip) - beta rho k3], q uniform: the weight is 1."""
    case = Case(toy, "agrpo")
    total = 0.0
    for j, draw in enumerate(case.draws):
        order = case.rollouts.step_map
        t = draw.step[:, None]
        assert torch.equal(draw.masked[:, -toy.length :], order >= t)
        assert torch.equal(case.S[j], order == t)
        new, old, ref = (case.x(policy, j) for policy in (case.new, case.old, case.ref))
        rho = (new - old.detach()).exp()
        terms = clip(rho, case.A[:, None]) - 0.1 * rho * k3(new, ref.detach())
        total = total + (terms * case.S[j]).sum()
    case.check(-total / (2 * ROWS))


def test_espo(toy) -> None:
    """L-hat = (1/M) sum of pairs 1/2[(L+1)/l S + (L+1)/(L-l) S-bar]; rho = exp(dL/L); KL = beta (dL_ref)^2/(2 L)."""
    case, length = Case(toy, "espo"), toy.length

    def bound(policy):
        total = 0.0
        for first in (0, 2):
            one, two = first, first + 1
            count = case.S[one].sum(1)
            assert torch.equal(case.S[two], ~case.S[one])
            sums = [case.read(policy, j).sum(1) for j in (one, two)]
            weights = [(length + 1) / c.clamp(min=1) for c in (count, length - count)]
            total = total + 0.5 * sum(w * s for w, s in zip(weights, sums, strict=True)) / 2
        return total

    new, old, ref = bound(case.new), bound(case.old).detach(), bound(case.ref).detach()
    rho = ((new - old) / length).exp()
    case.check((-clip(rho, case.A) + 0.1 * 0.5 * (new - ref) ** 2 / length).mean())


def test_bgpo(toy) -> None:
    """-(1/B) sum_i (1/n) sum_j g_ij; g = (1 + d) A for A >= 0, e^d A for A < 0, d the change of (L/l) sum_S."""
    case = Case(toy, "bgpo", scale_rewards="group")
    total = 0.0
    for j in range(2):
        weight = toy.length / case.S[j].sum(1)
        d = weight * (case.read(case.new, j) - case.read(case.old, j).detach()).sum(1)
        total = total + torch.where(case.A >= 0, (1 + d) * case.A, d.exp() * case.A).sum()
    case.check(-total / (2 * ROWS))


def test_bgpo_golden(toy) -> None:
    """d = [.2, -.1]: A = 2 gives 2.1, A = -1 gives -1.06312."""
    from igpo.rl.objective import Boundary

    step = prepared(toy, config("bgpo"))
    batch = replace(
        step.batch, old_logprob=(torch.zeros(ROWS, 2, toy.length, dtype=torch.float64),) * 2
    )
    d = torch.tensor([0.2, -0.1], dtype=torch.float64)[:, None] / (2 * toy.length)
    values = d.expand(ROWS, 2, toy.length)
    mask = torch.ones_like(values, dtype=torch.bool)
    batch = replace(batch, token_mask=(mask, mask))
    for advantage, expected in ((2.0, 2.1), (-1.0, -1.06312)):
        rows, objective = torch.arange(ROWS), Boundary()
        divisor = objective.divisor(batch, rows, 0)
        loss, _ = objective(values, batch, torch.full((ROWS,), advantage), 0, divisor)
        assert loss.item() == pytest.approx(-expected, abs=1e-5)


def softmax_in_groups(values, group):
    return torch.cat([values[group == g].softmax(0) for g in range(GROUPS)])


def test_wd1(toy) -> None:
    """sum_i (softmax(-A) - softmax(A))_i sum_k log p(o^k | full mask, masked prompt), mean over the groups."""
    case = Case(toy, "wd1")
    rewards = case.step.graded.rewards.double()
    weight = softmax_in_groups(-rewards, case.group) - softmax_in_groups(rewards, case.group)
    case.check((weight * case.x(case.new, 0).sum(1)).sum() / GROUPS)


def test_dmpo(toy) -> None:
    """w = softmax(log p_ref - log q + r/alpha), b = softmax(log p_ref - log q - r/alpha), of the first draws;
    loss = sum_i (w - b)_i mean_rep (1/m) sum_masked -log p."""
    method = replace(config("dmpo").method, alpha=0.5)
    case = Case(toy, "dmpo", method=method)
    mine, case.draws = case.draws, case.step.batch.draws[0]

    def mean_nll(policy):
        S = [draw.score for draw in case.draws]
        per = [-(case.x(policy, j) * S[j]).sum(1) / S[j].sum(1).clamp(min=1) for j in range(4)]
        return sum(per) / 4

    change = -toy.length * (mean_nll(case.ref) - mean_nll(case.old)).detach()
    tilt = case.step.graded.rewards.double() / 0.5
    weight = softmax_in_groups(change + tilt, case.group) - softmax_in_groups(
        change - tilt, case.group
    )
    case.draws = mine
    case.check((weight * mean_nll(case.new)).sum() / GROUPS)


def test_spg(toy) -> None:
    """A >= 0: the ELBO; A < 0: half of it and half (1/b) log mean_j w p^b; -sum_i A_i sum_k / sum of lengths."""
    case, blocks, b = Case(toy, "spg"), 2, 1.5
    p = [case.x(case.new, j).exp() for j in range(2)]
    w = []
    for S in case.S:
        weight = blocks * (toy.length // blocks) / S.sum(1, keepdim=True)
        w.append(weight * S)
    elbo = sum(w[j] * p[j].log() for j in range(2)) / 2
    inside = sum(w[j] * p[j] ** b for j in range(2)) / 2
    eubo = torch.where(inside > 0, inside.clamp(min=1e-300).log() / b, 0.0)
    A = case.A[:, None]
    bound = torch.where(A >= 0, elbo, 0.5 * eubo + 0.5 * elbo)
    case.check(-(A * bound).sum() / (ROWS * toy.length))


def test_unigrpo(toy) -> None:
    """-(1/B) sum_i (1/|S_i|) sum_{S_i} min(rho A, clip(rho) A), rho of the masked tokens; the last mask is full."""
    case = Case(toy, "unigrpo")
    rho = (case.x(case.new, 0) - case.x(case.old, 0).detach()).exp()
    terms = clip(rho, case.A[:, None]) * case.S[0]
    assert case.S[0].all()
    assert not case.step.batch.draws[0][0].score.all()
    case.check(-(terms.sum(1) / case.S[0].sum(1)).mean())


def test_coupled_grpo(toy) -> None:
    """log p = 1/2 [full + (S: log p_S/t, else log p_S-bar/(1-t))], token ratio."""
    case = Case(toy, "coupled_grpo", loss_type="bnpo")
    full, S = case.S[0], case.S[1]
    assert full.all()
    assert torch.equal(case.S[2], ~S)
    t = 0.5 / case.draws[1].weight[:, :1].double()
    assert ((t > 0.2) & (t < 0.8)).all()

    def logp(policy):
        halves = torch.where(S, case.x(policy, 1) / t, case.x(policy, 2) / (1 - t))
        return 0.5 * (case.x(policy, 0) + halves)

    rho = (logp(case.new) - logp(case.old).detach()).exp()
    case.check(-clip(rho, case.A[:, None]).sum() / (ROWS * toy.length))


def test_tracerl(toy) -> None:
    """Slices of 2 steps (4 tokens): -mean_i sum_slices mean_k [min(rho A, clip) - beta k3 to the old policy]."""
    case = Case(toy, "tracerl")
    total = 0.0
    for j in range(4):
        order = case.rollouts.step_map // 2
        assert torch.equal(case.S[j], order == j)
        assert torch.equal(case.draws[j].masked[:, -toy.length :], order >= j)
        new, old = case.x(case.new, j), case.x(case.old, j).detach()
        terms = clip((new - old).exp(), case.A[:, None]) - 0.1 * k3(new, old)
        total = total + (terms * case.S[j]).sum(1) / 4
    case.check(-total.mean())


def test_diffpo(toy) -> None:
    """min(pi_old/p_commit, C) min(rho A, clip(rho) A): steps <= tau on the full mask, later ones on z_tau."""
    case = Case(toy, "diffpo", loss_type="bnpo")
    order, tau = case.rollouts.step_map, case.draws[1].step[:, None]
    early = order <= tau
    assert torch.equal(case.S[0], early)
    assert torch.equal(case.draws[1].masked[:, -toy.length :], order >= tau)
    new, old = (
        torch.where(early, case.x(policy, 0), case.x(policy, 1)) for policy in (case.new, case.old)
    )
    correction = (old - case.rollouts.commit_logprob).exp().clamp(max=2.0).detach()
    terms = correction * clip((new - old.detach()).exp(), case.A[:, None])
    case.check(-terms.sum() / (ROWS * toy.length))


def test_c3po(toy) -> None:
    """The sum over the tokens of six rows of 16, which a budget of 100 has room for, by 100."""
    case = Case(toy, "c3po")
    stream = SEED.named("budget")
    order = sorted(
        range(ROWS), key=lambda i: stream.generator(int(case.rollouts.canvas.row_ids[i])).random()
    )
    taken = order[:6]
    rho = (case.x(case.new, 0) - case.x(case.old, 0).detach()).exp()
    case.check(-clip(rho, case.A[:, None])[taken].sum() / 100)
    _, _, parts = gradient(case.step)
    assert sum(metrics["budget/used"] for _, metrics in parts) == pytest.approx(0.96)


def test_tbrm(toy) -> None:
    """mean_i e1 e2; e_h = d_h - r/beta minus its group mean, d_h the change of the ELBO's draw h to the reference."""
    case = Case(toy, "tbrm")
    residuals = []
    for j in range(2):
        weight = toy.length / case.S[j].sum(1)
        d = weight * (case.read(case.new, j) - case.read(case.ref, j).detach()).sum(1)
        gap = d - case.step.graded.rewards / 0.5
        means = torch.stack([gap[case.group == g].mean() for g in range(GROUPS)])
        residuals.append(gap - means[case.group])
    case.check((residuals[0] * residuals[1]).mean())


def test_vrpo(toy) -> None:
    """-log sigmoid(beta [d(best) - d(worst)]), d the change of the ELBO to the reference; mean over a group's pairs."""
    case = Case(toy, "vrpo")

    def bound(policy):
        return (
            sum(toy.length / S.sum(1) * case.read(policy, j).sum(1) for j, S in enumerate(case.S))
            / 2
        )

    d, rewards, terms = bound(case.new) - bound(case.ref).detach(), case.step.graded.rewards, []
    for i in range(ROWS):
        for j in range(ROWS):
            if case.group[i] == case.group[j] and rewards[i] > rewards[j]:
                terms.append(-(1 / (1 + (-0.5 * (d[i] - d[j])).exp())).log())
    case.check(sum(terms) / len(terms))


def masked_before(case, j: int):
    """The draw's canvas is the one before its step."""
    step = case.draws[j].step[:, None]
    assert torch.equal(case.draws[j].masked[:, -case.toy.length :], case.rollouts.step_map >= step)
    return case.rollouts.step_map >= step


def test_wd1pp(toy) -> None:
    """sum_i (w- - w+)_i (1/R) sum_r (L/l) sum_masked log p(x_r^k | z_r), mean over the groups."""
    case = Case(toy, "wd1pp")
    rewards = case.step.graded.rewards.double()
    weight = softmax_in_groups(-rewards, case.group) - softmax_in_groups(rewards, case.group)
    total = 0.0
    for j in range(4):
        masked = masked_before(case, j)
        assert (case.draws[j].targets[~masked] == case.rollouts.completion[~masked]).all()
        total = total + toy.length / masked.sum(1) * (case.x(case.new, j) * masked).sum(1) / 4
    case.check((weight * total).sum() / GROUPS)


def test_mdpo(toy) -> None:
    """-(1/S) sum_t (1/n_t) sum_masked conf [min(rho A_t, clip) - beta k2], A_t z-scored over the group at each step."""
    case = Case(toy, "mdpo")
    made, total = case.rollouts.predictions, 0.0
    for j in range(2):
        masked = masked_before(case, j)
        new, old, ref = (case.x(policy, j) for policy in (case.new, case.old, case.ref))
        terms = clip((new - old.detach()).exp(), case.A[:, j]) - 0.1 * (new - ref.detach()) ** 2 / 2
        confidence = made.logprob[:, j].exp()
        total = total + (confidence * terms * masked).sum(1) / masked.sum(1) / 2
    assert made.steps.shape == (ROWS, 2)
    case.check(-total.mean())


def test_mdpo_step_advantages() -> None:
    """Three rows, two predictions each, by hand."""
    from igpo.rl.predictions import step_advantages

    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    last = torch.tensor([1.0, 0.0, 1.0])
    # (r_0 - 0) + 1 + mean(r_1, r_T);  (r_1 - r_0) + 1 + r_T
    raw = torch.tensor(
        [[0 + 1 + 1.0, 1 + 1 + 1.0], [0 + 1 + 0.0, 0 + 1 + 0.0], [1 + 1 + 0.5, -1 + 1 + 1.0]],
        dtype=torch.float64,
    )
    expected = (raw - raw.mean(0)) / raw.std(0, correction=0)
    found = step_advantages(rewards, last, torch.zeros(3, dtype=torch.int64), delta=0.0)
    torch.testing.assert_close(found, expected)


def test_vineppo(toy) -> None:
    """Tokens of block b get V(z_{b+1}) - V(z_b): values sum to r minus the group's mean; slices of 2 steps."""
    case = Case(toy, "vineppo")
    credit, rewards = case.step.graded.credit, case.step.graded.rewards
    blocks = credit.view(ROWS, 2, 8)
    assert (blocks == blocks[..., :1]).all()
    mean = torch.stack([rewards[case.group == g].mean() for g in range(GROUPS)])[case.group]
    torch.testing.assert_close(blocks[..., 0].sum(1), rewards - mean)
    total = 0.0
    for j in range(4):
        S = case.rollouts.step_map // 2 == j
        rho = (case.x(case.new, j) - case.x(case.old, j).detach()).exp()
        total = total + (clip(rho, credit.double()) * S).sum(1) / 4
    case.check(-total.mean())


def test_linvit(toy) -> None:
    """-sum_i sum_b (softmax(Q/lambda) - 1/G) log p(fill of block b | chosen blocks before, block b masked)."""
    case = Case(toy, "linvit")
    weight, total = case.step.graded.credit.double(), 0.0
    chosen, made = case.rollouts.completion, case.rollouts.predictions.tokens
    for b in range(2):
        inside = torch.arange(toy.length) // 8 == b
        assert torch.equal(
            case.draws[b].masked[0, -toy.length :], torch.arange(toy.length) >= 8 * b
        )
        total = total + weight[:, b] * (case.x(case.new, b) * inside).sum(1)
        for g in range(GROUPS):
            rows = case.group == g
            assert weight[rows, b].sum().abs() < 1e-6
            assert (chosen[rows] == chosen[rows][0]).all()
            assert any(torch.equal(fill[inside], chosen[rows][0][inside]) for fill in made[rows, b])
    case.check(-total.sum() / GROUPS)
