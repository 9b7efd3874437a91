"""Attention over frozen keys and values, written down by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpo.models import MaskedDecoder
from igpo.models.attention import Rotation, rotation

Kept = list[tuple[Tensor, Tensor]]  # of each layer: keys and values (K, T, d)


def by_hand(
    model: MaskedDecoder, tokens: Tensor, positions: Tensor, frozen: Kept, columns: Tensor
) -> tuple[Tensor, Kept]:  # fmt: skip
    """One sequence without padding: final states of some columns, which see the frozen keys and values elsewhere."""
    x = model.embed_tokens(tokens[columns])
    turn: Rotation = rotation(positions[None, columns], model.config, x.dtype)
    kept = []
    layers: list[Any] = list(model.layers)
    for layer, (keys, values) in zip(layers, frozen, strict=True):
        own, normed = layer.self_attn, layer.input_layernorm(x)
        split = (len(columns), -1, model.config.head_dim)
        q, k, v = (p(normed).view(split) for p in (own.q_proj, own.k_proj, own.v_proj))
        q, k = (
            turn.turn(norm(y).transpose(0, 1)[None])[0]
            for norm, y in ((own.q_norm, q), (own.k_norm, k))
        )
        keys, values = keys.clone(), values.clone()
        keys[:, columns], values[:, columns] = k, v.transpose(0, 1)
        kept.append((keys, values))
        group = q.shape[0] // keys.shape[0]
        wide_k, wide_v = (y.repeat_interleave(group, 0) for y in (keys, values))
        weight = (q @ wide_k.transpose(1, 2) / model.config.head_dim**0.5).softmax(-1)
        mixed = (weight @ wide_v).transpose(0, 1).flatten(1)
        x = x + own.o_proj(mixed)
        x = x + layer.mlp(layer.post_attention_layernorm(x)[None])[0]
    return model.norm(x), kept


def computed(model: MaskedDecoder, tokens: Tensor, positions: Tensor) -> Kept:
    """Keys and values of a whole sequence."""
    shape = model.config.num_key_value_heads, len(tokens), model.config.head_dim
    nothing = torch.zeros(shape, dtype=model.dtype)
    every = torch.arange(len(tokens))
    return by_hand(model, tokens, positions, [(nothing, nothing)] * len(model.layers), every)[1]
