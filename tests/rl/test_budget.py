"""Rows of a batch up to a budget of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import SEED, config, gradient, prepared

from igpo.rl.algorithms import build_algorithm
from igpo.rl.likelihood.evaluate import packed
from igpo.types import Seed

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(LENGTHS, st.integers(0, 60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_as_many_rows_as_fit_whatever_their_order(
    sizes: list[int], budget: int, seed: int, random
) -> None:
    lengths, rows = torch.tensor(sizes), torch.arange(len(sizes)) + 40
    kept = packed(lengths, budget, rows, Seed(seed))
    assert int(lengths[kept].sum()) <= budget
    if not kept.all():  # the next of the order is among those left out
        assert int(lengths[kept].sum() + lengths[~kept].max()) > budget
    shuffled = torch.tensor(random.sample(range(len(sizes)), len(sizes)))
    assert torch.equal(
        packed(lengths[shuffled], budget, rows[shuffled], Seed(seed)), kept[shuffled]
    )


def test_every_row_has_the_same_chance() -> None:
    kept = torch.stack(
        [packed(torch.full((6,), 5), 12, torch.arange(6), Seed(s)) for s in range(600)]
    )
    assert (kept.sum(1) == 2).all()
    share = kept.double().mean(0)
    assert ((share - 1 / 3).abs() < 5 * (2 / 9 / 600) ** 0.5).all()


def test_lengths_are_counted_up_to_the_first_eos_and_the_rest_is_not_forwarded(toy) -> None:
    cfg = replace(config("c3po"), mask_after_eos=True, num_iterations=1)
    step = prepared(toy, cfg)
    policy: Any = step.policy
    completion = step.graded.rollouts.completion.clone()
    completion[:, 4] = toy.eos  # 5 tokens each
    tokens = torch.cat([step.graded.rollouts.tokens[:, : -toy.length], completion], 1)
    graded = replace(step.graded, rollouts=replace(step.graded.rollouts, tokens=tokens))
    for budget, rows in ((60, 12), (22, 4)):
        method = replace(cfg.method, token_budget=budget)
        algorithm = build_algorithm(
            replace(cfg, method=method), toy.rollout, toy.grader(None), pad_id=toy.pad
        )
        batch = algorithm.likelihood.prepare(policy, graded, SEED)
        assert batch.token_mask[0].sum(1).tolist().count(5) == rows
        assert int(batch.token_mask[0].sum()) == 5 * rows
        policy.forwards.clear()
        algorithm.likelihood(policy, batch, 0)
        assert [len(x) for x in policy.forwards] == [rows]


def test_a_budget_no_completion_fits_is_refused(toy) -> None:
    cfg = replace(config("c3po"), method=replace(config("c3po").method, token_budget=15))
    with pytest.raises(
        ValueError, match="token_budget must be at least max_completion_length=16, got 15"
    ):
        build_algorithm(cfg, toy.rollout, toy.grader(None), pad_id=toy.pad)


def test_a_large_budget_is_the_divisor_alone(toy) -> None:
    method = replace(config("c3po").method, token_budget=192)
    whole, loss, _ = gradient(prepared(toy, replace(config("c3po"), method=method)))
    twice, half, _ = gradient(
        prepared(toy, replace(config("c3po"), method=replace(method, token_budget=384)))
    )
    torch.testing.assert_close(whole, 2 * twice)
    assert loss == pytest.approx(2 * half)
