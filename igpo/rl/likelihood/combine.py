"""How the log-probs of J draws become the value that an objective sees.

x: (B, J, L), 0 where a draw does not score.   w: the weights of the draws, whose 1/J is in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igpo.types import Draw


def add_up(logprob: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(B, L): sum_j w_j x_j."""
    total = _weighted(logprob[:, 0], draws[0])
    for index, draw in enumerate(draws[1:], 1):
        total = total + _weighted(logprob[:, index], draw)
    return total


def keep_apart(logprob: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(B, J, L): w_j x_j."""
    if all(draw.weight is None for draw in draws):
        return logprob
    return torch.stack([_weighted(logprob[:, j], draw) for j, draw in enumerate(draws)], 1)


def halves(logprob: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(B, 2, L): two estimates, from the first half of the draws and from the second: independent of each other as far
    as the draws are."""
    middle = len(draws) // 2
    parts = ((logprob[:, :middle], draws[:middle]), (logprob[:, middle:], draws[middle:]))
    return torch.stack([2.0 * add_up(x, some) for x, some in parts], 1)


def bounds(logprob: Tensor, draws: Sequence[Draw], *, power: float) -> Tensor:
    """(B, 2, L): the ELBO's term of each token, and the upper bound's, (1/power) log sum_j w_j exp(power x_j).

    0 where no draw reads the token. Source: arXiv:2510.09541 (SPG), equation 9 without its constant.
    """
    score = torch.stack([draw.score for draw in draws], 1)
    weight = torch.stack(
        [draw.score.to(logprob.dtype) if draw.weight is None else draw.weight for draw in draws], 1
    )
    log_weight = weight.to(logprob.dtype).clamp(min=1e-30).log().masked_fill(~score, -torch.inf)
    read = score.any(1)
    # a token that no draw reads: any finite number, so that its gradient is 0 and not NaN
    exponent = torch.where(read[:, None], log_weight + power * logprob, 0.0)
    upper = torch.where(read, exponent.logsumexp(1) / power, 0.0)
    return torch.stack([add_up(logprob, draws), upper], 1)


def _weighted(logprob: Tensor, draw: Draw) -> Tensor:
    return logprob if draw.weight is None else logprob * draw.weight
