"""How unmask_step draws and selects, in plain torch.

`gumbel` is exact: it uses only correctly rounded float64 operations (+ - * / and bit moves) in a fixed order, so every
backend computes the same bits. A backend must not fuse a product with a sum there, and must divide, not multiply by a
reciprocal (csrc/sampling.h is the C++ twin).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _philox

LN2 = 0.69314718055994530942
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # of sqrt(1/2) as float64


def exact_log(x: Tensor) -> Tensor:
    """Natural logarithm of normal float64 x > 0, relative error below 1e-13.

    x = 2^k m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1)/(m + 1), by eight terms of its series.
    """
    bits = x.view(torch.int64)
    k = (bits - SQRT_HALF_BITS) >> 52
    m = (bits - (k << 52)).view(torch.float64)
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    p = torch.full_like(z, 1.0 / 17.0)
    for odd in (15, 13, 11, 9, 7, 5, 3):
        p = p * z + 1.0 / odd
    r = s * (z * p) + s
    return k.double() * LN2 + (r + r)


def gumbel(key: int, position: Tensor, row_id: Tensor, num_tokens: int) -> Tensor:
    """(N, V) float64 Gumbel noise -log(-log u) of the tokens of N positions; position, row_id: (N,) int64.

    u has 52 random bits: words 2 (v % 2) and the next of the Philox counter v // 2. Near u = 1 the logarithm is exact
    to relative precision, so the upper tail reaches -log(2^-53) = 36.7.
    """
    index = torch.arange((num_tokens + 1) // 2, device=position.device)
    words = _philox.philox(key, position[:, None], index, row_id[:, None])
    even, odd = _philox.uniform53(words[0], words[1]), _philox.uniform53(words[2], words[3])
    u = torch.stack((even, odd), dim=-1).flatten(1)[:, :num_tokens]
    return -exact_log(-exact_log(u.contiguous()))


def gumbel_argmax(
    logits: Tensor, temperature: float, key: int, position: Tensor, row_id: Tensor
) -> Tensor:
    """(N,) int64: argmax of logits/temperature + noise, the lower id in a tie; logits (N, V) float64."""
    divisor = logits.new_full((), temperature)  # a Python scalar may become a reciprocal product
    return (logits / divisor + gumbel(key, position, row_id, logits.shape[1])).argmax(-1)


def inverse_cdf(p: Tensor, key: int, position: Tensor, row_id: Tensor) -> Tensor:
    """(N,) int64: the first token whose cumulative mass exceeds u * total, u one 52-bit uniform per position.

    p: (N, V) float64, not necessarily normalised. Where rounding leaves no such token: the last one with mass.
    """
    words = _philox.philox(key, position, 0, row_id)
    u = _philox.uniform53(words[0], words[1])[:, None]
    mass = p.cumsum(-1)
    token = torch.searchsorted(mass, u * mass[:, -1:], right=True)[:, 0]
    ids = torch.arange(p.shape[1], device=p.device)
    last = torch.where(p > 0, ids, 0).amax(-1)
    return torch.minimum(token, last)


def random_score(key: int, position: Tensor, row_id: Tensor) -> Tensor:
    """(N,) float64 uniforms of 23 random bits, open interval, exact in float32 too."""
    return ((_philox.philox(key, position, 0, row_id)[0] >> 9).double() + 0.5) * 2.0**-23


def select(
    score: Tensor, valid: Tensor, num_unmask: int | Tensor, threshold: float | None
) -> Tensor:
    """(B, L) bool: per row the num_unmask valid positions of highest score (lower position in a tie).

    With a threshold: every valid position at or above it too, and at least one. num_unmask: int or (B,).
    """
    order = torch.where(valid, score, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    count = num_unmask[:, None] if isinstance(num_unmask, Tensor) else num_unmask
    if threshold is None:
        return valid & (rank < count)
    return valid & ((rank < count) | (rank == 0) | (score >= threshold))
