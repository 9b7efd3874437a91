"""Liger-Kernel: Triton cross-entropy, log-probability and GRPO loss; Triton and CuTe fused linear cross-entropy."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import missing


def why_not(device: str) -> str | None:
    return missing("liger_kernel", device)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """It writes the gradient over the logits in the forward pass: each call gets its own copy, which is not timed."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    losses = LigerCrossEntropyLoss(reduction="none")(logits, targets)
    return (losses.float() * weights).sum()


def logprob(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
    """No entropy, no gradient. Made for (B, L + 1, V): the rows go in as one sequence without its last one."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    padded = torch.cat([logits, logits[:1]])[None]
    return (fused_selective_log_softmax(padded, targets[None], temperature=1.0, mask=None)[0],)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return loss(weight, hidden, targets)


def linear_cross_entropy_cute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        liger_fused_linear_cross_entropy_sm90,
    )

    return liger_fused_linear_cross_entropy_sm90(hidden, weight, targets, -100, "sum")


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """CuTe on Hopper; elsewhere its fallback in torch. The entropy is in the dtype of hidden."""
    # else it waits for the device to look at the targets
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, targets, 1.0, -100, 1, True
    )
    return -nll, entropy


def grpo(
    logits: Tensor, targets: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor,
    epsilon: float, beta: float,
) -> Tensor:  # fmt: skip
    """Made for (B, L + 1, V), whose last column it ignores: the padding is timed."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    padded = torch.cat([logits, logits[:, :1]], 1)
    loss, _ = triton_grpo_loss(
        padded, old, ref, targets, advantages, mask.int(), temperature=1.0, beta=beta,
        eps_low=epsilon, eps_high=epsilon, loss_type="bnpo", importance_sampling_level="token", reduce=True,
    )  # fmt: skip
    return loss
