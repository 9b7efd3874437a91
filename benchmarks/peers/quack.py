"""QuACK: CuTe softmax, cross-entropy, top-k and chunked linear cross-entropy."""

from __future__ import annotations

from torch import Tensor

from . import missing


def why_not(device: str) -> str | None:
    return missing("quack", device)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    import quack

    return (quack.cross_entropy(logits, targets, reduction="none") * weights).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, targets, chunk_size=4096, reduction="sum")


def unmask_greedy(
    logits: Tensor, tokens: Tensor, mask_id: int, temperature: float, num_unmask: int
) -> tuple[Tensor, Tensor]:
    """Greedy only: softmax over every position, its maximum, top-k per sequence (padded to a power of two)."""
    import quack
    import torch
    from quack.topk import topk

    batch, length, vocabulary = logits.shape
    score, candidate = quack.softmax(logits.reshape(-1, vocabulary)).max(-1)
    masked = tokens == mask_id
    score = torch.where(masked, score.view(batch, length).float(), -1.0)
    top = topk(score, num_unmask)[1].long()
    committed = torch.zeros_like(masked).scatter(1, top, True) & masked
    return torch.where(committed, candidate.view(batch, length), tokens), committed
