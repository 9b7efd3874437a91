"""Critics against their equations, written here with plain torch and loops over rows, steps and tokens."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from steps import SEED, config, gradient, lesson_gradient, moved, prepared, written

from igpo.config import CriticConfig
from igpo.models.critic import CriticModel
from igpo.rl.algorithms import build_algorithm
from igpo.rl.critique import fit, gae, reward_to_go, search
from igpo.rollout import denoise
from igpo.types import GIVEN, take

ROWS = 12


def step_of(toy, name: str, **changes):
    return prepared(toy, replace(config(name), **changes))


def value_of(network, canvas, tokens) -> torch.Tensor:
    """(B, L) the critic's numbers, from its weights."""
    hidden = network.body.hidden(tokens, canvas.attention_mask, canvas.position_ids)
    return (hidden @ network.head)[:, canvas.prompt_length :]


def slices_of(rollouts, shrink: int, row: int) -> list[tuple[int, list[int]]]:
    """(first step, positions) of each slice of a row's trajectory, in order; a block has 4 steps."""
    found: dict[int, list[int]] = {}
    for k, t in enumerate(rollouts.step_map[row].tolist()):
        if t != GIVEN and t < int(rollouts.num_steps[row]):
            found.setdefault(t - (t % 4) % shrink, []).append(k)
    return sorted(found.items())


def canvas_at(toy, rollouts, step: int) -> torch.Tensor:
    completion = rollouts.completion.masked_fill(rollouts.step_map >= step, toy.mask)
    return torch.cat([rollouts.tokens[:, : rollouts.canvas.prompt_length], completion], 1)


