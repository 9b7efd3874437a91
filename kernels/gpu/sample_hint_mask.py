"""sample_hint_mask in Triton: one program per row; nothing returns to the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import select
from .common import halves, on

CHUNKS = 64  # cut at once
POSITIONS = 64  # written at once


@triton.jit
def _sizes(args, at, low, span):
    key_low, key_high, row_id = args
    w0, _, _ = select.row_words(key_low, key_high, at, row_id)
    return low + ((w0.to(tl.uint64) * span.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def _keys(args, at, inside):
    key_low, key_high, row_id = args
    _, w1, w2 = select.row_words(key_low, key_high, at, row_id)
    return select.random_key(w1, w2), inside


@triton.jit
def _count_chunks(args, trace, low, span, CHUNKS: tl.constexpr):
    """How many chunks begin within the trace."""
    begin = tl.zeros((), tl.int64)
    base = tl.zeros((), tl.int64)
    number = tl.zeros((CHUNKS,), tl.int64)
    while begin < trace:
        size = _sizes(args, base + tl.arange(0, CHUNKS), low, span)
        number += (begin + tl.cumsum(size) - size < trace).to(tl.int64)
        begin += tl.sum(size)
        base += CHUNKS
    return tl.sum(number)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _sample_hint_mask_kernel(
    trace_lengths, ratio, row_ids, out,
    length: tl.int64, low: tl.int64, span: tl.int64, key_low: tl.uint32, key_high: tl.uint32,
    CHUNKS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    trace = tl.load(trace_lengths + row)
    args = (key_low, key_high, tl.load(row_ids + row))
    number = _count_chunks(args, trace, low, span, CHUNKS)
    wanted = (number.to(tl.float64) * tl.load(ratio + row)).to(tl.int64)
    bound, shift, ties = select.choose(_keys, args, number, wanted, number, 64, CHUNKS)

    mask = out + row * length
    edge = tl.maximum(tl.minimum(trace, length), 0)
    begin = tl.zeros((), tl.int64)
    base = tl.zeros((), tl.int64)
    seen = tl.zeros((), tl.int64)
    while begin < edge:
        chunk = base + tl.arange(0, CHUNKS)
        size = _sizes(args, chunk, low, span)
        ends = begin + tl.cumsum(size)
        key, real = _keys(args, chunk, chunk < number)
        shown, seen = select.is_chosen(key, real, bound, shift, ties, seen)
        starts = (ends - size)[None, :]
        stop = begin + tl.sum(size)
        position = begin
        while position < tl.minimum(stop, edge):
            at = position + tl.arange(0, POSITIONS)
            owned = (starts <= at[:, None]) & (at[:, None] < ends[None, :]) & shown[None, :]
            covered = tl.max(owned.to(tl.int32), axis=1) > 0
            tl.store(mask + at, covered, mask=at < tl.minimum(stop, edge))
            position += POSITIONS
        begin = stop
        base += CHUNKS
    while edge < length:
        at = edge + tl.arange(0, POSITIONS)
        tl.store(mask + at, at < 0, mask=at < length)
        edge += POSITIONS


def forward(
    trace_lengths: Tensor, length: int, ratio: Tensor, low: int, high: int, key: int, row_ids: Tensor
) -> Tensor:  # fmt: skip
    rows, device = trace_lengths.numel(), trace_lengths.device
    inputs = (x.contiguous() for x in (trace_lengths, ratio, row_ids))
    out = torch.empty(rows, length, dtype=torch.bool, device=device)
    if out.numel():
        with on(out):
            _sample_hint_mask_kernel[(rows,)](
                *inputs, out, length, low, high - low + 1, *halves(key), CHUNKS, POSITIONS
            )
    return out
