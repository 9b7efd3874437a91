"""linear_logprob: token_logprob of hidden states through an LM head, without the logits of all rows at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import _linear, _rows
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register

Stats = tuple[Tensor, Tensor, Tensor, Tensor]  # logprob, entropy, row_max, log_sum: each (…,)


def _forward(
    row_op: _linear.RowOp, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    temperature: float, ignore_index: int, chunk_rows: int, compact: bool,
) -> Stats:  # fmt: skip
    keep = targets != ignore_index
    out = hidden.new_zeros((4, targets.numel()), dtype=_rows.wide(hidden.dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        head = _linear.Head(
            row_op, hidden, weight, bias, targets, keep, ignore_index, chunk_rows, compact
        )
        for rows, _, logits in head.chunks():
            stats = row_op.forward(logits, head.targets[rows], temperature, ignore_index)
            out[:, rows] = torch.stack(stats)
    logprob, entropy, row_max, log_sum = (row.clone().view(targets.shape) for row in out)
    return logprob, entropy, row_max, log_sum


def _backward(
    row_op: _linear.RowOp, grad_logprob: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor,
    targets: Tensor, bias: Tensor | None, entropy: Tensor, row_max: Tensor, log_sum: Tensor,
    temperature: float, ignore_index: int, chunk_rows: int, compact: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keep = targets != ignore_index
    per_row = [x.reshape(-1) for x in (grad_logprob, grad_entropy, entropy, row_max, log_sum)]
    # |g (onehot - p) - h p (log p + H)| <= |g| + |h| (1 + ln V)
    bound = per_row[0].abs() + per_row[1].abs() * (1 + math.log(len(weight)))
    with torch.autocast(hidden.device.type, enabled=False):
        head = _linear.Head(
            row_op, hidden, weight, bias, targets, keep, ignore_index, chunk_rows, compact
        )
        grads = _linear.HeadGradient(head, needs, bound / temperature)
        for rows, states, logits in head.chunks():
            g, h, *stats = (x[rows] for x in per_row)
            factors = grads.scaled(g), grads.scaled(h)
            options = temperature, ignore_index, grads.room(logits)
            grads.add(
                rows,
                states,
                row_op.backward(*factors, logits, head.targets[rows], *stats, *options),
            )
    of_hidden, of_weight, of_bias = (x.to(hidden.dtype) for x in grads.finish())
    return of_hidden.view(hidden.shape if needs[0] else (0,)), of_weight, of_bias


def _phases(row_op: _linear.RowOp) -> dict[str, Callable]:
    return {"forward": partial(_forward, row_op), "backward": partial(_backward, row_op)}


OP = Op(
    "linear_logprob",
    (
        cuda(**_phases(_linear.CUDA), refuses=_rows.refuses),
        triton("linear_logprob", **_phases(_linear.TRITON), refuses=_rows.refuses),
        cpu(**_phases(_linear.CPU), refuses=_rows.refuses),
        reference(**_phases(_linear.REFERENCE)),
    ),
)


def _run(hidden: Tensor, weight: Tensor, targets: Tensor, bias, temperature, ignore_index, *rest):
    _rows.check_targets(OP.name, targets, len(weight), ignore_index)
    return OP(
        "forward", hidden.device, hidden, weight, targets, bias, temperature, ignore_index, *rest
    )


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, *_):
    rows = hidden.new_empty(targets.shape, dtype=_rows.wide(hidden.dtype))
    return rows, torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(rows)


def setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, *options = inputs
    _, entropy, row_max, log_sum = output
    ctx.save_for_backward(hidden, weight, targets, bias, entropy, row_max, log_sum)
    ctx.options = options
    ctx.mark_non_differentiable(row_max, log_sum)


def backward(ctx, grad_logprob: Tensor, grad_entropy: Tensor, *_: Tensor):
    hidden, weight, _, bias = ctx.needs_input_grad[:4]
    needs = (hidden, weight, bias)
    grads = _backward_op(grad_logprob, grad_entropy, *ctx.saved_tensors, *ctx.options, needs)
    of_hidden, of_weight, of_bias = (g if n else None for g, n in zip(grads, needs, strict=True))
    return of_hidden, of_weight, None, of_bias, None, None, None, None


_backward_op = register(
    "linear_logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets,"
    " Tensor? bias, Tensor entropy, Tensor row_max, Tensor log_sum, float temperature, int ignore_index,"
    " int chunk_rows, bool compact, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    lambda grad_logprob, *args: OP("backward", grad_logprob.device, grad_logprob, *args),
    lambda grad_logprob, grad_entropy, hidden, weight, *rest: _linear.empty_gradients(
        hidden, weight, rest[-1], hidden.dtype
    ),
    **_rows.once_differentiable("linear_logprob"),
)
_op = register(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float temperature, int ignore_index,"
    " int chunk_rows, bool compact) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    backward=backward,
    setup_context=setup_context,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """token_logprob(hidden @ weight.T + bias, targets), without the logits of all rows at once.

        logits = float32(hidden @ weight.T + bias);   logp = log_softmax(logits / temperature)[targets];   H its entropy

    Args:
        hidden: (…, D) float32 | bfloat16 | float16; last dim contiguous. float64: the reference alone.
        weight: (V, D) and bias: (V,) or None, the LM head, in hidden's dtype.
        targets: (…,) int64 in [0, V), or ignore_index to skip the row, which then costs nothing (but see below).
        temperature: > 0; both results are those of softmax(logits / temperature).
        chunk_rows: rows of logits held at a time; None: a tenth of the rows that count, at least 64, at most 256 MiB;
            on a GPU as many as 1 GiB of logits and their gradient has room for (1024 rows at V = 126464).
    Returns:
        logprob, entropy: (…,) float32, nats, as token_logprob's; 0 where skipped. Differentiable in both, with respect
        to hidden, weight and bias: the logits are computed again chunk by chunk, and the gradient of a weight or bias
        that does not require one is not computed.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, a tensor is sharded, temperature <= 0,
        chunk_rows <= 0, or a target is outside the vocabulary (looked for on the CPU only).
        BackendError: a forced backend refuses.
    Accuracy: logits, sums over chunks and statistics are float32 whatever the input dtype; gradients are rounded to
    the input dtype once (on a GPU also that of the logits, as the factor of a product). Extra memory: one chunk of
    logits in float32 and, on a GPU, its gradient in the input dtype.
    On a GPU the host waits for the number of rows that count, once in the forward and once in the backward pass. While
    a CUDA graph is captured and under torch.compile it does not; then rows that do not count are computed and dropped.
    Source: as token_logprob; float32 logits, as one bfloat16 ulp at |logit| 16-32 moves a probability ratio by 13 %.
    """
    op = OP.name
    _linear.check(op, hidden, weight, bias, chunk_rows)
    _rows.check_target_tensor(op, targets, hidden)
    _rows.check_temperature(op, temperature)
    logprob, entropy, _, _ = _op(
        hidden, weight, targets, bias, float(temperature), ignore_index, chunk_rows or 0,
        _linear.may_wait(hidden.device),
    )  # fmt: skip
    return logprob, entropy
