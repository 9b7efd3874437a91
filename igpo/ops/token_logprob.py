"""token_logprob: log-probability of one given token per row, and the row's entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _native, _rows
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register

Stats = tuple[Tensor, Tensor, Tensor, Tensor]  # logprob, entropy, row_max, log_sum: each (…,)


def reference_forward(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int
) -> Stats:
    skip = targets == ignore_index
    x = _rows.widen(logits).masked_fill(skip[..., None], 0.0)
    row_max = x.amax(-1)
    t = (x - row_max[..., None]) / temperature
    e = t.exp()
    total = e.sum(-1)
    log_sum = total.log()
    # a logit of -inf has probability 0 and adds 0 to the entropy, not 0 * -inf
    dot = (t.masked_fill(t == -torch.inf, 0.0) * e).sum(-1)
    entropy = (log_sum - dot / total).clamp(min=0.0)
    chosen = t.gather(-1, targets.masked_fill(skip, 0)[..., None])[..., 0]
    return (
        (chosen - log_sum).masked_fill(skip, 0.0),
        entropy.masked_fill(skip, 0.0),
        row_max,
        log_sum.masked_fill(skip, 0.0),
    )


def reference_backward(
    grad_logprob: Tensor, grad_entropy: Tensor, logits: Tensor, targets: Tensor, entropy: Tensor,
    row_max: Tensor, log_sum: Tensor, temperature: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """d/dx_v = (g (onehot_v - p_v) - h p_v (log p_v + H)) / temperature, with g, h the gradients of log p_y and H."""
    skip = targets == ignore_index
    x = _rows.widen(logits).masked_fill(skip[..., None], 0.0)
    log_p = (x - row_max[..., None]) / temperature - log_sum[..., None]
    p = log_p.exp()
    log_p = log_p.masked_fill(log_p == -torch.inf, 0.0)
    g, h = grad_logprob[..., None], grad_entropy[..., None]
    grad = -p * (g + h * (log_p + entropy[..., None]))
    grad = grad.scatter_add(-1, targets.masked_fill(skip, 0)[..., None], g.to(grad.dtype))
    return (grad / temperature).masked_fill(skip[..., None], 0.0).to(logits.dtype)


def cpu_forward(logits: Tensor, targets: Tensor, temperature: float, ignore_index: int) -> Stats:
    targets, offsets = targets.contiguous(), _rows.offsets(logits)
    logprob, entropy, row_max, log_sum = out = _rows.per_row(logits, 4)
    _native.module().token_logprob(
        logits.data_ptr(), offsets.data_ptr(), targets.data_ptr(), *(x.data_ptr() for x in out),
        targets.numel(), logits.shape[-1], ignore_index, 1.0 / temperature,
        _native.DTYPE_TAG[logits.dtype], _native.num_threads(),
    )  # fmt: skip
    return logprob, entropy, row_max, log_sum


def cpu_backward(
    grad_logprob: Tensor, grad_entropy: Tensor, logits: Tensor, targets: Tensor, entropy: Tensor,
    row_max: Tensor, log_sum: Tensor, temperature: float, ignore_index: int, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out: contiguous, as logits, or logits itself; None allocates."""
    grad = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    offsets = _rows.offsets(logits)
    grad_logprob, grad_entropy, targets, entropy, row_max, log_sum = (
        x.contiguous() for x in (grad_logprob, grad_entropy, targets, entropy, row_max, log_sum)
    )
    _native.module().token_logprob_backward(
        grad_logprob.data_ptr(), grad_entropy.data_ptr(), logits.data_ptr(), offsets.data_ptr(),
        targets.data_ptr(), entropy.data_ptr(), row_max.data_ptr(), log_sum.data_ptr(), grad.data_ptr(),
        targets.numel(), logits.shape[-1], ignore_index, 1.0 / temperature,
        _native.DTYPE_TAG[logits.dtype], _native.num_threads(),
    )  # fmt: skip
    return grad


def cuda_forward(logits: Tensor, targets: Tensor, temperature: float, ignore_index: int) -> Stats:
    logits, where = _rows.laid_out(logits)
    logprob, entropy, row_max, log_sum = out = _rows.per_row(logits, 4)
    _native.cuda(
        "token_logprob", logits.device, logits, *where, targets.contiguous(), *out,
        _rows.parts(logits), targets.numel(), logits.shape[-1], ignore_index, 1.0 / temperature,
        _native.DTYPE_TAG[logits.dtype],
    )  # fmt: skip
    return logprob, entropy, row_max, log_sum


