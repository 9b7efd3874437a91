"""What holds for every algorithm: on policy the ratio is 1, and neither micro-batches, padding nor order matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import COMMON, SEED, config, gradient, lesson_gradient, prepared

from igpo.rl.algorithms import ALGORITHMS
from igpo.types import put, take

NAMES = list(ALGORITHMS)
WITH_CRITIC = [name for name, made in ALGORITHMS.items() if made.critique]
ORDER = torch.tensor([5, 0, 11, 3, 7, 1, 10, 8, 2, 9, 4, 6])


def wider(toy, canvas):
    """Three columns of padding more."""
    shape = (len(canvas.tokens), 3)
    return replace(
        canvas,
        tokens=torch.cat([torch.full(shape, toy.pad), canvas.tokens], 1),
        attention_mask=torch.cat([torch.zeros(shape, dtype=torch.bool), canvas.attention_mask], 1),
        position_ids=torch.cat([torch.zeros(shape, dtype=torch.int64), canvas.position_ids], 1),
        prompt_length=canvas.prompt_length + 3,
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_first_inner_update_is_on_policy(toy, name: str) -> None:
    step = prepared(toy, config(name))
    found, _, parts = gradient(step, inner=0)
    assert found.abs().max() > 1e-7
    assert torch.isfinite(found).all()
    ratios = [metrics["logp/ratio_mean"] for _, metrics in parts if "logp/ratio_mean" in metrics]
    assert sum(ratios) == pytest.approx(1.0, abs=1e-12) or not ratios
    old = step.batch.old_logprob[0]
    if old is not None:
        assert torch.equal(step.algorithm.likelihood(step.policy, step.batch, 0), old)
    clipped = [m["clip_ratio/region_mean"] for _, m in parts if "clip_ratio/region_mean" in m]
    assert not any(clipped)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_do_not_matter(toy, name: str) -> None:
    step = prepared(toy, config(name))
    whole, loss, _ = gradient(step)
    for size in (5, 1):
        found, same, _ = gradient(step, size=size)
        torch.testing.assert_close(found, whole, atol=1e-9, rtol=1e-6)
        assert same == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_batch_does_not_matter(toy, name: str) -> None:
    cfg = config(name)
    canvas = toy.canvas(toy.prompts())
    whole, loss, _ = gradient(prepared(toy, cfg, canvas))
    found, same, _ = gradient(prepared(toy, cfg, take(canvas, ORDER)))
    torch.testing.assert_close(found, whole, atol=1e-7, rtol=1e-5)
    assert same == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_matter(toy, name: str) -> None:
    cfg, canvas = config(name), toy.canvas(toy.prompts())
    whole, loss, _ = gradient(prepared(toy, cfg, canvas))
    found, same, _ = gradient(prepared(toy, cfg, wider(toy, canvas)))
    torch.testing.assert_close(found, whole, atol=1e-9, rtol=1e-6)
    assert same == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("name", WITH_CRITIC)
@pytest.mark.parametrize("change", ["micro-batches", "order", "padding"])
def test_a_critic_learns_the_same(toy, name: str, change: str) -> None:
    cfg, canvas = config(name), toy.canvas(toy.prompts())
    whole, loss, _ = lesson_gradient(prepared(toy, cfg, canvas))
    assert whole.abs().max() > 1e-4
    if change == "order":
        canvas = take(canvas, ORDER)
    elif change == "padding":
        canvas = wider(toy, canvas)
    batch_size, size = (5, 2) if change == "micro-batches" else (64, 64)
    step = prepared(toy, cfg, canvas, batch_size=batch_size)
    found, same, _ = lesson_gradient(step, size=size)
    torch.testing.assert_close(found, whole, atol=1e-9, rtol=1e-6)
    assert same == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_gives_the_same_gradient(toy, name: str) -> None:
    cfg = config(name)
    whole, loss, _ = gradient(prepared(toy, cfg))
    found, same, _ = gradient(prepared(toy, replace(cfg, constant_memory=False)))
    torch.testing.assert_close(found, whole, atol=1e-10, rtol=1e-7)
    assert same == pytest.approx(loss, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_leave_nothing_to_learn(toy, name: str) -> None:
    """Advantages of exactly 0, but where the objective sets the baseline itself."""
    step = prepared(toy, config(name))
    same = replace(step.graded, rewards=torch.ones(12))
    advantages = step.algorithm.advantage(same)
    if step.graded.credit is not None:
        return  # of the explorer
    if name in ("dmpo", "tbrm"):
        assert (advantages == 1).all()
        return
    assert (advantages == 0).all()


@pytest.mark.parametrize(
    "likelihood",
    ["elbo", "elbo_pairs", "elbo_blocks", "coupled", "two_mean_field", "slices", "block_exact"],
)
def test_inpainting_composes_with_every_likelihood(toy, likelihood: str) -> None:
    """A hinted row: hint_mode=score gives hints a gradient, condition leaves them visible and unread."""
    for mode in ("score", "condition"):
        cfg = replace(
            COMMON, algorithm="igpo", likelihood=likelihood, hint_mode=mode, importance_sampling_level="sequence"
        )  # fmt: skip
        step = prepared(toy, cfg)
        canvas = step.batch.canvas
        frozen = torch.zeros_like(canvas.frozen)
        frozen[3, 4:9] = True
        graded = put(
            step.graded, torch.tensor([3]),
            take(replace(step.graded, rollouts=replace(
                step.graded.rollouts, canvas=replace(canvas, frozen=frozen),
                step_map=step.graded.rollouts.step_map.masked_fill(frozen, -1),
            )), torch.tensor([3])),
        )  # fmt: skip
        batch = step.algorithm.likelihood.prepare(step.policy, graded, SEED)
        hidden = torch.stack([d.masked[3, canvas.prompt_length :][4:9] for d in batch.draws[0]])
        read = torch.stack([d.score[3, 4:9] for d in batch.draws[0]])
        assert bool(read.any()) == (mode == "score")
        assert bool(hidden.any()) == (mode == "score")
        assert not (read & ~hidden).any()
