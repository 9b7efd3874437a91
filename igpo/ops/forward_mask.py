"""forward_mask: the noising of masked diffusion."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _native, _philox
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register
from .sample_hint_mask import _lowest_keys


def reference_forward(
    tokens: Tensor,
    maskable: Tensor,
    t: Tensor,
    mask_id: int,
    key: int,
    row_ids: Tensor,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    position = torch.arange(tokens.shape[1], device=tokens.device)
    words = _philox.philox(key & _philox.MASK64, position[None, :], 0, row_ids[:, None])
    if exact:
        count = (maskable.sum(1) * t).round().long()  # half to even
        masked = _lowest_keys(words[0], words[1], maskable, count)
    else:
        masked = maskable & (_philox.uniform53(words[0], words[1]) < t[:, None])
    return torch.where(masked, mask_id, tokens), masked


def _cpu_forward(
    tokens: Tensor,
    maskable: Tensor,
    t: Tensor,
    mask_id: int,
    key: int,
    row_ids: Tensor,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    tokens, maskable, t, row_ids = (x.contiguous() for x in (tokens, maskable, t, row_ids))
    noisy, masked = torch.empty_like(tokens), torch.empty_like(maskable)
    _native.module().forward_mask(
        tokens.data_ptr(), maskable.data_ptr(), t.data_ptr(), row_ids.data_ptr(), noisy.data_ptr(),
        masked.data_ptr(), tokens.shape[0], tokens.shape[1], mask_id, key & _philox.MASK64, exact,
        _native.num_threads(),
    )  # fmt: skip
    return noisy, masked


def _cuda_forward(
    tokens: Tensor, maskable: Tensor, t: Tensor, mask_id: int, key: int, row_ids: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, maskable, t, row_ids = (x.contiguous() for x in (tokens, maskable, t, row_ids))
    noisy, masked = torch.empty_like(tokens), torch.empty_like(maskable)
    _native.cuda(
        "forward_mask", tokens.device, tokens, maskable, t, row_ids, noisy, masked, *tokens.shape,
        mask_id, key & _philox.MASK64, exact,
    )  # fmt: skip
    return noisy, masked


OP = Op(
    "forward_mask",
    (
        cuda(forward=_cuda_forward),
        triton("forward_mask", "forward"),
        cpu(forward=_cpu_forward),
        reference(forward=reference_forward),
    ),
)


def _forward(tokens: Tensor, maskable: Tensor, t: Tensor, *args) -> tuple[Tensor, Tensor]:
    _check.in_unit_interval(OP.name, "t", t)
    return OP("forward", tokens.device, tokens, maskable, t, *args)


_op = register(
    "forward_mask(Tensor tokens, Tensor maskable, Tensor t, int mask_id, int key, Tensor row_ids, bool exact)"
    " -> (Tensor, Tensor)",
    _forward,
    lambda tokens, maskable, *_: (tokens.new_empty(tokens.shape), maskable.new_empty(tokens.shape)),
)


def forward_mask(
    tokens: Tensor,
    maskable: Tensor,
    t: Tensor,
    *,
    mask_id: int,
    seed: int,
    step: int = 0,
    row_ids: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Replaces maskable tokens by [MASK]: the forward process q(z_t | x) of masked diffusion.

        masked = maskable & (u < t);  noisy = torch.where(masked, mask_id, tokens),  u ~ U(0, 1) per position

    Args:
        tokens: (B, L) int64. Not modified.
        maskable: (B, L) bool, e.g. the answer's positions.
        t: (B,) float32 | float64 in [0, 1], mask ratio per sequence; 0 masks nothing, 1 everything maskable.
        mask_id: the id of [MASK].
        seed, step: name the random stream.
        row_ids: (B,) int64, identity of each sequence; default 0..B-1.
        exact: mask exactly round(t n) of a row's n maskable tokens (half to even), uniformly chosen.
    Returns:
        noisy: (B, L) int64.   masked: (B, L) bool.
        A position depends on (seed, step, row id, position) only (with exact: and on the row's maskable). The same
        bits on every backend.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, or t outside [0, 1] (looked at on the CPU only).
    Source: arXiv:2502.09992 (LLaDA), equation 1; exact counts: its equation 6.
    """
    op = OP.name
    _check.tensor(op, "tokens", tokens, dtype=torch.int64)
    _check.require(tokens.dim() == 2, op, "tokens", "have shape (B, L)", tokens)
    rows, device = tokens.shape[0], tokens.device
    _check.tensor(op, "maskable", maskable, dtype=torch.bool, shape=tokens.shape, device=device)
    _check.tensor(op, "t", t, dtype=(torch.float32, torch.float64), shape=(rows,), device=device)
    ids = _check.row_ids(op, row_ids, rows, device)
    key = _philox.signed_key(seed, step, _philox.STREAM_NOISE)
    return _op(tokens, maskable, t.double(), mask_id, key, ids, exact)
