"""Attention of the decoder: projections, rotary positions, and the backend that mixes."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder_config import MaskedDecoderConfig
from .layout import Plan

BACKENDS = ("sdpa", "flex_attention", "flash_attention_2")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(_at_least_float32(x.dtype))
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class Rotation(NamedTuple):
    """cos and sin, (B, 1, T, rotary_dim / 2), in the dtype the products are taken in."""

    cos: Tensor
    sin: Tensor
    fused: bool

    def turn(self, x: Tensor) -> Tensor:
        """Of the first rotary_dim channels, i and i + rotary_dim/2 are the plane that turns by angle i."""
        rotary_dim = 2 * self.cos.shape[-1]
        low, high = x[..., :rotary_dim].to(self.cos.dtype).chunk(2, dim=-1)
        cos, sin = self.cos, self.sin
        if self.fused:
            turned = (
                torch.addcmul(low * cos, high, sin, value=-1),
                torch.addcmul(high * cos, low, sin),
            )
        else:
            turned = (low * cos - high * sin, high * cos + low * sin)
        turned = torch.cat(turned, dim=-1).to(x.dtype)
        if rotary_dim == x.shape[-1]:
            return turned
        return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def rotation(position_ids: Tensor, config: MaskedDecoderConfig, dtype: torch.dtype) -> Rotation:
    """The angles position * theta^(-2i/rotary_dim).

    Built anew each forward: no buffer that a cast to bfloat16 or a load from meta could spoil. Rounded as the model was
    trained: see MaskedDecoderConfig.rope_rounding.
    """
    wide = _at_least_float32(dtype)
    fused = config.rope_rounding == "fused"
    channel = torch.arange(0, config.rotary_dim, 2, device=position_ids.device, dtype=wide)
    share = channel / config.rotary_dim
    speed = config.rope_theta**-share if fused else 1.0 / config.rope_theta**share
    angles = position_ids[:, None, :, None].to(wide) * speed
    cos, sin = angles.cos(), angles.sin()
    if config.rope_rounding == "activation":
        cos, sin = cos.to(dtype), sin.to(dtype)
    return Rotation(cos, sin, fused)


class Attention(nn.Module):
    def __init__(self, config: MaskedDecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(config.head_dim, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Rotation, plan: Plan) -> Tensor:
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        mixed = plan.attend(self.layer, positions.turn(query), positions.turn(key), value)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def why_not(backend: str, config: MaskedDecoderConfig) -> str | None:
    """Why a backend cannot run this model here, or None when it can."""
    if backend not in BACKENDS:
        return f"it must be one of {', '.join(BACKENDS)}"
    if backend != "flash_attention_2":
        return None
    if config.block_length is not None:
        return "flash-attn has no block-causal mask; use flex_attention or sdpa"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed: pip install flash-attn, or use sdpa"
    return None
