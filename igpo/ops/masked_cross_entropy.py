"""masked_cross_entropy: weighted cross-entropy over the rows that count (the ELBO of a masked-diffusion model).

Where the gradient is computed. On a CPU in the backward pass, from the logits again: there the exponentials, not the
reads, are most of the time (kernels/README.md). The CUDA row computes it in the forward pass, while a row is on the
chip: 4 bytes a bfloat16 logit in all instead of 6. Then the registered op is called with `with_gradient`, and the
gradient for an upstream of 1 is its last output (empty otherwise). It belongs to the first backward pass, which
multiplies it in place by the upstream gradient; that never leaves the device, and rows that do not count stay 0. The
second backward pass of a retained graph, and one under create_graph, compute it from the logits again. So do all for
  reduction="none": each row has an upstream gradient of its own;
  float16: a stored gradient could underflow before a loss scale reaches it;
  torch.compile: a functional product would read and write the gradient once more;
  Triton: a row does not fit one program, so nothing would be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _native, _rows
from ._dispatch import Op, cpu, cuda, reference, triton
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


def cuda_forward(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str
) -> Results:
    logits, where = _rows.laid_out(logits)
    targets = targets.contiguous()
    row_loss, row_max, log_sum = stats = _rows.per_row(logits, 3)
    _native.cuda(
        "masked_cross_entropy", logits.device, logits, *where, targets, _rows.contiguous(weights), *stats,
        _rows.parts(logits), targets.numel(), logits.shape[-1], ignore_index,
        _native.DTYPE_TAG[logits.dtype],
    )  # fmt: skip
    divisor = _rows.device_divisor(targets, ignore_index, reduction)
    return _cuda_reduced(row_loss, divisor, reduction), row_max, log_sum


def cuda_forward_with_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int,
    divisor: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses of the rows, row_max, log_sum, gradient of Σ losses / divisor). divisor: () int64 on the device, None is
    1; the losses are not divided. out: _rows.gradient_like."""
    grad, grad_where = _rows.gradient_like("masked_cross_entropy", logits, out)
    logits, where = _rows.laid_out(logits)
    targets = targets.contiguous()
    row_loss, row_max, log_sum = stats = _rows.per_row(logits, 3)
    _native.cuda(
        "masked_cross_entropy_with_gradient", logits.device, logits, *where, targets,
        _rows.contiguous(weights), divisor, *stats, _rows.parts(logits), grad, *grad_where,
        targets.numel(), logits.shape[-1], ignore_index, _native.DTYPE_TAG[logits.dtype],
        _native.DTYPE_TAG[grad.dtype],
    )  # fmt: skip
    return row_loss, row_max, log_sum, grad


