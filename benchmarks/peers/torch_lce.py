"""torch's own chunked linear cross-entropy (torch 2.13 and later)."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(device: str) -> str | None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy (2.13 and later)"
    return None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    )
