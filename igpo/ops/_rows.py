"""What the ops on rows of logits share: the layout C++ wants, the rows that count, the checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _check, _native

REDUCTIONS = ("none", "sum", "mean")


def widen(x: Tensor) -> Tensor:
    """x in the dtype statistics are computed in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def offsets(logits: Tensor) -> Tensor:
    """(N,) int64: where each row of (…, V) logits begins, in elements from data_ptr()."""
    rows, vocab = logits.shape[:-1].numel(), logits.shape[-1]
    if logits.is_contiguous():
        return torch.arange(0, rows * vocab, vocab)
    out = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        out = out[..., None] + torch.arange(size) * stride
    return out.reshape(-1)


def unit_stride(x: Tensor) -> Tensor:
    """(B, L) with a row's elements beside each other, rows any stride apart; a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def refuses(logits: Tensor, *_: object) -> str | None:
    """Why the C++ row cannot take these logits (or hidden states)."""
    if logits.dtype not in _native.DTYPE_TAG:
        return f"it takes float32, bfloat16 and float16, not {str(logits.dtype).removeprefix('torch.')}"
    return None


def check_targets(op: str, targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises ValueError for a target outside [0, vocab) that is not ignore_index. Only on the CPU: elsewhere looking
    would make the host wait for the device."""
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if outside.any():
        _check.require(
            False, op, "targets", f"be in [0, {vocab}) or ignore_index={ignore_index}",
            int(targets[outside][0]), "Set ignore_index where a row is not to count.",
        )  # fmt: skip


def check_target_tensor(op: str, targets: object, rows: Tensor) -> None:
    """targets: int64, one per row of rows (…, V or D), on its device."""
    _check.tensor(
        op, "targets", targets, dtype=torch.int64, shape=rows.shape[:-1], device=rows.device
    )


def check_weights(op: str, weights: Tensor | None, rows: Tensor) -> None:
    """weights: None, or one constant per row in the dtype of the statistics."""
    if weights is None:
        return
    _check.tensor(
        op, "weights", weights, dtype=wide(rows.dtype), shape=rows.shape[:-1], device=rows.device
    )
    _check.require(
        not (torch.is_grad_enabled() and weights.requires_grad), op, "weights",
        "not require grad (they are constants of the loss)", weights, "Call .detach() first.",
    )  # fmt: skip


def check_reduction(op: str, reduction: str) -> None:
    _check.require(
        reduction in REDUCTIONS, op, "reduction", f"be one of {', '.join(REDUCTIONS)}", reduction
    )


def check_temperature(op: str, temperature: float) -> None:
    _check.require(
        temperature > 0 and math.isfinite(temperature), op, "temperature", "be > 0 and finite",
        temperature, "For greedy decoding take the argmax instead.",
    )  # fmt: skip


def divisor(targets: Tensor, ignore_index: int, reduction: str) -> int:
    """What the sum of losses is divided by; "mean" of no rows is 0, not NaN."""
    if reduction != "mean":
        return 1
    return max(1, int((targets != ignore_index).sum()))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def once_differentiable(op: str) -> dict[str, Callable]:
    """For register(): a backward op whose own backward says that there is none."""

    def setup_context(ctx: object, inputs: Sequence, output: object) -> None:
        pass

    def backward(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(f"{op}: second derivatives are not implemented.")

    return {"setup_context": setup_context, "backward": backward}