def test_gae_golden() -> None:
    """Slices {V = .5, .1}, none, {.4}, {.2}; r = 1, gamma = .9, lambda = .8."""
    values = torch.tensor([[[0.5, 0.1, 0, 0], [0] * 4, [0, 0, 0.4, 0], [0, 0, 0, 0.2]]]).double()
    mask = values != 0
    advantages, returns = gae(values, mask, torch.tensor([1.0]), 0.9, 0.8)
    last = 1 - 0.2
    middle = -0.4 + 0.9 * 0.2 + 0.9 * 0.8 * last
    first = [-v + 0.9 * 0.4 + 0.9 * 0.8 * middle for v in (0.5, 0.1)]
    assert advantages[mask].tolist() == pytest.approx([*first, middle, last])
    assert returns[mask].tolist() == pytest.approx([0.81, 0.81, 0.9, 1.0])
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_gae_limits() -> None:
    """gamma = lambda = 1: R = r and A = r - V. lambda = 0: the residual of one step."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 2, 2, 2]), 3).T.bool().expand(5, 3, 6)
    values = torch.randn(5, 3, 6, generator=generator, dtype=torch.float64) * mask
    r = torch.randn(5, generator=generator, dtype=torch.float64)
    advantages, returns = gae(values, mask, r, 1.0, 1.0)
    torch.testing.assert_close(returns, r[:, None, None] * mask)
    torch.testing.assert_close(advantages, (r[:, None, None] - values) * mask)
    advantages, _ = gae(values, mask, r, 1.0, 0.0)
    torch.testing.assert_close(advantages[:, 0, 0], values[:, 1, 2] - values[:, 0, 0])
    torch.testing.assert_close(advantages[:, 1, 2], values[:, 2, 3:].mean(1) - values[:, 1, 2])


def by_equation(toy, step, shrink: int, gamma: float, lam: float):
    """V, R and A (B, L), slice by slice and token by token."""
    rollouts = step.graded.rollouts
    V, R, A = (torch.zeros(ROWS, toy.length, dtype=torch.float64) for _ in range(3))
    r = step.algorithm.advantage(step.graded).double()
    for row in range(ROWS):
        slices = slices_of(rollouts, shrink, row)
        for first, positions in slices:
            seen = value_of(step.network, rollouts.canvas, canvas_at(toy, rollouts, first))
            V[row, positions] = seen[row, positions].detach()
        last = slices[-1][1]
        for t, (_, positions) in reversed(list(enumerate(slices))):
            later = slices[t + 1][1] if t + 1 < len(slices) else None
            for k in positions:
                own = r[row] if positions == last else 0.0
                means = [float(x[row, later].mean()) if later else 0.0 for x in (V, R, A)]
                R[row, k] = own + gamma * means[1]
                A[row, k] = own - V[row, k] + gamma * means[0] + gamma * lam * means[2]
    return V, R, A


@pytest.mark.parametrize("early", [False, True])
def test_tracerl_value(toy, early: bool, monkeypatch) -> None:
    """-mean_i sum_t mean_{k in slice t} [min(rho A_k, clip) - beta k3(old)]; 1/2 mean max of the value's squares."""
    if early:  # some rows stopped before their last blocks
        shorten(toy, monkeypatch)
    step = step_of(toy, "tracerl_value")
    rollouts, draws = step.graded.rollouts, step.batch.draws[1]
    V, R, A = by_equation(toy, step, 2, 0.9, 0.8)
    scored = rollouts.step_map < rollouts.num_steps[:, None]
    assert bool(scored.all()) != early
    apart = torch.stack([draw.score for draw in draws], 1)
    torch.testing.assert_close((step.advantages * apart).sum(1), A, atol=1e-7, rtol=1e-6)

    new, total = moved(step.policy), 0.0
    for row in range(ROWS):
        for first, positions in slices_of(rollouts, 2, row):
            z = canvas_at(toy, rollouts, first)
            logp, old = (
                toy.logprobs(policy, rollouts.canvas, z)[row, positions, rollouts.completion[row, positions]]
                for policy in (new, step.policy)
            )  # fmt: skip
            old, a = old.detach(), A[row, positions]
            rho = (logp - old).exp()
            kl = (old - logp).exp() - 1 - (old - logp)
            terms = torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a) - 0.1 * kl
            total = total + terms.mean()
    found, loss, _ = gradient(step)
    assert loss == pytest.approx(-total.item() / ROWS, abs=1e-7)
    (-total / ROWS).backward()
    expected = torch.cat([p.grad.flatten() for p in new.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-5)

    network, value = copy.deepcopy(step.network), 0.0
    with torch.no_grad():
        network.head.mul_(1.6)  # some values move by more than epsilon
    for row in range(ROWS):
        count = int(scored[row].sum())
        for first, positions in slices_of(rollouts, 2, row):
            v = value_of(network, rollouts.canvas, canvas_at(toy, rollouts, first))[row, positions]
            old, target = V[row, positions], R[row, positions]
            near = old + (v - old).clamp(-0.2, 0.2)
            value = value + torch.maximum((v - target) ** 2, (near - target) ** 2).sum() / count
    value = 0.5 * value / ROWS
    found, loss, parts = lesson_gradient(step, scale=1.6)
    assert 0 < sum(m["critic/clip_ratio"] for _, m in parts) < 1
    assert loss == pytest.approx(value.item(), abs=1e-7)
    value.backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-5)


def shorten(toy, monkeypatch) -> None:
    """Rollouts whose rows 0, 2, 4, … stop after the first block."""
    rolled = toy.rolled

    def stopping(start, seed=0):
        rollouts = rolled(start, seed)
        steps = torch.where(start.row_ids % 2 == 0, 4, 8)
        return replace(
            rollouts, step_map=torch.minimum(rollouts.step_map, steps[:, None]), num_steps=steps
        )

    monkeypatch.setattr(toy, "rolled", stopping)


