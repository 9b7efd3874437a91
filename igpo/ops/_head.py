"""The language-model head with float32 output: one bfloat16 ulp at |logit| 16 to 32 moves a probability by 13 %."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _products


class _Product(torch.autograd.Function):
    """hidden (N, D) @ weight.T of 16-bit factors in float32, where mm writes that (CUDA); no widened weight.

    The gradient of the logits is rounded to the factors' dtype, as in a head that is 16-bit throughout.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight = ctx.saved_tensors
        scale = _products.half_scale(hidden.dtype, grad)
        grad = (grad if scale is None else grad * scale).to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            found = [
                torch.mm(a, b, out_dtype=torch.float32) if needed else None
                for needed, a, b in zip(
                    ctx.needs_input_grad, (grad, grad.t()), (weight, hidden), strict=True
                )
            ]
        return tuple(
            g if g is None else (g if scale is None else g / scale).to(hidden.dtype) for g in found
        )


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden (..., D) and weight (V, D) of one dtype -> logits (..., V), float32, or float64 of float64 inputs."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):  # which would narrow the result
        if hidden.dtype == dtype or hidden.device.type not in _products.WIDE_RESULTS:
            wide = None if bias is None else bias.to(dtype)
            return F.linear(hidden.to(dtype), weight.to(dtype), wide)
        logits = _Product.apply(hidden.flatten(0, -2), weight)
        logits = logits.view(*hidden.shape[:-1], weight.shape[0])
        return logits if bias is None else logits.add_(bias)
