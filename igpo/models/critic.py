"""A decoder with a scalar head: the network of a critic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .decoder import MaskedDecoder


class CriticModel(nn.Module):
    """One number per position: the final hidden state times a vector, which starts at 0.

    Source: the value model of arXiv:2509.06949 (TraceRL), its released code.
    """

    def __init__(self, body: Any) -> None:
        """body: a policy (igpo.types.Policy) that is a torch module; it loses the head that gives logits."""
        super().__init__()
        weight = body.head_weight
        for module in body.modules():
            if isinstance(module, MaskedDecoder):
                module.lm_head = None  # V x D weights that would never get a gradient
        self.body = body
        self.head = nn.Parameter(weight.new_zeros(weight.shape[1]))

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """(B, T) int64 -> (B, T) float32 (float64 of a float64 body)."""
        hidden = self.body.hidden(tokens, attention_mask, position_ids)
        kind = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(kind) @ self.head.to(kind)
