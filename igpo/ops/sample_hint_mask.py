"""sample_hint_mask: which chunks of a reference trace are shown as hints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _check, _native, _philox
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register


def reference_forward(
    trace_lengths: Tensor,
    length: int,
    ratio: Tensor,
    low: int,
    high: int,
    key: int,
    row_ids: Tensor,
) -> Tensor:
    key &= _philox.MASK64
    rows, most = trace_lengths.numel(), _most_chunks(trace_lengths, low)
    chunk = torch.arange(most, device=trace_lengths.device)
    words = _philox.philox(key, chunk[None, :], 0, row_ids[:, None])
    sizes = low + ((words[0] * (high - low + 1)) >> 32)
    ends = sizes.cumsum(1)
    is_real = (ends - sizes) < trace_lengths[:, None]  # a chunk that starts within the trace
    shown = _lowest_keys(words[1], words[2], is_real, (is_real.sum(1) * ratio).floor().long())
    position = torch.arange(length, device=trace_lengths.device).expand(rows, length).contiguous()
    owner = torch.searchsorted(ends, position, right=True)
    return shown.gather(1, owner.clamp(max=most - 1)) & (position < trace_lengths[:, None])


def _most_chunks(trace_lengths: Tensor, low: int) -> int:
    longest = int(trace_lengths.max()) if trace_lengths.numel() else 0
    return max(1, -(-longest // low))


def _lowest_keys(high: Tensor, low: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Per row, the `count` eligible entries with the smallest (high, low) keys; ties go to the lower index."""
    keys = ((high << 31) | (low >> 1)).masked_fill(~eligible, torch.iinfo(torch.int64).max)
    rank = torch.empty_like(keys)
    order = keys.argsort(dim=1, stable=True)
    rank.scatter_(1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(keys))
    return eligible & (rank < count[:, None])


def _cpu_forward(
    trace_lengths: Tensor,
    length: int,
    ratio: Tensor,
    low: int,
    high: int,
    key: int,
    row_ids: Tensor,
) -> Tensor:
    out = torch.empty(trace_lengths.numel(), length, dtype=torch.bool)
    trace_lengths, ratio, row_ids = (
        trace_lengths.contiguous(),
        ratio.contiguous(),
        row_ids.contiguous(),
    )
    _native.module().sample_hint_mask(
        trace_lengths.data_ptr(), ratio.data_ptr(), row_ids.data_ptr(), out.data_ptr(),
        trace_lengths.numel(), length, low, high, key & _philox.MASK64, _native.num_threads(),
    )  # fmt: skip
    return out


def _cuda_forward(
    trace_lengths: Tensor, length: int, ratio: Tensor, low: int, high: int, key: int, row_ids: Tensor
) -> Tensor:  # fmt: skip
    rows, device = trace_lengths.numel(), trace_lengths.device
    inputs = (x.contiguous() for x in (trace_lengths, ratio, row_ids))
    out = torch.empty(rows, length, dtype=torch.bool, device=device)
    _native.cuda(
        "sample_hint_mask", device, *inputs, out, rows, length, low, high, key & _philox.MASK64
    )
    return out


OP = Op(
    "sample_hint_mask",
    (
        cuda(forward=_cuda_forward),
        triton("sample_hint_mask", "forward"),
        cpu(forward=_cpu_forward),
        reference(forward=reference_forward),
    ),
)


def _forward(trace_lengths: Tensor, length: int, ratio: Tensor, *args) -> Tensor:
    _check.in_unit_interval(OP.name, "ratio", ratio)
    return OP("forward", trace_lengths.device, trace_lengths, length, ratio, *args)


_op = register(
    "sample_hint_mask(Tensor trace_lengths, int length, Tensor ratio, int low, int high, int key, Tensor row_ids)"
    " -> Tensor",
    _forward,
    lambda trace_lengths, length, *_: trace_lengths.new_empty(
        (trace_lengths.shape[0], length), dtype=torch.bool
    ),
)


def sample_hint_mask(
    trace_lengths: Tensor,
    length: int,
    *,
    ratio: float | Tensor,
    chunk_size: tuple[int, int] = (5, 10),
    seed: int,
    step: int = 0,
    row_ids: Tensor | None = None,
) -> Tensor:
    """Cuts each trace into chunks and chooses the ones to show: the positions of IGPO's hints.

        sizes ~ U{low..high};  N chunks cover the trace;  floor(ratio N) of them, without replacement, are True

    Args:
        trace_lengths: (B,) int64, tokens of each trace that may be shown.
        length: L, width of the mask; positions beyond it, or beyond the trace, are False.
        ratio: eta in [0, 1], a number or (B,) float32 | float64. The product with N is taken in float64.
        chunk_size: (low, high), 1 <= low <= high. The last chunk may be shorter and counts as a chunk.
        seed, step: name the random stream.
        row_ids: (B,) int64, identity of each sequence; default 0..B-1. A row depends on (seed, step, row id) only.
    Returns:
        (B, L) bool. The same bits on every backend.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, ratio outside [0, 1] (a tensor is looked at on the
        CPU only: elsewhere the host would have to wait), or an empty chunk range.
    Source: arXiv:2509.10396, section 3 (chunk segmentation and the ratio eta).
    """
    op = OP.name
    _check.tensor(op, "trace_lengths", trace_lengths, dtype=torch.int64)
    _check.require(
        trace_lengths.dim() == 1, op, "trace_lengths", "have one dimension", trace_lengths
    )
    low, high = chunk_size
    _check.require(
        1 <= low <= high < 2**31,
        op,
        "chunk_size",
        "be (low, high) with 1 <= low <= high",
        chunk_size,
    )
    _check.require(length >= 0, op, "length", "be >= 0", length)
    rows, device = trace_lengths.shape[0], trace_lengths.device
    ratios = _ratios(op, ratio, rows, device)
    ids = _check.row_ids(op, row_ids, rows, device)
    key = _philox.signed_key(seed, step, _philox.STREAM_HINT)
    return _op(trace_lengths, length, ratios, low, high, key, ids)


def _ratios(op: str, ratio: float | Tensor, rows: int, device: torch.device) -> Tensor:
    """(B,) float64 in [0, 1]."""
    if not isinstance(ratio, Tensor):
        in_range = isinstance(ratio, float | int) and 0 <= ratio <= 1 and math.isfinite(ratio)
        _check.require(in_range, op, "ratio", "lie in [0, 1]", ratio)
        return torch.full((rows,), float(ratio), dtype=torch.float64, device=device)
    _check.tensor(
        op, "ratio", ratio, dtype=(torch.float32, torch.float64), shape=(rows,), device=device
    )
    return ratio.double()
