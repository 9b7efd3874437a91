"""masked_cross_entropy: weighted cross-entropy over the rows that count (the ELBO of a masked-diffusion model).

The gradient is computed in the backward pass, from the logits again. Computing it in the forward pass would save one
read of the logits, but an upstream gradient other than 1 (accumulation, loss scaling) would then cost a read and a
write more, the result would be rounded twice, and a forward pass for evaluation would have to be told apart. On a CPU
the exponentials, not the reads, are most of the time (kernels/README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _native, _rows
from ._dispatch import Op, cpu, reference
from ._library import register

Results = tuple[Tensor, Tensor, Tensor]  # loss: () or (…,); row_max, log_sum: (…,)


def _skipped(targets: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    skip = targets == ignore_index
    return skip if weights is None else skip | (weights == 0)


def reference_forward(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str
) -> Results:
    skip = _skipped(targets, weights, ignore_index)
    x = _rows.widen(logits).masked_fill(skip[..., None], 0.0)
    row_max = x.amax(-1)
    t = x - row_max[..., None]
    log_sum = t.exp().sum(-1).log()
    loss = log_sum - t.gather(-1, targets.masked_fill(skip, 0)[..., None])[..., 0]
    loss = (loss if weights is None else loss * weights).masked_fill(skip, 0.0)
    if reduction != "none":
        loss = loss.sum() / _rows.divisor(targets, ignore_index, reduction)
    return loss, row_max, log_sum


def reference_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, weights: Tensor | None, row_max: Tensor,
    log_sum: Tensor, ignore_index: int, reduction: str,
) -> Tensor:  # fmt: skip
    """d/dx_v = c (p_v - onehot_v), c = grad_loss * weight / divisor."""
    skip = _skipped(targets, weights, ignore_index)
    x = _rows.widen(logits).masked_fill(skip[..., None], 0.0)
    p = (x - row_max[..., None] - log_sum[..., None]).exp()
    scale = grad_loss / _rows.divisor(targets, ignore_index, reduction)
    scale = (scale if weights is None else scale * weights).expand(targets.shape)[..., None]
    grad = (p * scale).scatter_add(-1, targets.masked_fill(skip, 0)[..., None], -scale)
    return grad.masked_fill(skip[..., None], 0.0).to(logits.dtype)


def cpu_forward(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str
) -> Results:
    targets, offsets = targets.contiguous(), _rows.offsets(logits)
    weights = None if weights is None else weights.contiguous()
    row_loss, row_max, log_sum = (torch.empty(targets.shape) for _ in range(3))
    loss = None if reduction == "none" else torch.empty(())
    _native.module().masked_cross_entropy(
        logits.data_ptr(), offsets.data_ptr(), targets.data_ptr(), _rows.address(weights),
        row_loss.data_ptr(), _rows.address(loss), row_max.data_ptr(), log_sum.data_ptr(),
        targets.numel(), logits.shape[-1], ignore_index,
        _rows.divisor(targets, ignore_index, reduction), _native.DTYPE_TAG[logits.dtype],
        _native.num_threads(),
    )  # fmt: skip
    return row_loss if loss is None else loss, row_max, log_sum


def cpu_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, weights: Tensor | None, row_max: Tensor,
    log_sum: Tensor, ignore_index: int, reduction: str,
) -> Tensor:  # fmt: skip
    out = torch.empty(logits.shape, dtype=logits.dtype)
    grad_loss, targets, offsets = (
        grad_loss.contiguous(), targets.contiguous(), _rows.offsets(logits),
    )  # fmt: skip
    weights = None if weights is None else weights.contiguous()
    _native.module().masked_cross_entropy_backward(
        grad_loss.data_ptr(), int(reduction == "none"), logits.data_ptr(), offsets.data_ptr(),
        targets.data_ptr(), _rows.address(weights), row_max.data_ptr(), log_sum.data_ptr(),
        out.data_ptr(), targets.numel(), logits.shape[-1], ignore_index,
        _rows.divisor(targets, ignore_index, reduction), _native.DTYPE_TAG[logits.dtype],
        _native.num_threads(),
    )  # fmt: skip
    return out


OP = Op(
    "masked_cross_entropy",
    (
        cpu(forward=cpu_forward, backward=cpu_backward, refuses=_rows.refuses),
        reference(forward=reference_forward, backward=reference_backward),
    ),
)


def _forward(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str
) -> Results:
    _rows.check_targets(OP.name, targets, logits.shape[-1], ignore_index)
    return OP("forward", logits.device, logits, targets, weights, ignore_index, reduction)


def _fake(logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index, reduction):
    rows = logits.new_empty(targets.shape, dtype=_rows.wide(logits.dtype))
    loss = rows.new_empty(targets.shape if reduction == "none" else ())
    return loss, rows, torch.empty_like(rows)


def setup_context(ctx, inputs, output) -> None:
    logits, targets, weights, ignore_index, reduction = inputs
    _, row_max, log_sum = output
    ctx.save_for_backward(logits, targets, weights, row_max, log_sum)
    ctx.options = (ignore_index, reduction)
    ctx.mark_non_differentiable(row_max, log_sum)


def backward(ctx, grad_loss: Tensor, *_: Tensor):
    return _backward_op(grad_loss, *ctx.saved_tensors, *ctx.options), None, None, None, None


_backward_op = register(
    "masked_cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor? weights, Tensor row_max,"
    " Tensor log_sum, int ignore_index, str reduction) -> Tensor",
    lambda grad_loss, *args: OP("backward", grad_loss.device, grad_loss, *args),
    lambda grad_loss, logits, *_: logits.new_empty(logits.shape),
    **_rows.once_differentiable("masked_cross_entropy"),
)
_op = register(
    "masked_cross_entropy(Tensor logits, Tensor targets, Tensor? weights, int ignore_index, str reduction)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    backward=backward,
    setup_context=setup_context,
)


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
) -> Tensor:
    """Weighted cross-entropy over the rows that count.

        loss = Σ_n weights[n] * cross_entropy(logits[n], targets[n]);   "mean": that / number of rows not ignored

    Args:
        logits: (…, V) float32 | bfloat16 | float16; last dim contiguous; read only. float64: the reference alone.
        targets: (…,) int64 in [0, V), or ignore_index to skip the row, which is then not read.
        weights: (…,) float32 constants (1/t of the ELBO, L/l, advantages, …), or None for ones; they must not require
            grad. A row of weight 0 is not read either: its loss and its gradient are 0 whatever it holds.
        ignore_index: the target that skips a row.
        reduction: "sum"; "mean", over the number of rows not ignored, whatever their weights: the weights are those of
            a Monte-Carlo estimate, and dividing by their sum would bias it (0, not NaN, when there is no such row);
            "none", one loss per row, 0 where skipped.
    Returns:
        () float32, or (…,) with "none"; nats. Rows with NaN, +inf or no finite logit give NaN, a target at -inf gives
        inf (and finite gradients), as torch does.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, weights require grad, or a target is outside the
        vocabulary (looked for on the CPU only).   BackendError: a forced backend refuses.
    Accuracy: float32 statistics, the sum over rows in float64; no worse than torch in the input dtype. Deterministic;
    does not depend on the number of threads.
    Source: the masked-diffusion ELBO, arXiv:2502.09992 (LLaDA), equation 3; torch: cross_entropy(reduction="none").
    """
    op = OP.name
    _check.logits(op, logits)
    _rows.check_target_tensor(op, targets, logits)
    _rows.check_weights(op, weights, logits)
    _rows.check_reduction(op, reduction)
    return _op(logits, targets, weights, ignore_index, reduction)[0]
