"""token_logprob in Triton: rows that count are read once; the backward pass reads them again."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igpo.ops import _rows

from . import row_stats
from .common import on
from .row_stats import LN2, LOG2E, LOWEST, ROWS, UNSPECIALIZED, Tiles


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _finish_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, targets, parts, logprob,
    entropy, row_max, log_sum, rows: tl.int64, vocab, ignore_index: tl.int64, tiles, scale, scale2,
    PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=0)
    keep = inside & (target != ignore_index)
    top, total, dot = row_stats.combined(parts, row, keep, rows, tiles, scale2, PADDED, True)
    log = row_stats.log_sum_of(top, total)
    chosen = row_stats.chosen_logit(
        logits, row, target, keep, vocab, inner, outer_stride, inner_stride
    )
    h = log - dot / total * LN2
    tl.store(logprob + row, tl.where(keep, (chosen - top) * scale - log, 0.0), mask=inside)
    tl.store(entropy + row, tl.where(keep, tl.where(h < 0.0, 0.0, h), 0.0), mask=inside)
    tl.store(row_max + row, tl.where(keep, top, 0.0), mask=inside)
    tl.store(log_sum + row, tl.where(keep, log, 0.0), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    grad_logprob, grad_entropy, logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    targets, entropy, row_max, log_sum, out, out_inner: tl.int64, out_outer_stride: tl.int64,
    out_inner_stride: tl.int64, vocab, ignore_index: tl.int64, tiles, scale, scale2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx_v = scale (g (v == y) - p_v (g + h (log p_v + H))), with g, h the gradients of log p_y and H."""
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    to = out + row_stats.row_start(row, out_inner, out_outer_stride, out_inner_stride) + at
    target = tl.load(targets + row)
    if target != ignore_index:
        start = row_stats.row_start(row, inner, outer_stride, inner_stride)
        x = tl.load(logits + start + at, mask=inside, other=float("-inf")).to(tl.float32)
        log = tl.load(log_sum + row)
        h = tl.load(grad_entropy + row)
        token = (target >= 0) & (target < vocab)
        g = tl.where(token, tl.load(grad_logprob + row), float("nan"))
        per_exp = -scale * tl.exp(-log)
        constant = per_exp * (g + h * (tl.load(entropy + row) - log))
        u = row_stats.exponent(x, row_stats.shift_of(tl.load(row_max + row)), scale2)
        grad = tl.exp2(u) * (tl.maximum(u, LOWEST) * (per_exp * h * LN2) + constant)
        grad = tl.where(at == target, grad + scale * g, grad)
        tl.store(to, grad.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(to, tl.zeros([BLOCK], out.dtype.element_ty), mask=inside)


def forward(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, where = _rows.laid_out(logits)
    targets = targets.contiguous()
    logprob, entropy, row_max, log_sum = _rows.per_row(logits, 4)
    rows, scale = targets.numel(), 1.0 / temperature
    if rows:
        with on(logits):
            parts, tiles = row_stats.stats(
                logits, where, targets, None, ignore_index, scale * LOG2E, True
            )
            _finish_kernel[(triton.cdiv(rows, ROWS),)](
                logits, *where, targets, parts, logprob, entropy, row_max, log_sum, rows,
                logits.shape[-1], ignore_index, tiles.count, scale, scale * LOG2E, tiles.padded, ROWS,
                num_warps=1,
            )  # fmt: skip
    return logprob, entropy, row_max, log_sum


def backward(
    grad_logprob: Tensor, grad_entropy: Tensor, logits: Tensor, targets: Tensor, entropy: Tensor,
    row_max: Tensor, log_sum: Tensor, temperature: float, ignore_index: int, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out: _rows.gradient_like."""
    grad, grad_where = _rows.gradient_like("token_logprob", logits, out)
    logits, where = _rows.laid_out(logits)
    grad_logprob, grad_entropy, targets, *stats = (
        x.contiguous() for x in (grad_logprob, grad_entropy, targets, entropy, row_max, log_sum)
    )
    vocab, scale = logits.shape[-1], 1.0 / temperature
    tiles = Tiles.of(vocab)
    if targets.numel():
        with on(logits):
            _backward_kernel[(targets.numel() * tiles.count,)](
                grad_logprob, grad_entropy, logits, *where, targets, *stats, grad, *grad_where, vocab,
                ignore_index, tiles.count, scale, scale * LOG2E, tiles.block, num_warps=tiles.num_warps,
            )  # fmt: skip
    return grad
