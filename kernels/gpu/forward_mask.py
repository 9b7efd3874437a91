"""forward_mask in Triton: 9 bytes read and 9 written per position, one Philox counter each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import select
from .common import halves, on, uniform53

BLOCK = 512


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _forward_mask_kernel(
    tokens, maskable, t, row_ids, noisy, masked,
    count: tl.int64, length: tl.int64, mask_id: tl.int64, key_low: tl.uint32, key_high: tl.uint32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # positions of all rows as one sequence: accesses are 16 bytes wide whatever the length
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = at // length
    row_id = tl.load(row_ids + row, mask=inside, other=0)
    w0, w1, _ = select.row_words(key_low, key_high, at - row * length, row_id)
    is_masked = uniform53(w0, w1) < tl.load(t + row, mask=inside, other=0.0)
    is_masked &= tl.load(maskable + at, mask=inside, other=0) != 0
    token = tl.load(tokens + at, mask=inside, other=0)
    tl.store(noisy + at, tl.where(is_masked, mask_id, token), mask=inside)
    tl.store(masked + at, is_masked, mask=inside)


@triton.jit
def _keys(args, at, inside):
    maskable, key_low, key_high, row_id = args
    w0, w1, _ = select.row_words(key_low, key_high, at, row_id)
    return select.random_key(w0, w1), tl.load(maskable + at, mask=inside, other=0) != 0


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _forward_mask_exact_kernel(
    tokens, maskable, t, row_ids, noisy, masked,
    length: tl.int64, mask_id: tl.int64, key_low: tl.uint32, key_high: tl.uint32, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * length
    args = (maskable + start, key_low, key_high, tl.load(row_ids + row))
    eligible = select.count_eligible(_keys, args, length, BLOCK)
    count = _half_to_even(eligible.to(tl.float64) * tl.load(t + row))
    bound, shift, ties = select.choose(_keys, args, length, count, eligible, 64, BLOCK)
    begin = tl.zeros((), tl.int64)
    seen = tl.zeros((), tl.int64)
    while begin < length:
        at = begin + tl.arange(0, BLOCK)
        inside = at < length
        key, may = _keys(args, at, inside)
        chosen, seen = select.is_chosen(key, may, bound, shift, ties, seen)
        token = tl.load(tokens + start + at, mask=inside, other=0)
        tl.store(noisy + start + at, tl.where(chosen, mask_id, token), mask=inside)
        tl.store(masked + start + at, chosen, mask=inside)
        begin += BLOCK


@triton.jit
def _half_to_even(x):
    """A non-negative float64 to the nearest int64."""
    down = x.to(tl.int64)
    rest = x - down.to(tl.float64)  # exact
    up = (rest > 0.5) | ((rest == 0.5) & ((down & 1) == 1))
    return down + up.to(tl.int64)


def forward(
    tokens: Tensor, maskable: Tensor, t: Tensor, mask_id: int, key: int, row_ids: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, maskable, t, row_ids = (x.contiguous() for x in (tokens, maskable, t, row_ids))
    noisy, masked = torch.empty_like(tokens), torch.empty_like(maskable)
    rows, length = tokens.shape
    count = tokens.numel()
    canvases = tokens, maskable, t, row_ids, noisy, masked
    if count:
        with on(tokens):
            if exact:
                _forward_mask_exact_kernel[(rows,)](
                    *canvases, length, mask_id, *halves(key), select.block(length)
                )
            else:
                _forward_mask_kernel[(triton.cdiv(count, BLOCK),)](
                    *canvases, count, length, mask_id, *halves(key), BLOCK
                )
    return noisy, masked
