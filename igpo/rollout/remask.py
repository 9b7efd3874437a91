"""Remasking samplers: which committed tokens of the current block become masked again after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from igpo.ops import _philox, _sampling


class BlockState(NamedTuple):
    """A block after a step's commits; (n, w) tensors over its columns."""

    committed: Tensor  # bool: by the policy, and not masked again since
    fresh: Tensor  # bool: of these, at this step
    score: Tensor  # at the commit
    logprob: Tensor  # at the commit
    remaining: Tensor  # (n,) masked positions the schedule leaves after this step
    step: int  # of the block
    steps: int  # of a block
    key: int  # of this step's random numbers
    row_ids: Tensor


Revise = Callable[[BlockState], Tensor]  # -> (n, w) bool


def ranks(score: Tensor, valid: Tensor) -> Tensor:
    """(n, c) int64: place of each column among its row's valid ones, highest score first, lower column in a tie."""
    order = torch.where(valid, score, -torch.inf)
    # an invalid column never stands before a valid one of score -inf
    first = order.sort(dim=1, descending=True, stable=True).indices
    place = valid.gather(1, first).byte().sort(dim=1, descending=True, stable=True).indices
    first = first.gather(1, place)
    columns = torch.arange(score.shape[1], device=score.device).expand_as(first)
    return torch.empty_like(first).scatter_(1, first, columns)


def least_confident(state: BlockState) -> Tensor:
    """Running-confidence remasking: after every masked position was filled, the lowest scores as the schedule says.

    Source: MDPO (arXiv:2508.13148), RCR.
    """
    count = state.committed.sum(1, keepdim=True)
    rank = ranks(state.score, state.committed)
    return state.committed & (rank >= count - state.remaining[:, None])


def remdm_conf(state: BlockState) -> Tensor:
    """Earlier commits, each with probability sigma_max * softmax(-probability at its commit) over all of them.

    sigma_max = min(1, (1 - alpha_s) / alpha_t) with alpha = 1 - t, t from 1 to 0 over the steps of the block.
    Source: ReMDM (arXiv:2503.00307), ReMDM-conf.
    """
    if state.step == 0:
        return torch.zeros_like(state.committed)
    earlier = state.committed & ~state.fresh
    sigma_max = min(1.0, (state.steps - state.step - 1) / state.step)
    weight = torch.where(earlier, (-state.logprob.double().exp()).exp(), 0.0)
    sigma = sigma_max * weight / weight.sum(1, keepdim=True).clamp_min(1e-300)
    shape = earlier.shape
    position = torch.arange(shape[1], device=earlier.device).repeat(shape[0])
    row_ids = state.row_ids[:, None].expand(shape).reshape(-1)
    return earlier & (_sampling.random_score(state.key, position, row_ids).view(shape) < sigma)


def remask_key(seed: int, tick: int) -> int:
    """Of the random numbers of the positions that are masked again after a step."""
    return _philox.key(seed, tick, _philox.STREAM_RANDOM_SCORE)
