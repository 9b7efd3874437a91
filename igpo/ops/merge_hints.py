"""merge_hints: put reference tokens on a canvas."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _native
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register


def reference_forward(
    tokens: Tensor, hints: Tensor, hint_mask: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    merged = torch.where(hint_mask, hints, tokens)
    return merged, merged == mask_id


def _cpu_forward(
    tokens: Tensor, hints: Tensor, hint_mask: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    tokens, hints, hint_mask = tokens.contiguous(), hints.contiguous(), hint_mask.contiguous()
    merged = torch.empty_like(tokens)
    generate = torch.empty_like(hint_mask)
    _native.module().merge_hints(
        tokens.data_ptr(), hints.data_ptr(), hint_mask.data_ptr(), merged.data_ptr(),
        generate.data_ptr(), tokens.numel(), mask_id, _native.num_threads(),
    )  # fmt: skip
    return merged, generate


def _cuda_forward(
    tokens: Tensor, hints: Tensor, hint_mask: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    tokens, hints, hint_mask = tokens.contiguous(), hints.contiguous(), hint_mask.contiguous()
    merged, generate = torch.empty_like(tokens), torch.empty_like(hint_mask)
    _native.cuda(
        "merge_hints", tokens.device, tokens, hints, hint_mask, merged, generate, tokens.numel(), mask_id
    )  # fmt: skip
    return merged, generate


OP = Op(
    "merge_hints",
    (
        cuda(forward=_cuda_forward),
        triton("merge_hints", "forward"),
        cpu(forward=_cpu_forward),
        reference(forward=reference_forward),
    ),
)

_op = register(
    "merge_hints(Tensor tokens, Tensor hints, Tensor hint_mask, int mask_id) -> (Tensor, Tensor)",
    lambda tokens, *args: OP("forward", tokens.device, tokens, *args),
    lambda tokens, hints, hint_mask, mask_id: (
        tokens.new_empty(tokens.shape),
        hint_mask.new_empty(tokens.shape),
    ),
)


def merge_hints(
    tokens: Tensor, hints: Tensor, hint_mask: Tensor, *, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Writes hint tokens onto a canvas and says what is left to generate.

        merged = torch.where(hint_mask, hints, tokens);  generate_mask = merged == mask_id

    Args:
        tokens: (…) int64, the canvas; mask_id where it is masked. Not modified.
        hints: as tokens, the reference tokens; read only where hint_mask.
        hint_mask: as tokens, bool.
        mask_id: the id of [MASK].
    Returns:
        merged: as tokens, int64.   generate_mask: as tokens, bool.
    Raises:
        TypeError, ValueError: not a tensor, or shapes, dtypes or devices disagree.
    Source: arXiv:2509.10396, section 3 (the hint-injected canvas z_hint).
    """
    op = "merge_hints"
    _check.tensor(op, "tokens", tokens, dtype=torch.int64)
    where = {"shape": tokens.shape, "device": tokens.device}
    _check.tensor(op, "hints", hints, dtype=torch.int64, **where)
    _check.tensor(op, "hint_mask", hint_mask, dtype=torch.bool, **where)
    return _op(tokens, hints, hint_mask, mask_id)
