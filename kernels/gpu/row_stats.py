"""Statistics of rows of logits in Triton, and the gradient of what is computed from them.

With u_v = (x_v - max) * scale2, scale2 = log2(e) / temperature:  sum = Σ 2^u,  dot = Σ u 2^u. A row is cut into tiles
by its length alone; a program holds one tile, so that logits are read once, and leaves its statistics in memory; a
second kernel combines those of a row, all at once. Nothing depends on the number of rows. NaN or +inf anywhere in a
row, or -inf everywhere, makes its statistics NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
MOST = 8192  # elements of a tile: 16-byte accesses, 32 registers a thread (chosen, to be measured)
ROWS = 16  # that one program of a finishing kernel combines (chosen)
# integers whose value says nothing about alignment: they do not compile anew
UNSPECIALIZED = ("rows", "inner", "out_inner", "ignore_index", "tiles")
# u 2^u is 0 there; u = -inf would give NaN
LOWEST = tl.constexpr(-200.0)
LN2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """How rows of `vocab` are cut: block elements to a tile, count tiles to a row, the latter padded for tl.arange."""

    block: int
    count: int
    padded: int
    num_warps: int

    @classmethod
    def of(cls, vocab: int) -> Tiles:
        block = min(MOST, max(16, triton.next_power_of_2(vocab)))
        count = triton.cdiv(vocab, block)
        return cls(block, count, triton.next_power_of_2(count), min(8, max(1, block // 512)))


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Where a row (int64) begins, in elements (igpo/ops/_rows.py: layout)."""
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def exponent(x, shift, scale2):
    return (x - shift) * scale2


@triton.jit
def shift_of(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def write_tile_stats(
    x, parts, row, rows, tile, scale2, PADDED: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """x: a tile in float32, -inf beyond its end. parts: (3, rows, PADDED): maxima, sums, dots."""
    top = tl.max(x, 0)
    u = exponent(x, shift_of(top), scale2)
    e = tl.exp2(u)
    at = parts + row * PADDED + tile
    tl.store(at, top)
    tl.store(at + rows * PADDED, tl.sum(e, 0))
    if DOT:
        tl.store(at + 2 * rows * PADDED, tl.sum(tl.maximum(u, LOWEST) * e, 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def stats_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, targets, weights, parts,
    rows: tl.int64, vocab, ignore_index: tl.int64, tiles, scale2,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of one row; nothing for rows that do not count."""
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    if counts(row, targets, weights, ignore_index):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        start = row_start(row, inner, outer_stride, inner_stride)
        x = tl.load(logits + start + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        write_tile_stats(x, parts, row, rows, tile, scale2, PADDED, DOT)


@triton.jit
def counts(row, targets, weights, ignore_index):
    """Whether rows count; weights: or None."""
    keep = tl.load(targets + row) != ignore_index
    if weights is not None:
        keep = keep & (tl.load(weights + row) != 0.0)
    return keep


@triton.jit
def combined(
    parts, row, keep, rows, tiles, scale2, PADDED: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """(max, sum, dot) of rows (a tensor of them) from those of their tiles."""
    tile = tl.arange(0, PADDED)
    at = parts + row[:, None] * PADDED + tile[None, :]
    mask = keep[:, None] & (tile < tiles)[None, :]
    tops = tl.load(at, mask=mask, other=float("-inf"))
    top = tl.max(tops, 1)
    # a tile of -inf and NaN alone has sums of 0 or NaN, whatever the maximum
    u = tl.where(tops == float("-inf"), 0.0, exponent(tops, top[:, None], scale2))
    factor = tl.exp2(u)
    sums = tl.load(at + rows * PADDED, mask=mask, other=0.0)
    total = tl.sum(sums * factor, 1)
    dot = total * 0.0
    if DOT:
        dots = tl.load(at + 2 * rows * PADDED, mask=mask, other=0.0)
        dot = tl.sum((dots + tl.maximum(u, LOWEST) * sums) * factor, 1)
    return top, total, dot


@triton.jit
def log_sum_of(top, total):
    return tl.where(top == float("-inf"), float("nan"), tl.log(total))


@triton.jit
def chosen_logit(
    logits, row, target, keep, vocab, inner, outer_stride, inner_stride
):  # fmt: skip
    """Of rows; NaN where the target is no token."""
    token = keep & (target >= 0) & (target < vocab)
    at = row_start(row, inner, outer_stride, inner_stride) + target
    return tl.load(logits + at, mask=token, other=float("nan")).to(tl.float32)


def stats(
    logits: Tensor, where: tuple[int, int, int], targets: Tensor, weights: Tensor | None,
    ignore_index: int, scale2: float, dot: bool,
) -> tuple[Tensor, Tiles]:  # fmt: skip
    """Launches stats_kernel; returns its parts."""
    rows, vocab = targets.numel(), logits.shape[-1]
    tiles = Tiles.of(vocab)
    parts = logits.new_empty((3, rows, tiles.padded), dtype=torch.float32)
    stats_kernel[(rows * tiles.count,)](
        logits, *where, targets, weights, parts, rows, vocab, ignore_index, tiles.count, scale2,
        tiles.block, tiles.padded, dot, num_warps=tiles.num_warps,
    )  # fmt: skip
    return parts, tiles
