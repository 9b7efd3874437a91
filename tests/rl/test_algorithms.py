from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

from igpo.config import AlgorithmConfig, Config, InpaintConfig
from igpo.rl import presets
from igpo.rl.algorithms import ALGORITHMS, LIKELIHOODS, build_algorithm
from igpo.rl.gradient import accumulate
from igpo.rl.objective import LOSS_TYPES
from igpo.rl.presets import PRESETS
from igpo.rollout import denoise
from igpo.types import Seed

SEED = Seed(2).at(1)
CFG = AlgorithmConfig(num_iterations=2, inpaint=InpaintConfig(chunk_min=2, chunk_max=3))
CLIPPED = [
    name
    for name, made in ALGORITHMS.items()
    if (made.likelihood, made.objective) == ("mean_field", "clip")
]
CLIPPED.remove("c3po")
OF_ROLLOUTS = [name for name, made in LIKELIHOODS.items() if not made.predictions]


def with_likelihood(likelihood: str) -> AlgorithmConfig:
    """The likelihood with an objective that can take it."""
    return replace(
        CFG, likelihood=likelihood, objective="clip_draws" if likelihood == "step_mc" else "clip"
    )


@pytest.fixture
def step(toy):
    """step(cfg, correct) -> everything a training step computes, up to the loss and its gradient."""

    def run(cfg, correct, rows_per_forward=12):
        grade = toy.grader(correct)
        algorithm = build_algorithm(cfg, toy.rollout, grade, pad_id=toy.pad)
        make = toy.BlockPolicy if algorithm.likelihood.block_length else toy.Policy
        policy, frozen = make(), make(seed=1)

        @contextmanager
        def reference():
            yield frozen

        problems = toy.prompts()
        rollouts = denoise(policy, toy.canvas(problems), toy.rollout, SEED)
        graded = algorithm.explorer(policy, problems, grade(rollouts, problems), SEED)
        advantages = algorithm.advantage(graded)
        batch = algorithm.likelihood.prepare(policy, graded, SEED, reference)
        losses = []
        for inner in range(cfg.num_iterations):
            weights = algorithm.reweigh(graded, batch, advantages, inner)
            parts = accumulate(
                algorithm, policy, batch, weights, inner, torch.arange(12), rows_per_forward
            )
            losses += [torch.tensor(loss) for loss, _ in parts]
        return graded, advantages, torch.stack(losses), policy.weight.grad

    return run


def one_correct_per_group(rollouts):
    return rollouts.canvas.row_ids % 4 == 2


def never(rollouts):
    return torch.zeros(len(rollouts.tokens), dtype=torch.bool)


def only_attempts(rollouts):
    """The first rollout is all wrong; of a second one the first two rows of each group are correct."""
    return (rollouts.canvas.row_ids >> 19) % 2 == 1


@pytest.mark.parametrize("likelihood", OF_ROLLOUTS)
@pytest.mark.parametrize("case", ["no group all wrong", "lambda 0", "nothing correct"])
def test_igpo_that_replaces_nothing_is_grpo_bitwise(step, likelihood: str, case: str) -> None:
    correct = {
        "no group all wrong": one_correct_per_group,
        "lambda 0": only_attempts,
        "nothing correct": never,
    }[case]
    cfg = with_likelihood(likelihood)
    if case == "lambda 0":
        cfg = replace(cfg, inpaint=replace(cfg.inpaint, replace_fraction=0.0))
    ours, advantages, losses, gradient = step(replace(cfg, algorithm="igpo"), correct)
    plain, expected, plain_losses, plain_gradient = step(replace(cfg, algorithm="grpo"), correct)
    assert torch.equal(ours.rollouts.tokens, plain.rollouts.tokens)
    assert torch.equal(ours.rewards, plain.rewards)
    assert torch.equal(advantages, expected)
    assert torch.equal(losses, plain_losses)
    assert torch.equal(gradient, plain_gradient)


def test_algorithms_differ_by_the_explorer_alone(toy) -> None:
    grade = toy.grader(never)
    built = {
        name: build_algorithm(replace(CFG, algorithm=name), toy.rollout, grade, pad_id=toy.pad)
        for name in ("grpo", "grpo_resample", "igpo", "trace_in_group")
    }
    base = built["grpo"]
    for name, algorithm in built.items():
        assert algorithm.advantage is base.advantage
        assert algorithm.objective == base.objective
        mine, theirs = algorithm.likelihood, base.likelihood
        assert (mine.draw.func, mine.draw.keywords) == (theirs.draw.func, theirs.draw.keywords)
        assert replace(mine, draw=theirs.draw) == theirs
        assert name == "grpo" or algorithm.explorer != base.explorer
    assert built["grpo_resample"].explorer.cfg.eta_high == 0


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("likelihood", OF_ROLLOUTS)
def test_every_composition_takes_a_step(step, toy, name: str, likelihood: str) -> None:
    cfg = replace(with_likelihood(likelihood), algorithm=name)
    if name == "igpo_released" and likelihood != "mean_field":
        with pytest.raises(ValueError, match="released"):
            step(cfg, only_attempts)
        return
    graded, advantages, losses, gradient = step(
        cfg, traced if name.startswith("trace") else only_attempts
    )
    assert bool(graded.rescued.any()) == (name != "grpo")
    assert bool((advantages != 0).any()) == (name != "grpo")
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any()  # the KL term, at least


