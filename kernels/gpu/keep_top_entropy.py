"""keep_top_entropy in Triton: a program per row; 5 bytes read per position and pass, 1 written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import select
from .common import on


@triton.jit
def _keys(args, at, inside):
    """Entropies in descending order as ascending integers; NaN and -inf last, -0 equal to 0."""
    entropy, candidates = args
    value = tl.load(entropy + at, mask=inside, other=0.0)
    value = tl.where(value == value, value, -float("inf")) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    ascending = bits ^ ((bits >> 31) | -2147483648)
    key = (~ascending).to(tl.uint32, bitcast=True).to(tl.uint64)
    return key, inside & (tl.load(candidates + at, mask=inside, other=0) != 0)


@triton.jit
def _keep_top_entropy_kernel(
    entropy, candidates, out, fraction, length: tl.int64, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * length
    args = (entropy + row, candidates + row)
    eligible = select.count_eligible(_keys, args, length, BLOCK)
    count = (eligible.to(tl.float64) * tl.load(fraction)).to(tl.int64)
    count = tl.maximum(count, tl.minimum(eligible, 1))
    bound, shift, ties = select.choose(_keys, args, length, count, eligible, 32, BLOCK)
    begin = tl.zeros((), tl.int64)
    seen = tl.zeros((), tl.int64)
    while begin < length:
        at = begin + tl.arange(0, BLOCK)
        key, may = _keys(args, at, at < length)
        chosen, seen = select.is_chosen(key, may, bound, shift, ties, seen)
        tl.store(out + row + at, chosen, mask=at < length)
        begin += BLOCK


def forward(entropy: Tensor, candidates: Tensor, fraction: float) -> Tensor:
    entropy, candidates = entropy.contiguous(), candidates.contiguous()
    out = torch.empty_like(candidates)
    rows, length = out.shape
    if out.numel():
        exact = torch.full((1,), fraction, dtype=torch.float64, device=out.device)
        with on(out):
            _keep_top_entropy_kernel[(rows,)](
                entropy, candidates, out, exact, length, select.block(length)
            )
    return out
