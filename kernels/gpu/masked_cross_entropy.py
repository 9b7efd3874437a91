"""masked_cross_entropy in Triton: rows that count are read once; the gradient reads them again and is written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igpo.ops import _rows

from . import row_stats
from .common import on
from .row_stats import LOG2E, ROWS, UNSPECIALIZED, Tiles

SUM_BLOCK = 1024  # losses that sum_kernel adds at a time (chosen)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _finish_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, targets, weights, parts,
    row_loss, row_max, log_sum, rows: tl.int64, vocab, ignore_index: tl.int64, tiles, scale2,
    PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=0)
    keep = inside & (target != ignore_index)
    if weights is not None:
        weight = tl.load(weights + row, mask=inside, other=0.0)
        keep = keep & (weight != 0.0)
    top, total, _ = row_stats.combined(parts, row, keep, rows, tiles, scale2, PADDED, False)
    log = row_stats.log_sum_of(top, total)
    chosen = row_stats.chosen_logit(
        logits, row, target, keep, vocab, inner, outer_stride, inner_stride
    )
    loss = log - (chosen - top)
    if weights is not None:
        loss *= weight
    tl.store(row_loss + row, tl.where(keep, loss, 0.0), mask=inside)
    tl.store(row_max + row, tl.where(keep, top, 0.0), mask=inside)
    tl.store(log_sum + row, tl.where(keep, log, 0.0), mask=inside)


@triton.jit(do_not_specialize=("rows",))
def _sum_kernel(values, divisor, out, rows: tl.int64, BLOCK: tl.constexpr):
    """One program: the sum in float64, in an order that depends on nothing but `rows`."""
    sums = tl.zeros([BLOCK], tl.float64)
    first = tl.zeros([], tl.int64)
    while first < rows:  # the interpreter cannot make a range of an argument
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(values + at, mask=at < rows, other=0.0).to(tl.float64)
        first += BLOCK
    total = tl.sum(sums, 0)
    if divisor is not None:
        total /= tl.load(divisor).to(tl.float64)
    tl.store(out, total.to(tl.float32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    upstream, upstream_stride, logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    targets, weights, divisor, row_max, log_sum, out, out_inner: tl.int64, out_outer_stride: tl.int64,
    out_inner_stride: tl.int64, vocab, ignore_index: tl.int64, tiles, scale2, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx_v = c (p_v - (v == y)),  c = upstream * weight / divisor; upstream, weights, divisor: or None for 1."""
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    to = out + row_stats.row_start(row, out_inner, out_outer_stride, out_inner_stride) + at
    if row_stats.counts(row, targets, weights, ignore_index):
        start = row_stats.row_start(row, inner, outer_stride, inner_stride)
        x = tl.load(logits + start + at, mask=inside, other=float("-inf")).to(tl.float32)
        target = tl.load(targets + row)
        token = (target >= 0) & (target < vocab)
        factor = tl.where(token, 1.0, float("nan")).to(tl.float64)
        if upstream is not None:
            factor *= tl.load(upstream + row * upstream_stride)
        if weights is not None:
            factor *= tl.load(weights + row)
        if divisor is not None:
            factor /= tl.load(divisor).to(tl.float64)
        c = factor.to(tl.float32)
        u = row_stats.exponent(x, row_stats.shift_of(tl.load(row_max + row)), scale2)
        grad = tl.exp2(u) * (c * tl.exp(-tl.load(log_sum + row)))
        grad = tl.where(at == target, grad - c, grad)
        tl.store(to, grad.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(to, tl.zeros([BLOCK], out.dtype.element_ty), mask=inside)


def _row_losses(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, row_max, log_sum) of each row, not reduced; targets and weights contiguous."""
    logits, where = _rows.laid_out(logits)
    row_loss, row_max, log_sum = _rows.per_row(logits, 3)
    rows = targets.numel()
    if rows:
        with on(logits):
            parts, tiles = row_stats.stats(
                logits, where, targets, weights, ignore_index, LOG2E, False
            )
            _finish_kernel[(triton.cdiv(rows, ROWS),)](
                logits, *where, targets, weights, parts, row_loss, row_max, log_sum, rows,
                logits.shape[-1], ignore_index, tiles.count, LOG2E, tiles.padded, ROWS, num_warps=1,
            )  # fmt: skip
    return row_loss, row_max, log_sum


def forward(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    targets, weights = targets.contiguous(), _rows.contiguous(weights)
    losses, row_max, log_sum = _row_losses(logits, targets, weights, ignore_index)
    if reduction == "none":
        return losses, row_max, log_sum
    loss = losses.new_empty(())
    divisor = _rows.device_divisor(targets, ignore_index, reduction)
    with on(logits):
        _sum_kernel[(1,)](losses, divisor, loss, losses.numel(), SUM_BLOCK, num_warps=8)
    return loss, row_max, log_sum


def forward_with_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int,
    divisor: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As cuda_forward_with_gradient of igpo/ops/masked_cross_entropy.py, in two reads."""
    targets, weights = targets.contiguous(), _rows.contiguous(weights)
    stats = _row_losses(logits, targets, weights, ignore_index)
    return *stats, _gradient(
        None, 0, logits, targets, weights, divisor, *stats[1:], ignore_index, out
    )


def backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, weights: Tensor | None, row_max: Tensor,
    log_sum: Tensor, ignore_index: int, reduction: str, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out: _rows.gradient_like."""
    divisor = _rows.device_divisor(targets, ignore_index, reduction)
    return _gradient(
        grad_loss.contiguous(), int(reduction == "none"), logits, targets.contiguous(),
        _rows.contiguous(weights), divisor, row_max.contiguous(), log_sum.contiguous(), ignore_index, out,
    )  # fmt: skip


def _gradient(
    upstream: Tensor | None, upstream_stride: int, logits: Tensor, targets: Tensor, weights: Tensor | None,
    divisor: Tensor | None, row_max: Tensor, log_sum: Tensor, ignore_index: int, out: Tensor | None,
) -> Tensor:  # fmt: skip
    grad, grad_where = _rows.gradient_like("masked_cross_entropy", logits, out)
    logits, where = _rows.laid_out(logits)
    vocab = logits.shape[-1]
    tiles = Tiles.of(vocab)
    if targets.numel():
        with on(logits):
            _backward_kernel[(targets.numel() * tiles.count,)](
                upstream, upstream_stride, logits, *where, targets, weights, divisor, row_max, log_sum,
                grad, *grad_where, vocab, ignore_index, tiles.count, LOG2E, tiles.block,
                num_warps=tiles.num_warps,
            )  # fmt: skip
    return grad