def cuda_backward(
    grad_logprob: Tensor, grad_entropy: Tensor, logits: Tensor, targets: Tensor, entropy: Tensor,
    row_max: Tensor, log_sum: Tensor, temperature: float, ignore_index: int, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out: _rows.gradient_like."""
    grad, grad_where = _rows.gradient_like("token_logprob", logits, out)
    logits, where = _rows.laid_out(logits)
    grad_logprob, grad_entropy, targets, *stats = (
        x.contiguous() for x in (grad_logprob, grad_entropy, targets, entropy, row_max, log_sum)
    )
    _native.cuda(
        "token_logprob_backward", logits.device, grad_logprob, grad_entropy, logits, *where,
        targets, *stats, grad, *grad_where, targets.numel(), logits.shape[-1], ignore_index,
        1.0 / temperature, _native.DTYPE_TAG[logits.dtype], _native.DTYPE_TAG[grad.dtype],
    )  # fmt: skip
    return grad


OP = Op(
    "token_logprob",
    (
        cuda(forward=cuda_forward, backward=cuda_backward, refuses=_rows.refuses),
        triton("token_logprob", "forward", "backward", refuses=_rows.refuses),
        cpu(forward=cpu_forward, backward=cpu_backward, refuses=_rows.refuses),
        reference(forward=reference_forward, backward=reference_backward),
    ),
)


def _forward(logits: Tensor, targets: Tensor, temperature: float, ignore_index: int) -> Stats:
    _rows.check_targets(OP.name, targets, logits.shape[-1], ignore_index)
    return OP("forward", logits.device, logits, targets, temperature, ignore_index)


def setup_context(ctx, inputs, output) -> None:
    logits, targets, temperature, ignore_index = inputs
    _, entropy, row_max, log_sum = output
    ctx.save_for_backward(logits, targets, entropy, row_max, log_sum)
    ctx.options = (temperature, ignore_index)
    ctx.mark_non_differentiable(row_max, log_sum)


def backward(ctx, grad_logprob: Tensor, grad_entropy: Tensor, *_: Tensor):
    grad = _backward_op(grad_logprob, grad_entropy, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None


_backward_op = register(
    "token_logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor logits, Tensor targets, Tensor entropy,"
    " Tensor row_max, Tensor log_sum, float temperature, int ignore_index) -> Tensor",
    lambda grad_logprob, *args: OP("backward", grad_logprob.device, grad_logprob, *args),
    lambda grad_logprob, grad_entropy, logits, *_: logits.new_empty(logits.shape),
    **_rows.once_differentiable("token_logprob"),
)
_op = register(
    "token_logprob(Tensor logits, Tensor targets, float temperature, int ignore_index)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    lambda logits, *_: tuple(_rows.per_row(logits, 4)),
    backward=backward,
    setup_context=setup_context,
)


def token_logprob(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Log-probability of one given token per row, and the row's entropy. Differentiable in both.

        logp = log_softmax(logits / temperature)[targets];   H = -Σ_v p_v log p_v

    Args:
        logits: (…, V) float32 | bfloat16 | float16; last dim contiguous; read only. float64: the reference alone.
        targets: (…,) int64 in [0, V), or ignore_index to skip the row, which is then not read.
        temperature: > 0; both results are those of softmax(logits / temperature).
        ignore_index: the target that skips a row.
    Returns:
        logprob: (…,) float32, nats; 0 where skipped.   entropy: (…,) float32, nats, >= 0; 0 where skipped.
        A logit of -inf has probability 0 and no part in the entropy; when it is the target, logprob is -inf and the
        gradients stay finite. A row with NaN or +inf, or with no finite logit, gives NaN, as torch.log_softmax does.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, temperature <= 0, or a target outside the vocabulary
        (looked for on the CPU only: elsewhere the host would have to wait, and such a row gives NaN).   BackendError: a
        forced backend refuses.
    Accuracy: float32 statistics from one pass, no worse than torch in the input dtype; the gradient has the logits'
    dtype, rounded once. Deterministic; a row's result does not depend on the batch or the number of threads.
    Source: the terms log π(o | …) and H of arXiv:2509.10396, section 3.
    """
    op = OP.name
    _check.logits(op, logits)
    _rows.check_target_tensor(op, targets, logits)
    _rows.check_temperature(op, temperature)
    logprob, entropy, _, _ = _op(logits, targets, float(temperature), ignore_index)
    return logprob, entropy
