"""The language-model head with float32 output: one bfloat16 ulp at |logit| 16 to 32 moves a probability by 13 %."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden (..., D) and weight (V, D) of one dtype -> logits (..., V), float32, or float64 of float64 inputs."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype != dtype and not torch.is_grad_enabled():
        # the product is accumulated in float32 anyway; this keeps it, without a float32 copy of the weight
        flat = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=dtype)
        logits = flat.view(*hidden.shape[:-1], weight.shape[0])
        return logits if bias is None else logits.add_(bias)
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
