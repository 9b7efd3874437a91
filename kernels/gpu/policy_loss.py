"""policy_loss in Triton: tokens of the batch (for "token-mean"), rows, sums of rows; 17 bytes read and 4 written.

Exponentials are of float64: Triton's float32 one errs by more than torch's where exponents are large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpo.ops._rows import unit_stride

from .common import on

PARTS = 128  # partial numbers of tokens, at most
SUMS = 5  # per row: loss, clipped, kl, ratio, tokens
MAX_LOG_RATIO = tl.constexpr(20.0)
TOKEN_MEAN, SEQUENCE_MEAN = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _bounded(x):
    x = tl.where(x < -MAX_LOG_RATIO, -MAX_LOG_RATIO, x)  # NaN stays
    return tl.where(x > MAX_LOG_RATIO, MAX_LOG_RATIO, x)


@triton.jit
def _tokens_kernel(
    mask, parts, stride: tl.int64, rows: tl.int64, length: tl.int64, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros((BLOCK,), tl.int32)
    while row < rows:
        begin = tl.zeros((), tl.int64)
        while begin < length:
            at = begin + tl.arange(0, BLOCK)
            found += (tl.load(mask + row * stride + at, mask=at < length, other=0) != 0).to(
                tl.int32
            )
            begin += BLOCK
        row += tl.num_programs(0)
    tl.store(parts + tl.program_id(0), tl.sum(found.to(tl.float64)))


@triton.jit
def _log_ratio(logprob, old, at, inside, on):
    """log(policy / old), 0 where the mask is off: whatever is stored there is not looked at.

    It is read all the same: a mask that differs within 16 bytes would make the accesses narrow.
    """
    now = tl.load(logprob + at, mask=inside, other=0.0)
    return tl.where(on, now - tl.load(old + at, mask=inside, other=0.0), 0.0)


@triton.jit
def _surrogate(log_ratio, advantage, low, high):
    """-min(rho A, clip(rho) A), its slope by log rho, rho, and whether the clipped term is the smaller one."""
    ratio = tl.exp(_bounded(log_ratio).to(tl.float64)).to(tl.float32)
    inside = tl.where(ratio < 1.0 - low, 1.0 - low, ratio)
    inside = tl.where(inside > 1.0 + high, 1.0 + high, inside)
    plain, limited = ratio * advantage, inside * advantage
    clipped = limited < plain
    slope = tl.where(clipped | (tl.abs(log_ratio) >= MAX_LOG_RATIO), 0.0, -plain)
    return tl.where(clipped, -limited, -plain), slope, ratio, clipped


@triton.jit
def _divergence(delta, KL: tl.constexpr):
    """The estimate of the KL divergence and its slope; 0 k1, 1 k2, 2 k3."""
    if KL == 0:
        return delta, delta * 0.0 + 1.0
    if KL == 1:
        return 0.5 * delta * delta, delta
    wide = delta.to(tl.float64)
    rise = tl.exp(_bounded(-wide)) - 1.0
    slope = tl.where(tl.abs(delta) < MAX_LOG_RATIO, -rise, 1.0)
    return (rise + wide).to(tl.float32), slope.to(tl.float32)


@triton.jit
def _rows_kernel(
    logprob, old, advantages, mask, ref, grad, parts, sums,
    logprob_stride: tl.int64, old_stride: tl.int64, advantage_stride: tl.int64, mask_stride: tl.int64,
    ref_stride: tl.int64, rows: tl.int64, length: tl.int64,
    low, high, kl_coef, scale,
    SEQUENCE: tl.constexpr, KL: tl.constexpr, AGGREGATE: tl.constexpr, PARTS: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logprob += row * logprob_stride
    old += row * old_stride
    mask += row * mask_stride
    advantage = tl.load(advantages + row * advantage_stride)
    weight = scale
    if AGGREGATE == TOKEN_MEAN:
        part = tl.arange(0, PARTS)
        batch = tl.sum(tl.load(parts + part, mask=part < rows, other=0.0))
        weight = 1.0 / tl.maximum(batch, 1.0).to(tl.float32)
    if SEQUENCE or AGGREGATE == SEQUENCE_MEAN:
        total = tl.zeros((BLOCK,), tl.float64)
        found = tl.zeros((BLOCK,), tl.int32)
        begin = tl.zeros((), tl.int64)
        while begin < length:
            at = begin + tl.arange(0, BLOCK)
            inside = at < length
            on = tl.load(mask + at, mask=inside, other=0) != 0
            found += on.to(tl.int32)
            if SEQUENCE:
                total += _log_ratio(logprob, old, at, inside, on).to(tl.float64)
            begin += BLOCK
        count = tl.maximum(tl.sum(found.to(tl.float64)), 1.0)
        if SEQUENCE:
            # n tokens carry the row's term and each holds 1/n of its slope: n * (1/n) = 1
            log_ratio = tl.sum(total).to(tl.float32) / count.to(tl.float32)
            term, term_slope, ratio, clipped = _surrogate(log_ratio, advantage, low, high)
        if AGGREGATE == SEQUENCE_MEAN:
            weight = 1.0 / (count.to(tl.float32) * rows.to(tl.float32))

    loss = tl.zeros((BLOCK,), tl.float64)
    divergences = tl.zeros((BLOCK,), tl.float64)
    ratios = tl.zeros((BLOCK,), tl.float64)
    clips = tl.zeros((BLOCK,), tl.int32)
    tokens = tl.zeros((BLOCK,), tl.int32)
    begin = tl.zeros((), tl.int64)
    while begin < length:
        at = begin + tl.arange(0, BLOCK)
        inside = at < length
        on = tl.load(mask + at, mask=inside, other=0) != 0
        if not SEQUENCE:
            log_ratio = _log_ratio(logprob, old, at, inside, on)
            term, term_slope, ratio, clipped = _surrogate(log_ratio, advantage, low, high)
        value, slope = term, term_slope
        if ref is not None:
            delta = _log_ratio(logprob, ref + row * ref_stride, at, inside, on)
            estimate, rise = _divergence(delta, KL)
            value += kl_coef * estimate
            slope += kl_coef * rise
            divergences += tl.where(on, estimate, 0.0).to(tl.float64)
        tl.store(grad + row * length + at, tl.where(on, weight * slope, 0.0), mask=inside)
        loss += tl.where(on, weight * value, 0.0).to(tl.float64)
        ratios += tl.where(on, ratio, 0.0).to(tl.float64)
        clips += tl.where(on, clipped.to(tl.int32), 0)
        tokens += on.to(tl.int32)
        begin += BLOCK
    out = sums + row * SUMS
    tl.store(out, tl.sum(loss))
    tl.store(out + 1, tl.sum(clips.to(tl.float64)))
    tl.store(out + 2, tl.sum(divergences))
    tl.store(out + 3, tl.sum(ratios))
    tl.store(out + 4, tl.sum(tokens.to(tl.float64)))


@triton.jit
def _column(sums, rows, COLUMN: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    begin = tl.zeros((), tl.int64)
    while begin < rows:
        row = begin + tl.arange(0, BLOCK)
        total += tl.load(sums + row * SUMS + COLUMN, mask=row < rows, other=0.0)
        begin += BLOCK
    return tl.sum(total)


@triton.jit
def _finish_kernel(
    sums, loss, clip_fraction, kl, ratio_mean, rows: tl.int64, SUMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    tokens = tl.maximum(_column(sums, rows, 4, SUMS, BLOCK), 1.0)
    tl.store(loss, _column(sums, rows, 0, SUMS, BLOCK).to(tl.float32))
    tl.store(clip_fraction, (_column(sums, rows, 1, SUMS, BLOCK) / tokens).to(tl.float32))
    tl.store(kl, (_column(sums, rows, 2, SUMS, BLOCK) / tokens).to(tl.float32))
    tl.store(ratio_mean, (_column(sums, rows, 3, SUMS, BLOCK) / tokens).to(tl.float32))


def forward(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, token_mask: Tensor, ref_logprob: Tensor | None,
    low: float, high: float, sequence: bool, kl_coef: float, kl: int, aggregate: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    if logprob.numel() == 0:
        return *(logprob.new_zeros(()) for _ in range(4)), torch.empty_like(logprob)
    rows, length = logprob.shape
    logprob, old, mask = (unit_stride(x) for x in (logprob, old_logprob, token_mask))
    ref = None if ref_logprob is None else unit_stride(ref_logprob)
    scalars = [logprob.new_empty(()) for _ in range(4)]
    grad = logprob.new_empty(rows, length)
    sums = logprob.new_empty(rows * SUMS, dtype=torch.float64)
    parts = logprob.new_empty(PARTS, dtype=torch.float64)
    block = max(128, min(512, triton.next_power_of_2(length)))
    with on(logprob):
        if aggregate == TOKEN_MEAN.value:
            _tokens_kernel[(min(rows, PARTS),)](mask, parts, mask.stride(0), rows, length, block)
        _rows_kernel[(rows,)](
            logprob, old, advantages, mask, ref, grad, parts, sums,
            logprob.stride(0), old.stride(0), advantages.stride(0), mask.stride(0),
            0 if ref is None else ref.stride(0), rows, length, low, high, kl_coef, scale,
            sequence, kl, aggregate, PARTS, SUMS, block,
        )  # fmt: skip
        _finish_kernel[(1,)](sums, *scalars, rows, SUMS, 128)
    return *scalars, grad