def cuda_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, weights: Tensor | None, row_max: Tensor,
    log_sum: Tensor, ignore_index: int, reduction: str, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out: _rows.gradient_like."""
    grad, grad_where = _rows.gradient_like("masked_cross_entropy", logits, out)
    logits, where = _rows.laid_out(logits)
    grad_loss, targets, row_max, log_sum = (
        x.contiguous() for x in (grad_loss, targets, row_max, log_sum)
    )
    _native.cuda(
        "masked_cross_entropy_backward", logits.device, grad_loss, int(reduction == "none"), logits,
        *where, targets, _rows.contiguous(weights),
        _rows.device_divisor(targets, ignore_index, reduction), row_max, log_sum, grad, *grad_where,
        targets.numel(), logits.shape[-1], ignore_index, _native.DTYPE_TAG[logits.dtype],
        _native.DTYPE_TAG[grad.dtype],
    )  # fmt: skip
    return grad


def cuda_scale(
    grad: Tensor, grad_loss: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int
) -> Tensor:
    """grad (…, V), contiguous, times the scalar grad_loss, in place; not touched where that is 1 or a row does not
    count."""
    _native.cuda(
        "masked_cross_entropy_scale", grad.device, grad, grad_loss, targets.contiguous(),
        _rows.contiguous(weights), targets.numel(), grad.shape[-1], ignore_index,
        _native.DTYPE_TAG[grad.dtype],
    )  # fmt: skip
    return grad


def _cuda_op_with_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    divisor = _rows.device_divisor(targets, ignore_index, reduction)
    losses, row_max, log_sum, grad = cuda_forward_with_gradient(
        logits, targets, weights, ignore_index, divisor
    )
    return _cuda_reduced(losses, divisor, reduction), row_max, log_sum, grad


def _cuda_reduced(losses: Tensor, divisor: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    loss = losses.new_empty(())
    _native.cuda("sum_rows", losses.device, losses, divisor, loss, losses.numel())
    return loss


OP = Op(
    "masked_cross_entropy",
    (
        cuda(
            forward=cuda_forward,
            forward_with_gradient=_cuda_op_with_gradient,
            backward=cuda_backward,
            scale=cuda_scale,
            refuses=_rows.refuses,
        ),
        triton("masked_cross_entropy", "forward", "backward", refuses=_rows.refuses),
        cpu(forward=cpu_forward, backward=cpu_backward, refuses=_rows.refuses),
        reference(forward=reference_forward, backward=reference_backward),
    ),
)


def _serves(phase: str, instead_of: str, device: torch.device, *args: object) -> bool:
    """Whether the row that runs phase `instead_of` has `phase` too."""
    return phase in OP.choose(instead_of, device, args).run


def _forward(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _rows.check_targets(OP.name, targets, logits.shape[-1], ignore_index)
    args = (logits, targets, weights, ignore_index, reduction)
    if with_gradient:
        return OP("forward_with_gradient", logits.device, *args)
    return *OP("forward", logits.device, *args), logits.new_empty(0)


def _fake(logits: Tensor, targets: Tensor, weights, ignore_index, reduction, with_gradient):
    rows = logits.new_empty(targets.shape, dtype=_rows.wide(logits.dtype))
    loss = rows.new_empty(targets.shape if reduction == "none" else ())
    grad = logits.new_empty(logits.shape if with_gradient else (0,))
    return loss, rows, torch.empty_like(rows), grad


def setup_context(ctx, inputs, output) -> None:
    logits, targets, weights, ignore_index, reduction, with_gradient = inputs
    _, row_max, log_sum, grad = output
    ctx.save_for_backward(logits, targets, weights, row_max, log_sum)
    ctx.options = (ignore_index, reduction)
    # owned by the first backward pass, which writes over it; a traced one (its tensors are of other types) must not
    ctx.grad = grad if with_gradient and type(grad) is Tensor else None
    ctx.mark_non_differentiable(row_max, log_sum, grad)
    ctx.set_materialize_grads(False)  # zeros as large as the logits, for the output `grad`


def backward(ctx, grad_loss: Tensor | None, *_: None):
    if grad_loss is None:
        return None, None, None, None, None, None
    ready = None if torch.is_grad_enabled() else ctx.grad
    args = (grad_loss, *ctx.saved_tensors, *ctx.options)
    if ready is None or not _serves("scale", "backward", grad_loss.device, *args):
        return _backward_op(*args), None, None, None, None, None
    ctx.grad = None
    targets, weights = args[2:4]
    OP("scale", grad_loss.device, ready, grad_loss, targets, weights, ctx.options[0])
    return ready, None, None, None, None, None


_backward_op = register(
    "masked_cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor? weights, Tensor row_max,"
    " Tensor log_sum, int ignore_index, str reduction) -> Tensor",
    lambda grad_loss, *args: OP("backward", grad_loss.device, grad_loss, *args),
    lambda grad_loss, logits, *_: logits.new_empty(logits.shape),
    **_rows.once_differentiable("masked_cross_entropy"),
)
_op = register(
    "masked_cross_entropy(Tensor logits, Tensor targets, Tensor? weights, int ignore_index, str reduction,"
    " bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    backward=backward,
    setup_context=setup_context,
)


def _with_gradient(logits: Tensor, *rest) -> bool:
    """Whether this call computes the gradient in the forward pass (the module says when)."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    if rest[-1] == "none" or logits.dtype == torch.float16:
        return False
    return _serves("forward_with_gradient", "forward", logits.device, logits, *rest)


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
        vocabulary (looked for on the CPU only; on a GPU such a row gives NaN).
        BackendError: a forced backend refuses.
    Accuracy: float32 statistics, the sum over rows in float64; no worse than torch in the input dtype. The gradient is
    rounded once, on CUDA twice where the upstream gradient is not 1. Deterministic; does not depend on the number of
    threads; on a GPU a row's loss and gradient do not depend on the batch.
    Source: the masked-diffusion ELBO, arXiv:2502.09992 (LLaDA), equation 3; torch: cross_entropy(reduction="none").
    """
    op = OP.name
    _check.logits(op, logits)
    _rows.check_target_tensor(op, targets, logits)
    _rows.check_weights(op, weights, logits)
    _rows.check_reduction(op, reduction)
    args = (logits, targets, weights, ignore_index, reduction)
    return _op(*args, _with_gradient(*args))[0]
