from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igpo.rl.advantage import centred, leave_one_out, z_score
from igpo.types import Graded, take

GOLDEN = [1.0, 0, 0, 1, 0, 0]


@pytest.fixture
def of(toy):
    """of(rewards, group sizes) -> Graded of that many rows."""

    def build(rewards: list[float], *sizes: int) -> Graded:
        group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        canvas = take(toy.canvas(toy.prompts(len(sizes)), 1), group)
        values = torch.tensor(rewards)
        return toy.graded(toy.rolled(canvas), values > 0, values)

    return build


@pytest.mark.parametrize(
    ("advantage", "right", "wrong", "tolerance"),
    [
        (centred, 2 / 3, -1 / 3, 1e-7),
        (leave_one_out, 0.8, -0.4, 1e-7),
        (z_score, 1.41421, -0.70711, 1e-5),  # ddof 0; STD_DELTA is below the tolerance
    ],
)
def test_golden_values(of, advantage, right: float, wrong: float, tolerance: float) -> None:
    expected = torch.tensor([right if r else wrong for r in GOLDEN])
    got = advantage(of(GOLDEN, 6))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.floats(-1e3, 1e3, width=32), st.integers(2, 13))
def test_equal_rewards_give_exactly_zero(of, reward: float, size: int) -> None:
    for advantage in (centred, leave_one_out, z_score):
        assert torch.equal(advantage(of([reward] * size, size)), torch.zeros(size))


def test_groups_sum_to_zero_and_are_independent(of) -> None:
    rewards = torch.randn(9).tolist()
    both, first, second = of(rewards, 4, 5), of(rewards[:4], 4), of(rewards[4:], 5)
    for advantage in (centred, leave_one_out, z_score):
        got = advantage(both)
        assert torch.equal(got, torch.cat([advantage(first), advantage(second)]))
        assert abs(float(got[:4].sum())) < 1e-5
        assert abs(float(got[4:].sum())) < 1e-5


def test_leave_one_out_is_a_multiple_of_centred(of) -> None:
    batch = of(torch.randn(7).tolist(), 7)
    torch.testing.assert_close(leave_one_out(batch), 7 / 6 * centred(batch))


def test_z_score_has_unit_population_variance(of) -> None:
    got = z_score(of(torch.randn(8).tolist(), 8))
    assert float(got.var(correction=0)) == pytest.approx(1, abs=1e-4)


def test_rows_of_a_group_need_not_be_neighbours(of) -> None:
    batch, order = of(torch.randn(8).tolist(), 3, 5), torch.randperm(8)
    for advantage in (centred, leave_one_out, z_score):
        torch.testing.assert_close(advantage(take(batch, order)), advantage(batch)[order])


def test_a_group_of_one_has_no_others(of) -> None:
    with pytest.raises(ValueError, match="every group must have at least 2 rows, got a group of 1"):
        leave_one_out(of([1.0, 0.0, 1.0], 2, 1))
