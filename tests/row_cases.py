"""Rows of logits and hidden states on which the row ops and the linear ops are tried."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = [
    (0, 5),
    (1, 1),
    (1, 2),
    (3, 7),
    (5, 64),
    (4, 997),
    (7, 4099),
    (2, 50257),
]  # rows, vocabulary
IGNORE = -100


@dataclass(frozen=True)
class Gradient:
    """Results of a loss and its gradients, as a tuple of tensors."""

    results: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def logits_of(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 5.0
) -> Tensor:
    return (torch.randn(rows, vocab) * spread).to(dtype)


def targets_of(rows: int, vocab: int, *, ignored: bool = True) -> Tensor:
    """Random targets; every third row is skipped."""
    targets = torch.randint(0, vocab, (rows,))
    if ignored:
        targets[1::3] = IGNORE
    return targets


def head_of(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D), bias (V,) with logits of spread 3 or so."""
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) * 3 / width**0.5
    return hidden.to(dtype), weight.to(dtype), torch.randn(vocab).to(dtype)


def gradients_of(function, leaves: tuple[Tensor, ...], upstream: tuple[Tensor, ...]) -> Gradient:
    """function(*leaves) -> tensors, weighted by `upstream` into a scalar whose gradients by the leaves are taken."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((r * u.to(r.dtype)).sum() for r, u in zip(results, upstream, strict=True))
    return Gradient(tuple(r.detach() for r in results), torch.autograd.grad(total, leaves))
