"""Logits of hidden states; with classifier-free guidance of two, the second of the canvas without what was given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.ops._head import head_logits
from igpo.types import Canvas, Policy

# MKL multiplies a handful of rows by other kernels than many: from here on a row's logits in float32 are the same bits
# in any company (measured for the decoder: igpo/models/layout.py)
MIN_ROWS = 16


def check_guidance(policy: Policy, cfg: RolloutConfig) -> None:
    """Raises ValueError for a scale that is not one, or kept keys and values, which are of the guided canvas alone."""
    if not 0 <= cfg.cfg_scale < float("inf"):
        raise ValueError(f"denoise: cfg_scale must be finite and >= 0, got {cfg.cfg_scale}.")
    if cfg.cfg_scale and cfg.use_cache and getattr(policy, "block_length", None) is not None:
        raise ValueError(
            f"denoise: cfg_scale must be 0 where keys and values are kept, got {cfg.cfg_scale}. Set use_cache=false."
        )


def unconditional(canvas: Canvas, tokens: Tensor, rows: Tensor) -> Tensor:
    """(n, T) the rows' tokens with everything that was given, prompt and hints, masked; padding stays."""
    given = (canvas.tokens[rows] != canvas.mask_id) & canvas.attention_mask[rows]
    return tokens.masked_fill(given, canvas.mask_id)


def guided(conditional: Tensor, free: Tensor, scale: float) -> Tensor:
    """free + (scale + 1)(conditional - free) in float32. Source: LLaDA's released sampler; arXiv:2207.12598, eq. 6."""
    free = free.float()
    return free + (scale + 1) * (conditional.float() - free)


def predicted(policy: Policy, states: list[Tensor], scale: float) -> Tensor:
    """(M, V) logits of (M, D) hidden states; of two, the second without what was given, those of guidance."""
    count = len(states[0])
    if states[0].device.type == "cpu" and count < MIN_ROWS:
        states = [F.pad(x, (0, 0, 0, MIN_ROWS - count)) for x in states]
    logits, *free = (head_logits(x, policy.head_weight, policy.head_bias)[:count] for x in states)
    return guided(logits, free[0], scale) if free else logits