def test_airl_s(toy, monkeypatch) -> None:
    """r = f(z') - log pi(a | z), means over a step's tokens; BCE of traces and rollouts; A + w (G_t - group mean)."""
    shorten(toy, monkeypatch)
    step = step_of(toy, "airl_s")
    rollouts, problems = step.graded.rollouts, toy.prompts()

    def reward(network, record, row: int) -> list[torch.Tensor]:
        found = []
        for first, positions in slices_of(record, 4, row):
            before, after = (canvas_at(toy, record, t) for t in (first, first + 4))
            f = value_of(network, record.canvas, after)[row, positions].mean()
            logp = toy.logprobs(step.policy, record.canvas, before).detach()
            found.append(f - logp[row, positions, record.completion[row, positions]].mean())
        return found

    # one row for each prompt, in which the trace was written left to right and EOS to the end
    first = torch.tensor([0, 4, 8])
    traces = take(rollouts, first)
    texts = torch.tensor([[*p.trace_ids, toy.eos, toy.eos] for p in problems])
    head = traces.canvas.tokens[:, : traces.canvas.prompt_length]
    order = (torch.arange(toy.length) // 2).expand(3, -1)
    traces = replace(
        traces, tokens=torch.cat([head, texts], 1), step_map=order, num_steps=torch.full((3,), 8)
    )
    r = [[x.item() for x in reward(step.network, rollouts, row)] for row in range(ROWS)]
    assert {len(steps) for steps in r} == {1, 2}
    to_go = [
        [sum(0.9**s * x for s, x in enumerate(row[t:])) / len(row) for t in range(len(row))]
        for row in r
    ]
    outcome = step.algorithm.advantage(step.graded).double()
    for row in range(ROWS):
        for t, g in enumerate(to_go[row]):
            group = [to_go[i][t] for i in range(row - row % 4, row - row % 4 + 4) if len(r[i]) > t]
            expected = float(outcome[row]) + 0.7 * (g - sum(group) / len(group))
            assert float(step.advantages[row, t, 0]) == pytest.approx(expected, abs=1e-7)

    network = copy.deepcopy(step.network)
    with torch.no_grad():
        network.head.mul_(1.3)
    loss, parts = 0.0, ((rollouts, ROWS, 1.0), (traces, 3, -1.0))
    for record, count, sign in parts:
        for row in range(count):
            steps = reward(network, record, row)
            loss = (
                loss + sum(-torch.sigmoid(-sign * x).log() for x in steps) / len(steps) / count / 2
            )
    found, value, _ = lesson_gradient(step, scale=1.3)
    assert value == pytest.approx(loss.item(), abs=1e-7)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-5)


def test_reward_to_go_skips_steps_a_row_does_not_have() -> None:
    rewards = torch.tensor([[1.0, 9.0, 2.0], [3.0, 9.0, 9.0]])
    live = torch.tensor([[True, False, True], [True, False, False]])
    found = reward_to_go(rewards, live, torch.tensor([7, 7]), 0.5)
    assert found.tolist() == [[(1 + 1) / 2 - 2, 0, 0], [3 - 2, 0, 0]]


def test_traces_end_where_a_rollout_would_have_stopped(toy) -> None:
    """With early stop the block of EOS is scored and what follows is not; a prompt without a trace is passed over."""
    algorithm = build_algorithm(
        config("airl_s"),
        replace(toy.rollout, early_stop=True, block_length=4),
        None,
        pad_id=toy.pad,
    )
    problems = [
        replace(p, trace_ids=p.trace_ids[:length])
        for p, length in zip(toy.prompts(), (3, 0, 14), strict=True)
    ]
    step = step_of(toy, "airl_s")
    judged = algorithm.critique.judge(
        step.network, step.policy, problems, step.graded, step.batch, torch.zeros(ROWS), SEED
    )
    own, traces = judged[1]
    assert traces.score.any(1).sum(1).tolist() == [
        8,
        16,
    ]  # 3 tokens and EOS, a block of EOS; everything
    assert (own.weight.flatten(1).sum(1) > 0).tolist() == [True] * 4 + [False] * 4 + [True] * 4
    none = [replace(p, trace_ids=()) for p in problems]
    with pytest.raises(ValueError, match="must have a reference trace to learn from, got none"):
        algorithm.critique.judge(
            step.network, step.policy, none, step.graded, step.batch, torch.zeros(ROWS), SEED
        )


