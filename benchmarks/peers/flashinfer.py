"""FlashInfer: softmax, sampling from logits and top-k, put together to one denoising commit."""

from __future__ import annotations

import torch
from torch import Tensor

from . import missing


def why_not(device: str) -> str | None:
    return missing("flashinfer", device)


def unmask(
    logits: Tensor, tokens: Tensor, mask_id: int, temperature: float, num_unmask: int
) -> tuple[Tensor, Tensor]:
    """Samples every position at `temperature` (argmax at 0) and commits the most probable ones."""
    import flashinfer

    batch, length, vocabulary = logits.shape
    rows = logits.reshape(-1, vocabulary).float()
    p = flashinfer.sampling.softmax(rows)
    if temperature:
        candidate = flashinfer.sampling.sampling_from_logits(
            rows / temperature, deterministic=True, seed=1, offset=0
        ).long()
        score = p.gather(-1, candidate[:, None])[:, 0]
    else:
        score, candidate = p.max(-1)
    masked = tokens == mask_id
    score = torch.where(masked, score.view(batch, length), -1.0)
    top = flashinfer.top_k(score, num_unmask, sorted=True, deterministic=True, tie_break=1)[1]
    committed = torch.zeros_like(masked).scatter(1, top.long(), True) & masked
    return torch.where(committed, candidate.view(batch, length), tokens), committed
