"""Log-probabilities over the few tokens a draw chose from: the head's rows of these alone, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _rows

GATHERED = 1 << 24  # elements of gathered head rows at a time: 64 MiB in float32 (chosen)


def support_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    support: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of one token per row, under the softmax over that row's support.

        z = (hidden @ weight.T + bias)/temperature,   logp[n] = z[n, y_n] - logsumexp_{v in support[n]} z[n, v]

    As `linear_logprob` of logits that are -inf outside the support. N K D multiplications and no (N, V) tensor; at most
    GATHERED elements of head rows are held at a time, in the backward pass, too. The weight's gradient is a dense
    (V, D), added up in an order that a GPU does not fix.

    Args:
        hidden: (N, D).   weight: (V, D), of the same dtype.   bias: (V,) or None.
        targets: (N,) int64, each in its row of the support.
        support: (N, K) ids in [0, V), each at most once; -1 where there are fewer than K.
    Returns:
        logp, entropy: (N,) float32, or float64 of float64; nats.
    Source: arXiv:2510.04019 (AGRPO), its released code.
    """
    kept = support >= 0
    ids = support.long().clamp(min=0)
    logits = _Logits.apply(hidden, weight, ids)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)[ids]
    logprob = (logits / temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)
    # 0 log 0 is 0, and so is its gradient
    finite = logprob.masked_fill(~kept, 0.0)
    entropy = -(finite.exp() * finite).masked_fill(~kept, 0.0).sum(-1)
    chosen = kept & (ids == targets[:, None])
    assert bool(chosen.any(-1).all()), "a drawn token is one of those it was drawn from"
    return finite.gather(-1, chosen.byte().argmax(-1, keepdim=True))[:, 0], entropy


class _Logits(torch.autograd.Function):
    """hidden (N, D), weight (V, D), ids (N, K) -> (N, K) hidden[n] . weight[ids[n, k]], with float32 sums."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        dtype = _rows.wide(hidden.dtype)
        out = hidden.new_empty(ids.shape, dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(ids, weight):
                head = weight[ids[rows]].to(dtype)
                out[rows] = (head @ hidden[rows].to(dtype)[..., None])[..., 0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, ids = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(ids, weight):
                if for_hidden is not None:
                    head = weight[ids[rows]].to(grad.dtype)
                    for_hidden[rows] = (grad[rows][:, None] @ head)[:, 0].to(hidden.dtype)
                if for_weight is not None:
                    outer = grad[rows][..., None] * hidden[rows][:, None].to(grad.dtype)
                    for_weight.index_add_(0, ids[rows].flatten(), outer.flatten(0, 1))
        return for_hidden, None if for_weight is None else for_weight.to(weight.dtype), None


def _chunks(ids: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, GATHERED // max(1, ids.shape[1] * weight.shape[1]))
    for begin in range(0, len(ids), size):
        yield slice(begin, min(begin + size, len(ids)))
