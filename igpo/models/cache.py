"""Keys and values of tokens that will not change any more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder_config import MaskedDecoderConfig


class KVCache:
    """Room for `capacity` tokens of each of B sequences, in every layer; for inference only.

    Exact where later tokens cannot change earlier ones: block-causal models whose cached blocks are complete. With full
    attention keys and values of other columns are an approximation: view.

    length: tokens stored, the same for all rows; rows that have fewer store padding. keys, values:
    (layers, B, K, capacity, d), keys after rotation. real, blocks: (B, capacity). last: (B, D) the last real token's
    hidden state, which predicts the next token in a shifted model.
    """

    def __init__(
        self,
        config: MaskedDecoderConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.real = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self.blocks = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.last: Tensor | None = None
        self.length = 0

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def reserve(self, batch: int, tokens: int) -> None:
        """Raises ValueError unless `tokens` more fit; RuntimeError while gradients are recorded."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "KVCache: is written in place, got gradients enabled. Use torch.no_grad()."
            )
        if batch != self.batch:
            raise ValueError(
                f"KVCache: tokens must have {self.batch} rows, those of the cache, got {batch}."
            )
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"KVCache: capacity must hold {self.length + tokens} tokens, got {self.capacity}. "
                "Make a larger cache."
            )

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts (B, K, T, d) behind what is stored; returns views of everything up to there."""
        stop = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : stop] = key
        self.values[layer, :, :, self.length : stop] = value
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, real: Tensor, blocks: Tensor) -> None:
        """Makes the tokens written last part of the cache; without it the next call overwrites them."""
        stop = self.length + real.shape[1]
        self.real[:, self.length : stop] = real
        self.blocks[:, self.length : stop] = blocks
        self.length = stop

    def take(self, rows: Tensor) -> KVCache:
        """The cache of some of its sequences, copied."""
        other = object.__new__(KVCache)
        other.keys, other.values = self.keys[:, rows], self.values[:, rows]
        other.real, other.blocks = self.real[rows], self.blocks[rows]
        other.last = None if self.last is None else self.last[rows]
        other.length = self.length
        return other

    def view(
        self, slots: Tensor, *, in_order: bool = False, columns: Tensor | None = None, real: Tensor | None = None
    ) -> CanvasView:  # fmt: skip
        """Of sequences that are whole canvases of full attention."""
        return CanvasView(self, slots, in_order, columns, real)


@dataclass(frozen=True)
class CanvasView:
    """The canvases a call of `MaskedDecoder.hidden` is about: it computes and stores keys and values of their columns.

    store: of T columns.   slots: (n,) int64, distinct, where the canvases lie in it.   in_order: slots are 0 … n-1.
    columns: (n, W) int64, of the tokens, which see all T columns; None: all of them, by the model's own attention
    backend.   real: (n, T) bool, which columns are no padding, for a window; None: all.
    """

    store: KVCache
    slots: Tensor
    in_order: bool
    columns: Tensor | None
    real: Tensor | None
