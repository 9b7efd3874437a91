"""Counter-based random numbers, the same bits on every backend (csrc/philox.h is the C++ twin).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is mixed from
(seed, step, stream); the counter is (position, index, row id low, row id high). So a number depends on what it is for,
never on batch size, tiling or the order of calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF

# streams: one per purpose, so that ops given the same seed stay independent
STREAM_TOKEN, STREAM_RANDOM_SCORE, STREAM_GUMBEL, STREAM_HINT, STREAM_NOISE = 1, 2, 3, 4, 5


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def key(seed: int, step: int, stream: int) -> int:
    """The 64-bit key of a stream; any Python ints are accepted and taken modulo 2^64."""
    return _splitmix64(_splitmix64(_splitmix64(seed & MASK64) ^ (step & MASK64)) ^ stream)


def signed_key(seed: int, step: int, stream: int) -> int:
    """key() as a two's-complement int64, the integer type of registered ops."""
    value = key(seed, step, stream)
    return value - (1 << 64) if value >> 63 else value


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of the product of 32-bit numbers held in int64."""
    low16, high16 = b & 0xFFFF, b >> 16
    upper = a * high16 + ((a * low16) >> 16)  # < 2^49: no overflow
    return upper >> 16, ((upper << 16) & MASK32) | ((a * low16) & 0xFFFF)


def philox(key: int, position: Tensor, index: Tensor | int, row_id: Tensor) -> tuple[Tensor, ...]:
    """Four independent uniform 32-bit integers per element, as int64 in [0, 2^32).

    position, index, row_id: int64 tensors that broadcast together; position and index are taken modulo 2^32.
    """
    index = torch.as_tensor(index, device=position.device)
    c0, c1, rows = torch.broadcast_tensors(position & MASK32, index & MASK32, row_id)
    c2, c3 = rows & MASK32, (rows >> 32) & MASK32
    k0, k1 = key & MASK32, key >> 32
    for _ in range(10):
        high0, low0 = _mulhilo(0xD2511F53, c0)
        high1, low1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def uniform(bits: Tensor) -> Tensor:
    """32 random bits (int64) -> float64 in the open interval (0, 1): (bits + 1/2) / 2^32, exact."""
    return (bits.double() + 0.5) * 2.0**-32


def uniform53(high: Tensor, low: Tensor) -> Tensor:
    """Two words -> float64 in (0, 1) with 52 random bits: no truncated tails."""
    return (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52