def traced(rollouts):
    """Correct: what ends in EOS."""
    return rollouts.completion[:, -1] == rollouts.canvas.eos_id


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_micro_batches_do_not_change_the_gradient(step, loss_type: str, level: str) -> None:
    cfg = replace(CFG, loss_type=loss_type, importance_sampling_level=level)
    _, _, losses, gradient = step(cfg, only_attempts)
    _, _, parts, same = step(cfg, only_attempts, rows_per_forward=5)
    torch.testing.assert_close(parts.view(2, 3).sum(1), losses, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(same, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "ppo"}, "algorithm must be one of grpo, .*got 'ppo'"),
        ({"scale_rewards": "std"}, "scale_rewards must be one of none, group, loo, got 'std'"),
        ({"likelihood": "ppl"}, "likelihood must be one of mean_field"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3"),
        ({"loss_type": "dapo"}, "loss_type must be one of grpo, bnpo, dr_grpo"),
        ({"hint_mode": "hide"}, "hint_mode must be one of score, condition, replay"),
        ({"hint_mode": "replay"}, "hint_mode must be score or condition with likelihood 'mean_field'"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"draws": {"num_slices": 0}}, "num_slices must be at least 1"),
        ({"p_mask_prompt": 1.0}, r"p_mask_prompt must lie in \[0, 1\)"),
        ({"min_mask_ratio": 1.0}, r"min_mask_ratio must lie in \[0, 1\)"),
        ({"epsilon": 0.0}, r"epsilon must lie in \(0, 1\]"),
        ({"epsilon_high": -0.1}, "epsilon_high must be positive, got -0.1"),
        ({"beta": -1.0}, "beta must not be negative"),
        (
            {"likelihood": "step_map", "p_mask_prompt": 0.1},
            "p_mask_prompt must be 0 with likelihood 'step_map'.*or use likelihood='mean_field'",
        ),
        ({"hint_mode": "condition"}, "entropy_filter must be 1 with hint_mode 'condition'.*got 0.2"),
        ({"inpaint": {"layout": "wide"}}, "layout must be one of original, scaled"),
        ({"inpaint": {"trigger": "any"}}, "trigger must be one of correctness, total_reward"),
        ({"inpaint": {"replace_order": "last"}}, "replace_order must be one of random, first"),
        ({"inpaint": {"eta_low": 0.7}}, r"eta_low must lie in \[0, eta_high\], got 0.7"),
        ({"inpaint": {"eta_high": 1.1}}, "eta_high must be at most 1"),
        ({"inpaint": {"chunk_min": 20}}, r"chunk_min must lie in \[1, chunk_max\]"),
        ({"inpaint": {"replace_fraction": 2.0}}, r"replace_fraction must lie in \[0, 1\]"),
        ({"inpaint": {"entropy_filter": 0.0}}, r"entropy_filter must lie in \(0, 1\]"),
        (
            {"algorithm": "igpo_released", "mask_after_eos": True},
            "mask_after_eos must be False: the released code scores the whole canvas.*algorithm='igpo'",
        ),
        ({"algorithm": "igpo_released", "kl_estimator": "k2"}, "kl_estimator must be 'k3'"),
        ({"algorithm": "igpo_released", "likelihood": "step_map"}, "likelihood must be 'mean_field' or"),
        (
            {"algorithm": "igpo_released", "likelihood": "random_mask"},
            "diffusion_steps must be at least 32 for the released mask schedule, got 8",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused(toy, change: dict, message: str) -> None:
    change = {
        key: replace(getattr(CFG, key), **value) if isinstance(value, dict) else value
        for key, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        build_algorithm(replace(CFG, **change), toy.rollout, toy.grader(never), pad_id=toy.pad)


def merged(base, changes):
    """The dataclass with nested changes; an unknown field is an error."""
    known = {field.name for field in fields(base)}
    assert set(changes) <= known, set(changes) - known
    return replace(
        base,
        **{
            key: merged(getattr(base, key), value) if is_dataclass(getattr(base, key)) else value
            for key, value in changes.items()
        },
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configurations_that_build(toy, name: str) -> None:
    config = merged(Config(), PRESETS[name])
    algorithm = build_algorithm(config.rl, config.rollout, toy.grader(never), pad_id=toy.pad)
    assert algorithm.likelihood.num_iterations == config.rl.num_iterations


def test_every_paper_has_its_preset() -> None:
    """c3po and the like too; the baselines are ours."""
    ours = {"grpo_resample", "trace_in_group", "trace_as_hints"}
    assert {preset["rl"]["algorithm"] for preset in PRESETS.values()} == set(ALGORITHMS) - ours


def test_every_number_of_a_preset_has_its_source() -> None:
    for file in sorted((Path(presets.__file__).parent).glob("*.py")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.match(r'\s+"\w+": ([\d."]|True|False)', line):
                told = re.search(r"# .*(\[[a-z0-9 ]+\]|ours|as wd1|weights|values|pairs)", line)
                assert told or '"algorithm"' in line, f"{file.name}: {line.strip()}"


def test_the_published_run_is_the_default() -> None:
    config = merged(Config(), PRESETS["igpo"])
    assert replace(config, lora=Config().lora) == Config()