def course(toy, name: str, steps: int) -> list[dict[str, float]]:
    """What a critic is worth on fresh completions at each of `steps` updates. Rewards: big words in the first half."""
    cfg = replace(config(name), num_iterations=1, critic=CriticConfig(value_epsilon=1.0))
    algorithm = build_algorithm(cfg, toy.rollout, None, pad_id=toy.pad)
    policy, network, problems = toy.Policy(), CriticModel(toy.Policy(seed=2)), toy.prompts()
    with torch.no_grad():
        policy.weight.mul_(0.1)  # its tokens would be nearly uniform, as these are
        policy.bias.zero_()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    found = []
    for i in range(steps):
        canvas = toy.canvas(problems)
        rollouts = written(toy, replace(canvas, row_ids=canvas.row_ids + 4 * i))
        rewards = (rollouts.completion[:, :8] > 4).float().mean(1)
        graded = toy.graded(rollouts, rewards > 0.5, rewards)
        batch = algorithm.likelihood.prepare(policy, graded, SEED.at(i))
        _, lessons, metrics = algorithm.critique.judge(
            network, policy, problems, graded, batch, rewards - 0.5, SEED.at(i)
        )
        found.append(metrics)
        optimizer.zero_grad()
        for lesson in lessons:
            list(fit(network, algorithm.critique, lesson, torch.arange(len(lesson.tokens)), 64))
        optimizer.step()
    return found


def test_values_come_to_explain_returns(toy) -> None:
    """Half of the slices see all that the reward is of, a quarter half of it: 5/8 can be explained."""
    explained = [
        metrics["critic/explained_variance"] for metrics in course(toy, "tracerl_value", 60)
    ]
    assert explained[0] == 0  # the head starts at 0
    assert sum(explained[-10:]) / 10 > 0.15


def test_the_discriminator_comes_to_tell_traces_from_rollouts(toy) -> None:
    found = course(toy, "airl_s", 45)
    assert found[0]["critic/accuracy"] == pytest.approx(0.5, abs=0.1)
    assert sum(metrics["critic/accuracy"] for metrics in found[-10:]) / 10 > 0.85
    assert found[-1]["critic/step_reward"] < found[-1]["critic/step_reward_of_traces"]


def prefers_three(tokens, attention_mask, position_ids) -> torch.Tensor:
    """A critic that likes the token 3."""
    return (tokens == 3).float()


