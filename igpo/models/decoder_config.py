"""The configuration of the native decoder: what config.json of a saved model holds."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

ROPE_ROUNDINGS = ("fused", "float32", "activation")


class MaskedDecoderConfig(PretrainedConfig):
    """Shape of a MaskedDecoder.

    vocab_size counts the mask token; mask_token_id must be set before a model is built. num_key_value_heads: None is
    num_attention_heads, fewer is grouped-query attention. head_dim: None is hidden_size / num_attention_heads.
    tie_word_embeddings: the head is the embedding matrix.

    qkv_bias: biases on the query, key and value projections (Qwen2). qk_norm: RMSNorm over each head's queries and keys
    (Qwen3). rotary_dim: leading channels of a head that turn; None is all. rope_rounding: where the rotation rounds:
    "fused", float32 with fused multiply-adds; "float32", every product rounded to float32; "activation", cosines and
    products in the dtype of the activations. shifted: row i of the logits predicts token i + 1 (models initialised from
    autoregressive ones). block_length: attention is causal between blocks of this many positions and full within one;
    None is full attention.

    num_experts > 0: the layers from first_dense_layers on are mixtures of experts of width moe_intermediate_size, of
    which a token takes num_experts_per_tok by `router` ("softmax" or "sigmoid") scores, divided by their sum if
    norm_topk_prob, times routed_scaling_factor; chosen within the topk_group best of num_expert_groups groups, with a
    bias per expert if router_bias; beside a shared expert of width shared_intermediate_size, if that is positive.

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
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rotary_dim: int | None = None,
        rope_rounding: str = "fused",
        shifted: bool = False,
        block_length: int | None = None,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_intermediate_size: int = 0,
        shared_intermediate_size: int = 0,
        first_dense_layers: int = 0,
        router: str = "softmax",
        router_bias: bool = False,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        num_expert_groups: int = 1,
        topk_group: int = 1,
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
        self.mask_token_id: Any = mask_token_id  # None: a public config that does not say
        self.qkv_bias, self.qk_norm = qkv_bias, qk_norm
        self.rotary_dim = rotary_dim or self.head_dim
        self.rope_rounding, self.shifted, self.block_length = rope_rounding, shifted, block_length
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_intermediate_size = shared_intermediate_size
        self.first_dense_layers = first_dense_layers if num_experts else num_hidden_layers
        self.router, self.router_bias = router, router_bias
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.num_expert_groups, self.topk_group = num_expert_groups, topk_group
        self._attention: str | None = None  # the backend asked for at loading; never saved
        super().__init__(**kwargs)
        # after the base class, which has defaults of its own for them in some versions of transformers
        self.tie_word_embeddings = tie_word_embeddings
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self._check(head_dim)

    @property
    def released(self) -> dict[str, Any] | None:
        """The config.json a public checkpoint came with; None for a model of this package."""
        return None

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("_attention", None)
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # some repositories name a backend in their config; which one runs is the caller's choice
        asked = kwargs.pop("attn_implementation", None)
        made: Any = super().from_dict(cls._native(copy.deepcopy(config_dict)), **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config._attention = asked
        return made

    @classmethod
    def _native(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Arguments of __init__ from the contents of config.json."""
        values.pop("attn_implementation", None)
        return values

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
        self._check_rotation()
        self._check_experts()
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

    def _check_rotation(self) -> None:
        if self.head_dim % 2:
            raise ValueError(
                f"MaskedDecoderConfig: head_dim must be even, got {self.head_dim}. "
                "Rotary embeddings turn pairs of channels."
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"MaskedDecoderConfig: rotary_dim must be even and at most head_dim={self.head_dim}, "
                f"got {self.rotary_dim}."
            )
        if self.rope_rounding not in ROPE_ROUNDINGS:
            raise ValueError(
                f"MaskedDecoderConfig: rope_rounding must be one of {', '.join(ROPE_ROUNDINGS)}, "
                f"got {self.rope_rounding!r}."
            )
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(
                f"MaskedDecoderConfig: block_length must be positive, got {self.block_length}. "
                "None is full attention."
            )

    def _check_experts(self) -> None:
        if not self.num_experts:
            return
        experts, groups = self.num_experts, self.num_expert_groups
        eligible = experts // groups * self.topk_group
        rules = (
            (self.router in ("softmax", "sigmoid"), "router must be softmax or sigmoid", self.router),
            (experts % groups == 0, f"num_expert_groups must divide num_experts={experts}", groups),
            (groups == 1 or experts // groups >= 2, "a group must hold two experts or more", groups),
            (1 <= self.topk_group <= groups, f"topk_group must be in [1, {groups}]", self.topk_group),
            (1 <= self.num_experts_per_tok <= eligible, f"num_experts_per_tok must be in [1, {eligible}]",
             self.num_experts_per_tok),
            (self.moe_intermediate_size > 0, "moe_intermediate_size must be positive",
             self.moe_intermediate_size),
        )  # fmt: skip
        for holds, rule, value in rules:
            if not holds:
                raise ValueError(f"MaskedDecoderConfig: {rule}, got {value!r}.")
