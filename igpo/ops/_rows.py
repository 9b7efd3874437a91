"""What the ops on rows of logits share: the layout C++ wants, the rows that count, the checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _check, _native

DTYPES = tuple(_native.DTYPE_TAG)  # of logits, in every row but the reference
SLICES, UNCUT = (
    8,
    16384,
)  # of a row in CUDA, and the vocabulary up to which there is one (kernels/gpu/row_stats.cuh)
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


def layout(x: Tensor) -> tuple[int, int, int] | None:
    """Where the rows of x (…, V) lie, as (inner, outer_stride, inner_stride): row r begins at
    r // inner * outer_stride + r % inner * inner_stride elements. None where two levels do not say it."""
    levels: list[tuple[int, int]] = []  # (size, stride), the innermost first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = (*levels, (1, 0), (1, 0))[:2]
    return max(1, inner), outer_stride, inner_stride


def laid_out(logits: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The logits and their layout; a copy where they have none (three leading dimensions of unrelated strides)."""
    where = layout(logits)
    if where is None:
        logits = logits.contiguous()
        where = layout(logits)
        assert where is not None
    return logits, where


def gradient_like(
    op: str, logits: Tensor, out: Tensor | None
) -> tuple[Tensor, tuple[int, int, int]]:
    """Where a GPU row writes the gradient of logits, and its layout. out: None allocates; else as logits, or (from
    float32 logits) bfloat16 or float16, or logits itself."""
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dtypes = DTYPES if logits.dtype == torch.float32 else (logits.dtype,)
    _check.tensor(op, "out", out, dtype=dtypes, shape=logits.shape, device=logits.device)
    where = layout(out)
    _check.require(
        where is not None and (out.stride(-1) == 1 or out.shape[-1] == 1), op, "out",
        "have a contiguous last dimension and at most two strides before it", out,
    )  # fmt: skip
    assert where is not None
    return out, where


def refuses(logits: Tensor, *_: object) -> str | None:
    """Why a native row cannot take these logits (or hidden states)."""
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


def per_row(logits: Tensor, count: int) -> list[Tensor]:
    """Uninitialised tensors (…,) in the dtype of the statistics of logits (…, V)."""
    shape, dtype = logits.shape[:-1], wide(logits.dtype)
    return [logits.new_empty(shape, dtype=dtype) for _ in range(count)]


def parts(logits: Tensor) -> Tensor | None:
    """Room for the statistics of a row's slices between two kernels, where rows are cut (kernels/gpu/row_stats.cuh)."""
    if logits.shape[-1] <= UNCUT:
        return None
    return logits.new_empty((logits.shape[:-1].numel(), SLICES, 4), dtype=torch.float32)


def device_divisor(targets: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """As divisor, for GPU rows: () int64 where the targets are, so that the host does not wait; None is 1."""
    if reduction != "mean":
        return None
    return (targets != ignore_index).sum().clamp(min=1)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def once_differentiable(op: str) -> dict[str, Callable]:
    """For register(): a backward op whose own backward says that there is none."""

    def setup_context(ctx: object, inputs: Sequence, output: object) -> None:
        pass

    def backward(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(f"{op}: second derivatives are not implemented.")

    return {"setup_context": setup_context, "backward": backward}