def test_search_keeps_the_better_canvas(toy) -> None:
    policy, canvas = toy.Policy(), toy.canvas(toy.prompts())
    with torch.no_grad():
        policy.weight.mul_(0.1)  # tokens are nearly uniform
    plain = denoise(policy, canvas, toy.rollout, SEED)
    found = search(prefers_three, policy, canvas, toy.rollout, SEED, num_candidates=8)
    liked, before = (
        (x.completion == 3).float().unflatten(1, (2, 8)).sum(2) for x in (found, plain)
    )
    assert (liked[:, 0] >= before[:, 0]).all()
    assert liked.mean() > before.mean() + 0.4
    # every candidate of the first block: denoise again with its stream
    others = [
        denoise(policy, canvas, toy.rollout, SEED.named(f"search/0/{k}")) for k in range(1, 8)
    ]
    best = torch.stack([(x.completion[:, :8] == 3).sum(1) for x in (plain, *others)]).amax(0)
    assert torch.equal(liked[:, 0].long(), best)
    # it is a trajectory: each step commits what it would have, and the first canvas is all masked
    assert torch.equal(found.step_map.sort(1).values, plain.step_map.sort(1).values)
    assert (found.step_map.unflatten(1, (2, 8)) // 4 == torch.tensor([0, 1])[:, None]).all()
    assert (found.commit_logprob < 0).all()
    assert found.num_forwards == plain.num_forwards + 7 * ROWS * (8 + 4)


def test_search_scores_the_canvas_after_the_block(toy) -> None:
    shown = []

    def watching(tokens, attention_mask, position_ids):
        shown.append((tokens[:, -toy.length :] == toy.mask).sum(1).unique().tolist())
        return prefers_three(tokens, attention_mask, position_ids)

    search(watching, toy.Policy(), toy.canvas(toy.prompts()), toy.rollout, SEED, num_candidates=2)
    assert shown == [[8], [8], [0], [0]]


def test_search_without_a_preference_is_denoise(toy) -> None:
    policy, canvas = toy.Policy(), toy.canvas(toy.prompts())
    plain = denoise(policy, canvas, toy.rollout, SEED)
    found = search(
        lambda tokens, *_: tokens * 0.0, policy, canvas, toy.rollout, SEED, num_candidates=3
    )
    for name in ("tokens", "step_map", "commit_logprob", "commit_entropy", "num_steps"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name


def test_search_of_a_row_does_not_depend_on_the_others(toy) -> None:
    policy, canvas = toy.Policy(), toy.canvas(toy.prompts())
    cfg = replace(toy.rollout, early_stop=True)
    with torch.no_grad():
        policy.bias[toy.eos] += 3.0  # some rows stop early
    whole = search(prefers_three, policy, canvas, cfg, SEED, num_candidates=3)
    assert whole.num_steps.unique().tolist() == [4, 8]
    rows = torch.tensor([7, 2])
    some = search(
        prefers_three,
        policy,
        take(canvas, rows),
        replace(cfg, rollout_batch_size=1),
        SEED,
        num_candidates=3,
    )
    assert torch.equal(some.tokens, whole.tokens[rows])
    assert torch.equal(some.step_map, whole.step_map[rows])
    assert (whole.completion != toy.mask).all()


def test_a_step_reward_of_weight_0_is_grpo_on_slices(toy) -> None:
    with_critic = step_of(toy, "airl_s", critic=CriticConfig(step_reward_weight=0.0))
    plain = step_of(toy, "tracerl", beta=0.0, draws=config("airl_s").draws)
    assert gradient(with_critic)[1] == pytest.approx(gradient(plain)[1], abs=1e-12)
    torch.testing.assert_close(gradient(with_critic)[0], gradient(plain)[0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tracerl_value", {"likelihood": "mean_field"}, "likelihood must be one of a trajectory's steps .*=slices"),
        ("airl_s", {"likelihood": "elbo", "objective": "boundary"}, "likelihood must be one of a trajectory's steps"),
        ("airl_s", {"objective": "clip"}, "objective must take advantages of tokens .*objective=clip_draws"),
        ("tracerl_value", {"critic": {"num_candidates": 2}}, "num_candidates must be 1 with .*_value'.*=airl_s"),
        ("grpo", {"critic": {"num_candidates": 2}}, "num_candidates must be 1 with algorithm 'grpo'"),
        ("airl_s", {"critic": {"num_candidates": 0}}, "num_candidates must be at least 1, got 0"),
        ("airl_s", {"critic": {"step_reward_weight": -1.0}}, "step_reward_weight must not be negative"),
        ("tracerl_value", {"critic": {"gamma": 0.0}}, r"gamma must lie in \(0, 1\], got 0.0"),
        ("tracerl_value", {"critic": {"gae_lambda": 1.5}}, r"gae_lambda must lie in \[0, 1\]"),
        ("tracerl_value", {"critic": {"value_epsilon": 0.0}}, "value_epsilon must be positive"),
        ("tracerl_value", {"critic": {"critic_learning_rate": 0.0}}, "critic_learning_rate must be positive"),
        ("tracerl_value", {"critic": {"critic_num_layers": 0}}, "critic_num_layers must be at least 1, or none"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(toy, name: str, change: dict, message: str) -> None:
    cfg = config(name)
    critic = replace(cfg.critic, **change.pop("critic", {}))
    with pytest.raises(ValueError, match=message):
        build_algorithm(replace(cfg, critic=critic, **change), toy.rollout, None, pad_id=toy.pad)
