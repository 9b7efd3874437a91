"""Values by completion: one batch of all completions, every one drawn on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toys import canvases, small_decoder

from igpo.canvas import GENERATIONS_PER_PROMPT
from igpo.config import RolloutConfig
from igpo.rl.values import mean_rewards, resumed
from igpo.rollout import denoise
from igpo.types import Rollouts, Seed

CFG = RolloutConfig(max_completion_length=16, block_length=8, diffusion_steps=8, temperature=1.0)


def graded(seen: list[Rollouts]) -> Any:
    """Rewards are the sums of the tokens."""

    def grade(rollouts: Rollouts, prompts: object) -> Any:
        seen.append(rollouts)
        return type("Graded", (), {"rewards": rollouts.completion.sum(1).float()})

    return grade


def test_values_are_means_over_completions_of_their_own() -> None:
    policy, canvas, seen = small_decoder(), canvases(), list[Rollouts]()
    done = denoise(policy, canvas, CFG, Seed(1))
    masked = [done.step_map >= 0, done.step_map >= 4]
    starts = [resumed(canvas, done.completion, m) for m in masked]
    values, forwards = mean_rewards(policy, starts, [], CFG, graded(seen), 3, Seed(2))
    (rollouts,) = seen
    assert rollouts.canvas.row_ids.unique().numel() == 2 * 3 * 9
    assert (
        (rollouts.canvas.row_ids // GENERATIONS_PER_PROMPT).view(6, 9)
        == canvas.row_ids // GENERATIONS_PER_PROMPT
    ).all()
    completion = rollouts.completion.view(2, 3, 9, 16)
    torch.testing.assert_close(values, completion.sum(-1).double().mean(1))
    assert forwards == 3 * 9 * (8 + 4)
    assert (completion[1, :, :, :8] == done.completion[:, :8]).all()
    assert completion[0].flatten(0, 1).unique(dim=0).shape[0] == 27


def test_completions_do_not_depend_on_the_batch() -> None:
    policy, canvas, seen = small_decoder(), canvases(), list[Rollouts]()
    for size in (64, 4):
        mean_rewards(
            policy, [canvas], [], replace(CFG, rollout_batch_size=size), graded(seen), 2, Seed(2)
        )
    assert torch.equal(seen[0].tokens, seen[1].tokens)


def test_a_prompt_with_too_few_row_ids_is_refused() -> None:
    canvas = canvases()
    canvas = replace(canvas, row_ids=canvas.row_ids + GENERATIONS_PER_PROMPT // 2)
    with pytest.raises(ValueError, match="below 524288 to have 2 completions each, got 524290"):
        mean_rewards(small_decoder(), [canvas], [], CFG, graded([]), 2, Seed(2))
