"""merge_hints in Triton: 17 bytes read and 9 written per position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on

BLOCK = 1024


@triton.jit
def _merge_hints_kernel(
    tokens, hints, hint_mask, out, generate, count: tl.int64, mask_id: tl.int64, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    hinted = tl.load(hint_mask + at, mask=inside, other=0) != 0
    # both are read everywhere: a mask that differs within 16 bytes would make the accesses narrow
    token = tl.where(
        hinted,
        tl.load(hints + at, mask=inside, other=0),
        tl.load(tokens + at, mask=inside, other=0),
    )
    tl.store(out + at, token, mask=inside)
    tl.store(generate + at, token == mask_id, mask=inside)


def forward(
    tokens: Tensor, hints: Tensor, hint_mask: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    tokens, hints, hint_mask = tokens.contiguous(), hints.contiguous(), hint_mask.contiguous()
    merged, generate = torch.empty_like(tokens), torch.empty_like(hint_mask)
    grid = (triton.cdiv(tokens.numel(), BLOCK),)
    if grid[0]:
        with on(tokens):
            _merge_hints_kernel[grid](
                tokens, hints, hint_mask, merged, generate, tokens.numel(), mask_id, BLOCK
            )
    return merged, generate
