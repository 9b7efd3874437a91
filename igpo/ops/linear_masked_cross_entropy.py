"""linear_masked_cross_entropy: masked_cross_entropy of hidden states through an LM head, chunk by chunk.

Here the gradient is computed in the forward pass when there is one to compute: the logits of a chunk are at hand, and
computing them again in the backward pass would cost a matrix product. The backward pass scales what was stored, in
float32, by the upstream gradient.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import _linear, _rows
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register
from .linear_logprob import linear_logprob

Results = tuple[Tensor, Tensor, Tensor, Tensor]  # loss (), gradients of hidden, weight and bias


def _forward(
    row_op: _linear.RowOp, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None,
    bias: Tensor | None, ignore_index: int, reduction: str, chunk_rows: int, compact: bool,
    needs: tuple[bool, bool, bool],
) -> Results:  # fmt: skip
    keep, factors = _factors(hidden, targets, weights, ignore_index, reduction)
    loss = hidden.new_zeros((), dtype=torch.float64)
    with torch.autocast(hidden.device.type, enabled=False):
        head = _linear.Head(
            row_op, hidden, weight, bias, targets, keep, ignore_index, chunk_rows, compact
        )
        grads = _linear.HeadGradient(head, needs, factors)
        for rows, states, logits in head.chunks():
            chosen, factor = head.targets[rows], factors[rows]
            if not any(needs):
                logprob, *_ = row_op.forward(logits, chosen, 1.0, ignore_index)
                loss -= (logprob.double() * factor).sum()
                continue
            losses, grad = row_op.loss_gradient(
                logits, chosen, grads.scaled(factor), ignore_index, grads.room(logits)
            )
            loss += grads.unscaled(losses.double().sum())
            grads.add(rows, states, grad)
            del grad  # before the next chunk makes its own
    of_hidden, of_weight, of_bias = grads.finish()
    of_hidden = of_hidden.view(hidden.shape if needs[0] else (0,))
    return loss.to(_rows.wide(hidden.dtype)), of_hidden, of_weight, of_bias


def _factors(
    hidden: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """Which rows count (…,), and what their cross-entropies are multiplied by (N,): 0 for the others."""
    keep = counted = targets != ignore_index
    if weights is None:
        weights = torch.ones(targets.shape, dtype=_rows.wide(hidden.dtype), device=hidden.device)
    else:
        keep = keep & (weights != 0)
    if reduction == "mean":  # the count stays on the device
        weights = weights / counted.sum().clamp(min=1)
    return keep, weights.where(keep, 0.0).reshape(-1)


OP = Op(
    "linear_masked_cross_entropy",
    (
        cuda(forward=partial(_forward, _linear.CUDA), refuses=_rows.refuses),
        triton(
            "linear_masked_cross_entropy",
            forward=partial(_forward, _linear.TRITON),
            refuses=_rows.refuses,
        ),
        cpu(forward=partial(_forward, _linear.CPU), refuses=_rows.refuses),
        reference(forward=partial(_forward, _linear.REFERENCE)),
    ),
)


def _run(hidden: Tensor, weight: Tensor, targets: Tensor, weights, bias, ignore_index, *rest):
    _rows.check_targets(OP.name, targets, len(weight), ignore_index)
    return OP("forward", hidden.device, hidden, weight, targets, weights, bias, ignore_index, *rest)


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, *rest) -> Results:
    wide = _rows.wide(hidden.dtype)
    return hidden.new_empty((), dtype=wide), *_linear.empty_gradients(
        hidden, weight, rest[-1], wide
    )


def setup_context(ctx, inputs, output) -> None:
    ctx.needs, ctx.dtype = inputs[-1], inputs[0].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx, grad_loss: Tensor, *_: Tensor):
    of_hidden, of_weight, of_bias = (
        _backward_op(grad, grad_loss, ctx.dtype) if need else None
        for grad, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return of_hidden, of_weight, None, None, of_bias, None, None, None, None, None


_backward_op = register(
    "linear_masked_cross_entropy_backward(Tensor grad, Tensor grad_loss, ScalarType dtype) -> Tensor",
    lambda grad, grad_loss, dtype: torch.mul(
        grad, grad_loss, out=grad.new_empty(grad.shape, dtype=dtype)
    ),
    lambda grad, grad_loss, dtype: grad.new_empty(grad.shape, dtype=dtype),
    **_rows.once_differentiable("linear_masked_cross_entropy"),
)
_op = register(
    "linear_masked_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? weights, Tensor? bias,"
    " int ignore_index, str reduction, int chunk_rows, bool compact, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    backward=backward,
    setup_context=setup_context,
)


def linear_masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
    chunk_rows: int | None = None,
) -> Tensor:
    """masked_cross_entropy(hidden @ weight.T + bias, targets), without the logits of all rows at once.

        loss = Σ_n weights[n] * cross_entropy(float32(hidden @ weight.T + bias)[n], targets[n])

    Args:
        hidden: (…, D) float32 | bfloat16 | float16; last dim contiguous. float64: the reference alone.
        weight: (V, D) and bias: (V,) or None, the LM head, in hidden's dtype.
        targets: (…,) int64 in [0, V), or ignore_index to skip the row, which then costs nothing (but see below).
        weights: (…,) float32 constants, or None for ones; they must not require grad. Weight 0 skips the row too.
        ignore_index: the target that skips a row.
        reduction: "sum", "mean" (over the number of rows not ignored) or "none", as masked_cross_entropy's.
        chunk_rows: rows of logits held at a time; None: a tenth of the rows that count, at least 64, at most 256 MiB;
            on a GPU as many as 1 GiB of logits and their gradient has room for (1024 rows at V = 126464).
    Returns:
        () float32, or (…,) with "none"; nats.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, a tensor is sharded, weights require grad,
        chunk_rows <= 0, or a target is outside the vocabulary (looked for on the CPU only).
        BackendError: a forced backend refuses.
    Accuracy: logits, statistics and sums over chunks are float32, the sum of losses float64; gradients are rounded to
    the input dtype once (on a GPU also that of the logits, as the factor of a product). Extra memory: one chunk of
    logits in float32, on a GPU its gradient in the input dtype, and the gradients in float32 until the backward pass;
    that of a weight or bias that does not require one is not computed.
    On a GPU the host waits for the number of rows that count, once, in the forward pass. While a CUDA graph is captured
    and under torch.compile it does not; then rows that do not count are computed and dropped.
    Source: the masked-diffusion ELBO, arXiv:2502.09992 (LLaDA), equation 3.
    """
    op = OP.name
    _linear.check(op, hidden, weight, bias, chunk_rows)
    _rows.check_target_tensor(op, targets, hidden)
    _rows.check_weights(op, weights, hidden)
    _rows.check_reduction(op, reduction)
    if reduction == "none":  # every row has its own upstream gradient: recomputed per chunk
        if weights is not None:
            targets = targets.masked_fill(weights == 0, ignore_index)
        logprob, _ = linear_logprob(
            hidden, weight, targets, bias=bias, ignore_index=ignore_index, chunk_rows=chunk_rows
        )
        return 0.0 - (logprob if weights is None else logprob * weights)
    with_grad = torch.is_grad_enabled()
    needs = [with_grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return _op(
        hidden, weight, targets, weights, bias, ignore_index, reduction, chunk_rows or 0,
        _linear.may_wait(hidden.device), needs,
    )[0]  # fmt: skip
