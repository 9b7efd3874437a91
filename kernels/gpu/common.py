"""What the Triton kernels share: where they run, random numbers (igpo/ops/_philox.py, bit for bit).

Everything is written so that Triton's interpreter computes the same: it is how these kernels are tested without a GPU
(`TRITON_INTERPRET=1` before triton is imported).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device current, which Triton launches on."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def halves(key: int) -> tuple[int, int]:
    """A 64-bit key as the two 32-bit words that `philox` takes."""
    return key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF


@triton.jit
def philox(key_low, key_high, position, index, row_id):
    """Four uint32 tensors. key_low, key_high: uint32, from `halves`; position and index of 32 bits, row_id int64.

    Kernels annotate keys as tl.uint32 and leave them unspecialised: else every seed could compile anew.
    """
    c0, c1 = position.to(tl.uint32), index.to(tl.uint32)
    c2, c3 = row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32)
    k0, k1 = key_low.to(tl.uint32), key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, c2 * 0xCD9E8D57, high0 ^ c3 ^ k1, c0 * 0xD2511F53
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform53(high, low):
    """52 random bits -> float64 in (0, 1), exact."""
    bits = (high.to(tl.uint64) << 20) | (low >> 12).to(tl.uint64)
    return (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
