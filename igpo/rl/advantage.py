"""Advantages: what a completion earned, measured against the other completions of its prompt.

An advantage is a function Graded -> (B,) float32. Groups are told apart by canvas.group_ids, never by their place in
the batch. Means are taken in float64, where the mean of equal float32 rewards is that reward exactly: a group without a
difference has advantages of exactly 0 and gives no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpo.types import Graded

# added to the standard deviation, so that a nearly equal group does not blow up (ours: below what float32 rewards show)
STD_DELTA = 1e-6


def centred(graded: Graded) -> Tensor:
    """A_i = r_i - mean(r of the group). Source: arXiv:2503.20783 (Dr. GRPO); arXiv:2509.10396, section 3."""
    deviation, _ = _deviations(graded)
    return deviation.float()


def z_score(graded: Graded) -> Tensor:
    """A_i = (r_i - mean) / (std + STD_DELTA), the population standard deviation. Source: arXiv:2402.03300 (GRPO)."""
    deviation, group = _deviations(graded)
    std = _group_mean(deviation.square(), group).sqrt()
    return (deviation / (std + STD_DELTA)).float()


def leave_one_out(graded: Graded) -> Tensor:
    """A_i = r_i - mean(r of the others in the group) = G/(G-1) (r_i - mean). Source: arXiv:2402.14740 (RLOO).

    Raises:
        ValueError: a group of one row has no others.
    """
    deviation, group = _deviations(graded)
    size = torch.bincount(group, minlength=1)[group]
    if bool((size < 2).any()):
        raise ValueError(
            "leave_one_out: every group must have at least 2 rows, got a group of 1. "
            "Raise num_generations or use scale_rewards='none'."
        )
    return (deviation * (size / (size - 1))).float()


def _deviations(graded: Graded) -> tuple[Tensor, Tensor]:
    """(B,) float64 rewards minus the mean of their group; (B,) int64 the group's index, dense."""
    _, group = graded.rollouts.canvas.group_ids.unique(return_inverse=True)
    rewards = graded.rewards.double()
    return rewards - _group_mean(rewards, group), group


def _group_mean(values: Tensor, group: Tensor) -> Tensor:
    """(B,) the mean over each row's group."""
    size = torch.bincount(group, minlength=1)
    total = values.new_zeros(size.shape[0]).index_add(0, group, values)
    return (total / size)[group]


def reward(graded: Graded) -> Tensor:
    """A_i = r_i, for objectives that set the baseline themselves."""
    return graded.rewards.float()


def of_predictions(graded: Graded) -> Tensor:
    """(B, R, 1): what the explorer says each prediction earned, for draws of predictions."""
    assert graded.credit is not None, "an explorer gives it"
    return graded.credit[..., None]


def of_tokens(graded: Graded) -> Tensor:
    """(B, 1, L): what the explorer says each token earned, the same in every draw."""
    assert graded.credit is not None, "an explorer gives it"
    return graded.credit[:, None]


def softmax_difference(graded: Graded, *, psi: float = 1.0) -> Tensor:
    """A_i = softmax_i(psi r) - softmax_i(-psi r) within the group; they sum to 0. Source: arXiv:2507.08838 (wd1)."""
    deviation, group = _deviations(graded)
    up, down = (group_softmax(sign * psi * deviation, group) for sign in (1.0, -1.0))
    return (up - down).float()


def best_and_worst(graded: Graded) -> Tensor:
    """+1 for the rows of the group's highest reward, -1 for those of its lowest, 0 between and where all are equal.

    Pairs for a preference objective from graded rollouts.
    """
    _, group = _deviations(graded)
    rewards, size = graded.rewards.double(), int(group.max()) + 1 if len(group) else 0
    high, low = (
        rewards.new_zeros(size).scatter_reduce(0, group, rewards, kind, include_self=False)[group]
        for kind in ("amax", "amin")
    )
    return ((rewards == high).float() - (rewards == low).float()) * (high > low)


def group_softmax(values: Tensor, group: Tensor) -> Tensor:
    """(B,) softmax over each row's group; group: (B,) int64, dense from 0."""
    size = torch.bincount(group, minlength=1).shape[0]
    top = values.new_zeros(size).scatter_reduce(0, group, values, "amax", include_self=False)
    power = (values - top[group]).exp()
    return power / values.new_zeros(size).index_add(0, group, power)[group]
