"""Training steps of any algorithm on the toy policy of tests/rl, in float64."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from igpo.config import AlgorithmConfig, CriticConfig, DrawsConfig, InpaintConfig, MethodConfig
from igpo.models.critic import CriticModel
from igpo.rl.algorithms import Algorithm, build_algorithm
from igpo.rl.critique import Lesson, fit
from igpo.rl.gradient import accumulate
from igpo.types import Graded, PolicyBatch, Seed

SEED = Seed(4).at(2)
COMMON = AlgorithmConfig(
    num_generations=4, num_iterations=2, beta=0.0, hint_mode="score", importance_sampling_level="token",
    inpaint=InpaintConfig(chunk_min=2, chunk_max=3, entropy_filter=1.0),
    draws=DrawsConfig(num_draws=2, shrink=2, num_slices=3),
    method=MethodConfig(num_predictions=4, kept_predictions=2, num_values=1),
)  # fmt: skip
# what an algorithm cannot do without
OPTIONS = {
    "espo": {"importance_sampling_level": "sequence", "kl_estimator": "k2", "kl_level": "sequence", "beta": 0.1},
    "c3po": {"loss_type": "budget", "method": replace(COMMON.method, token_budget=100)},
    "tbrm": {"beta": 0.5},
    "vrpo": {"beta": 0.5},
    "tracerl": {"kl_to": "old", "beta": 0.1},
    "tracerl_value": {"kl_to": "old", "beta": 0.1, "critic": CriticConfig(gamma=0.9, gae_lambda=0.8)},
    "airl_s": {"critic": CriticConfig(gamma=0.9, step_reward_weight=0.7), "draws": DrawsConfig(shrink=4)},
    "agrpo": {"kl_estimator": "k3_ratio", "beta": 0.1},
    "wd1": {"p_mask_prompt": 0.4},
    "mdpo": {"kl_estimator": "k2", "beta": 0.1},
    "grpo": {"beta": 0.1, "p_mask_prompt": 0.4},
}  # fmt: skip
ROLLOUT = {"diffpo_joint": {"entropy_bound": 0.5}}


@dataclass(frozen=True)
class Step:
    """Everything up to the inner updates."""

    algorithm: Algorithm
    policy: torch.nn.Module
    frozen: torch.nn.Module
    graded: Graded
    advantages: torch.Tensor
    batch: PolicyBatch
    network: CriticModel | None = None
    lessons: tuple[Lesson, ...] = ()


def config(name: str) -> AlgorithmConfig:
    return replace(COMMON, algorithm=name, **OPTIONS.get(name, {}))


def parity(rollouts):
    return rollouts.completion.sum(1) % 2 == 0


def prepared(toy, cfg: AlgorithmConfig, start=None, *, batch_size: int = 64) -> Step:
    """start: the canvas; None: three prompts of different lengths, padded."""
    grade = toy.grader(parity)
    rollout = replace(toy.rollout, rollout_batch_size=batch_size, **ROLLOUT.get(cfg.algorithm, {}))
    algorithm = build_algorithm(cfg, rollout, grade, pad_id=toy.pad)
    make = toy.BlockPolicy if algorithm.likelihood.block_length else toy.Policy
    policy, frozen = make(dtype=torch.float64), make(dtype=torch.float64, seed=1)

    @contextmanager
    def reference():
        yield frozen

    problems = toy.prompts()
    rollouts = written(toy, toy.canvas(problems) if start is None else start)
    graded = algorithm.explorer(policy, problems, grade(rollouts, problems), SEED)
    advantages = algorithm.advantage(graded)
    batch = algorithm.likelihood.prepare(policy, graded, SEED, reference)
    if algorithm.critique is None:
        return Step(algorithm, policy, frozen, graded, advantages, batch)
    network = critic(make(dtype=torch.float64, seed=2))
    advantages, lessons, _ = algorithm.critique.judge(
        network, policy, problems, graded, batch, advantages, SEED
    )
    return Step(algorithm, policy, frozen, graded, advantages, batch, network, lessons)


def critic(body) -> CriticModel:
    """With a head that is not 0."""
    network = CriticModel(body)
    with torch.no_grad():
        network.head.copy_(torch.linspace(-0.4, 0.5, len(network.head)))
    return network


def lesson_gradient(step: Step, *, size: int = 64, scale: float = 1.02):
    """Gradient of the critic's weights and its loss, after its head was scaled."""
    assert step.network is not None
    assert step.algorithm.critique is not None
    network = copy.deepcopy(step.network)
    with torch.no_grad():
        network.head.mul_(scale)
    parts = []
    for lesson in step.lessons:
        rows = torch.arange(len(lesson.tokens))
        parts += list(fit(network, step.algorithm.critique, lesson, rows, size))
    found = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return torch.cat(found), sum(loss for loss, _ in parts), parts


def written(toy, canvas):
    """Rollouts that depend on the row id alone."""
    rollouts = toy.rolled(canvas)
    rows = [torch.Generator().manual_seed(int(row)) for row in canvas.row_ids]
    completion = torch.stack([torch.randint(0, 10, (toy.length,), generator=g) for g in rows])
    return replace(
        rollouts,
        tokens=torch.cat([canvas.tokens[:, : canvas.prompt_length], completion], 1),
        commit_logprob=-completion.double() / 5,
        commit_entropy=completion.double() / 7,
    )


def moved(policy):
    """The policy after an update."""
    policy = copy.deepcopy(policy)
    with torch.no_grad():
        policy.mix.mul_(1.01)
    return policy


def gradient(step: Step, *, size: int = 64, inner: int = 1):
    """Gradient of the weights, loss, and (loss, metrics) of its parts; the policy has moved in inner update 1."""
    policy = moved(step.policy) if inner else copy.deepcopy(step.policy)
    weights = step.algorithm.reweigh(step.graded, step.batch, step.advantages, inner)
    rows = step.algorithm.objective.rows(weights)
    parts = list(accumulate(step.algorithm, policy, step.batch, weights, inner, rows, size))
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return found, sum(loss for loss, _ in parts), parts
