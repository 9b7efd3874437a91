from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from igpo import metrics
from igpo.types import GIVEN, Canvas, Graded, Rollouts

EOS = 9


def rollouts(completion: Tensor, *, eos: int | None = EOS, entropy: float = 2.0) -> Rollouts:
    """Two groups of two rows; the first completion token of each row is a hint, the last came by the early stop."""
    size, length = completion.shape
    tokens = torch.cat([torch.zeros(size, 1, dtype=torch.int64), completion], 1)
    groups = torch.arange(size) // 2
    canvas = Canvas(
        tokens, torch.ones_like(tokens, dtype=torch.bool), tokens, completion == 1, groups, groups, 1, 0, eos
    )  # fmt: skip
    step_map = torch.arange(length).expand(size, -1).clone() - 1
    assert step_map[0, 0] == GIVEN
    num_steps = torch.full((size,), length - 2)
    commit = torch.full((size, length), 100.0)  # never to be counted …
    commit[:, 1:-1] = entropy  # … except where a token was drawn
    return Rollouts(canvas, tokens, step_map, commit, commit, num_steps, 7)


COMPLETIONS = torch.tensor([[1, 2, EOS, EOS], [1, 2, 3, EOS], [1, 2, 3, 4], [EOS, 2, 3, EOS]])


def graded(rewards: list[float], **parts: list[float]) -> Graded:
    values = torch.tensor(rewards)
    return Graded(
        rollouts(COMPLETIONS), values, values > 0.5, torch.zeros(4, dtype=torch.bool), ("",) * 4,
        {name: torch.tensor(part) for name, part in parts.items()},
    )  # fmt: skip


def test_rewards_are_described_within_groups() -> None:
    found = metrics.of_rewards(graded([1.0, 0.0, 0.25, 0.25]))
    assert found["reward"] == 0.375
    assert found["reward_std"] == 0.25  # of (0.5, 0)
    assert found["frac_reward_zero_std"] == 0.5
    assert found["correct"] == 0.25


def test_parts_leave_out_what_a_function_did_not_judge() -> None:
    nan = float("nan")
    found = metrics.of_rewards(graded([0.0] * 4, some=[1.0, nan, 0.0, nan], none=[nan] * 4))
    assert found["rewards/some/mean"] == 0.5
    assert found["rewards/some/std"] == 0.5
    assert math.isnan(found["rewards/none/mean"])
    assert math.isnan(found["rewards/none/std"])


def test_lengths_count_up_to_and_including_the_first_eos() -> None:
    found = metrics.of_rollouts(rollouts(COMPLETIONS))
    lengths = {key.removeprefix("completions/"): v for key, v in found.items() if "length" in key}
    assert lengths == {
        "mean_length": 3.0, "min_length": 1.0, "max_length": 4.0,
        "mean_terminated_length": pytest.approx(8 / 3), "min_terminated_length": 1.0, "max_terminated_length": 4.0,
    }  # fmt: skip
    assert found["completions/clipped_ratio"] == 0.25


def test_lengths_count_up_to_the_end_of_a_turn() -> None:
    found = rollouts(COMPLETIONS)
    found = replace(found, canvas=replace(found.canvas, stop_token_ids=frozenset({3})))
    lengths = metrics.of_rollouts(found)
    assert lengths["completions/mean_length"] == (3 + 3 + 3 + 1) / 4
    assert lengths["completions/clipped_ratio"] == 0


@pytest.mark.parametrize("eos", [None, 77])
def test_without_an_eos_every_completion_is_clipped(eos: int | None) -> None:
    found = metrics.of_rollouts(rollouts(COMPLETIONS, eos=eos))
    assert found["completions/clipped_ratio"] == 1
    assert found["completions/mean_length"] == 4
    assert "completions/mean_terminated_length" not in found


def test_entropy_is_of_drawn_tokens_alone() -> None:
    found = metrics.of_rollouts(rollouts(COMPLETIONS, entropy=1.5))
    assert found["entropy"] == 1.5
    assert found["rollout/nfe_mean"] == 2


def test_means_are_over_the_parts_that_have_the_key() -> None:
    assert metrics.mean([{"a": 1.0, "b": 4.0}, {"a": 3.0}]) == {"a": 2.0, "b": 4.0}
    assert metrics.mean([]) == {}


def test_micro_batches_add_up() -> None:
    total = {"loss": 1.0}
    metrics.add(total, {"loss": 0.5, "kl": 2.0})
    assert total == {"loss": 1.5, "kl": 2.0}


def test_memory_is_reported_on_a_gpu_only() -> None:
    assert metrics.peak_memory(torch.device("cpu")) == {}
