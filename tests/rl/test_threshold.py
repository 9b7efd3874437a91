"""DiFFPO's trained entropy bound: its law, its gradient, what it does to rollouts, and that it learns."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from steps import COMMON, SEED, config, lesson_gradient, prepared

from igpo.config import CriticConfig
from igpo.rl.algorithms import build_algorithm
from igpo.rl.critique import fit
from igpo.rl.critique.threshold import working_steps
from igpo.rollout import denoise

NAME = "diffpo_joint"
BOUND = 4.0  # nats: a few of the toy's tokens at once


def rolled(toy, std: float, bound: float = 0.5, seed=SEED):
    """(canvas, rollouts) of a critic whose head is 0: log gamma ~ N(log bound, std)."""
    step = prepared(toy, config(NAME))
    cfg = replace(config(NAME), critic=CriticConfig(bound_std=std))
    rollout = replace(toy.rollout, entropy_bound=bound)
    critique = build_algorithm(
        cfg, rollout, toy.grader(lambda r: r.tokens[:, 0] > 0), pad_id=toy.pad
    ).critique
    network = copy.deepcopy(step.network)
    with torch.no_grad():
        network.head.zero_()
    canvas = toy.canvas(toy.prompts())
    return (
        canvas,
        critique.roll_out(network, step.policy, canvas, rollout, seed),
        step.policy,
        rollout,
    )


def test_bounds_are_lognormal_around_the_rollouts(toy) -> None:
    logs = []
    for k in range(40):
        _, rollouts, _, _ = rolled(toy, 0.3, seed=SEED.at(k))
        logs.append(rollouts.canvas.entropy_bound.log())
    z = (torch.cat(logs) - math.log(0.5)) / 0.3  # 480 of them
    assert abs(z.mean()) < 5 / math.sqrt(480)
    assert z.std() == pytest.approx(1.0, abs=5 / math.sqrt(2 * 480))


def test_a_row_is_denoised_under_its_own_bound(toy) -> None:
    canvas, rollouts, policy, rollout = rolled(toy, 1.0)
    bounds = rollouts.canvas.entropy_bound
    assert len(bounds.unique()) == len(bounds)
    for row in (0, 7):
        alone = denoise(policy, canvas, replace(rollout, entropy_bound=float(bounds[row])), SEED)
        assert torch.equal(alone.tokens[row], rollouts.tokens[row])
        assert torch.equal(alone.step_map[row], rollouts.step_map[row])
    narrow, wide = (rolled(toy, 1e-6, bound)[1] for bound in (1e-9, 1e9))
    assert (working_steps(narrow) > working_steps(wide)).all()


def test_the_gradient_is_the_score_function_and_rewards_pay_for_steps(toy) -> None:
    """At the first update the gradient is that of -mean_i A_i log N(x_i; u_i, std), written out."""
    cost = 0.4
    critic = CriticConfig(bound_std=0.3, step_cost=cost)
    step = prepared(toy, replace(config(NAME), critic=critic))
    rollouts, groups = step.graded.rollouts, step.graded.rollouts.canvas.group_ids
    steps = torch.tensor([len({t for t in row if t >= 0}) for row in rollouts.step_map.tolist()])
    torch.testing.assert_close(working_steps(rollouts), steps.float())
    rewards = step.graded.rewards.double() - cost * steps / int(rollouts.num_steps[0])
    wanted = torch.stack([rewards[i] - rewards[groups == groups[i]].mean() for i in range(12)])
    torch.testing.assert_close(step.advantages.double(), wanted, atol=1e-6, rtol=1e-5)

    network, (lesson,) = copy.deepcopy(step.network), step.lessons
    canvas = rollouts.canvas
    masked = torch.cat(
        [
            canvas.tokens[:, : canvas.prompt_length],
            torch.full_like(rollouts.completion, canvas.mask_id),
        ],
        1,
    )
    values = network(masked, canvas.attention_mask, canvas.position_ids)[
        :, canvas.prompt_length :
    ].mean(1)
    noise = torch.tensor(
        [
            SEED.named("entropy bound").generator(row).standard_normal()
            for row in canvas.row_ids.tolist()
        ]
    )
    drawn = values.detach() + 0.3 * noise
    torch.testing.assert_close(lesson.drawn[:, 0, 0].double(), drawn.double(), atol=1e-6, rtol=1e-6)
    law = torch.distributions.Normal(values, 0.3)
    loss = -(step.advantages * law.log_prob(drawn)).mean()
    loss.backward()
    found, _, _ = lesson_gradient(step, scale=1.0)
    torch.testing.assert_close(
        found, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]),
        atol=1e-7, rtol=1e-5,
    )  # fmt: skip


def test_the_bound_learns_to_save_steps(toy) -> None:
    """All completions equally right: only their steps differ, and the bound grows."""
    cfg = replace(config(NAME), critic=CriticConfig(bound_std=0.5, step_cost=1.0))
    rollout = replace(toy.rollout, entropy_bound=BOUND)
    algorithm = build_algorithm(
        cfg, rollout, toy.grader(lambda r: r.tokens[:, 0] > -1), pad_id=toy.pad
    )
    start = prepared(toy, config(NAME))
    network, policy, prompts = copy.deepcopy(start.network), start.policy, toy.prompts()
    with torch.no_grad():
        network.head.zero_()
    optimizer = torch.optim.SGD([network.head], lr=1.0)
    means = []
    for k in range(12):
        seed = SEED.at(k)
        rollouts = algorithm.critique.roll_out(network, policy, toy.canvas(prompts), rollout, seed)
        graded = toy.grader(lambda r: r.tokens[:, 0] > -1)(rollouts, prompts)
        batch = algorithm.likelihood.prepare(policy, graded, seed)
        _, (lesson,), _ = algorithm.critique.judge(
            network, policy, prompts, graded, batch, algorithm.advantage(graded), seed
        )
        means.append(float(lesson.old.mean()))
        list(fit(network, algorithm.critique, lesson, torch.arange(12), 64))
        optimizer.step()
        optimizer.zero_grad()
    assert means[0] == 0.0
    assert means[-1] > 0.05


def test_a_trained_bound_needs_its_sampler(toy) -> None:
    with pytest.raises(
        ValueError, match="entropy_bound must be positive with algorithm 'diffpo_joint'"
    ):
        build_algorithm(
            replace(COMMON, algorithm=NAME), toy.rollout, toy.grader(None), pad_id=toy.pad
        )
