"""The configuration of the native decoder: what config.json of a saved model holds."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MaskedDecoderConfig(PretrainedConfig):
    """Shape of a MaskedDecoder.

    vocab_size counts the mask token; mask_token_id must be set before a model is built. num_key_value_heads: None is
    num_attention_heads, fewer is grouped-query attention. head_dim: None is hidden_size / num_attention_heads.
    tie_word_embeddings: the head is the embedding matrix.

    Raises:
        ValueError: sizes that do not fit together, or token ids outside the vocabulary.
    """

    model_type = "igpo_decoder"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 128,
        intermediate_size: int = 344,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        super().__init__(**kwargs)
        # after the base class, which has defaults of its own for them in some versions of transformers
        self.tie_word_embeddings = tie_word_embeddings
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self._check(head_dim)

    def _check(self, head_dim: int | None) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"MaskedDecoderConfig: num_attention_heads must divide hidden_size={self.hidden_size}, "
                f"got {heads}. Choose a divisor or give head_dim."
            )
        if heads % groups:
            raise ValueError(
                "MaskedDecoderConfig: num_key_value_heads must divide "
                f"num_attention_heads={heads}, got {groups}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"MaskedDecoderConfig: head_dim must be even, got {self.head_dim}. "
                "Rotary embeddings turn pairs of channels."
            )
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"MaskedDecoderConfig: {name} must be in [0, {self.vocab_size}), got {token}."
                )
        if self.mask_token_id is not None and self.mask_token_id in (
            self.eos_token_id,
            self.pad_token_id,
        ):
            raise ValueError(
                "MaskedDecoderConfig: mask_token_id must differ from eos_token_id and pad_token_id, "
                f"got {self.mask_token_id} for both. Add a token of its own for [MASK]."
            )
