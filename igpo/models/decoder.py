"""A bidirectional transformer decoder that predicts masked tokens: LLaMA blocks without the causal mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from igpo.ops._head import head_logits
from igpo.types import Seed

from .decoder_config import MaskedDecoderConfig


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


def rotary_table(
    position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, 1, T, head_dim / 2), of position * theta^(-2i/head_dim).

    Built anew each forward: no buffer that a cast to bfloat16 or a load from meta could spoil.
    """
    dtype = _at_least_float32(dtype)
    channel = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype)
    angles = position_ids[:, None, :, None].to(dtype) * theta ** (-channel / head_dim)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + d/2 are the plane that turns by angle i."""
    low, high = x.to(cos.dtype).chunk(2, dim=-1)
    turned = (
        torch.addcmul(low * cos, high, sin, value=-1),
        torch.addcmul(high * cos, low, sin),
    )
    return torch.cat(turned, dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: MaskedDecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value, attn_mask=visible, enable_gqa=self.grouped
        )  # fmt: skip
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, config: MaskedDecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MaskedDecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class DecoderOutput(ModelOutput):
    """logits: (B, T, V), (N, V) or None, as logits_to_keep asked; float32.   last_hidden_state: (B, T, D)."""

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


class MaskedDecoder(PreTrainedModel):
    """The native policy (igpo.types.Policy): row i of the output predicts token i.

    `MaskedDecoder.from_seed(config, seed)` makes one with reproducible weights; `MaskedDecoder(config)` draws them from
    torch's global generator, as every torch module does.
    """

    config_class = MaskedDecoderConfig
    base_model_prefix = ""  # the model is its own base: checkpoints hold one set of names
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (transformers reads a plain class attribute)
    _supports_sdpa = True

    def __init__(self, config: MaskedDecoderConfig) -> None:
        super().__init__(config)
        if config.mask_token_id is None:
            raise ValueError(
                "MaskedDecoder: config.mask_token_id must be set, got None. "
                "Use the id of the tokenizer's mask token."
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # a tied head has no module: there is one matrix, under one name, in memory and in the file
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.post_init()

    @classmethod
    def from_seed(cls, config: MaskedDecoderConfig, seed: Seed | int) -> MaskedDecoder:
        """A float32 model on the CPU whose weights depend on (config, seed) only.

        Matrices are normal with std initializer_range, those that write into the residual stream
        divided by sqrt(2 * layers) (GPT-2); norms are one. Global random state is left alone.
        """
        stream = (Seed(seed) if isinstance(seed, int) else seed).named("init")
        with torch.device("meta"):
            model = cls(config)
        model = model.to_empty(device="cpu")
        residual = (2 * config.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                    continue
                std = config.initializer_range
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= residual
                draws = stream.named(name).generator().standard_normal(parameter.shape, "float32")
                parameter.copy_(torch.from_numpy(draws).mul_(std))
        return model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @property
    def head_weight(self) -> Tensor:
        """(V, D): logits = hidden @ head_weight.T."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    @property
    def head_bias(self) -> None:
        return None

    def hidden(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The final hidden states, after the last norm: row i, through the head, predicts token i.

        Args:
            tokens: (B, T) int64.
            attention_mask: (B, T), True or 1 on real tokens; padding is never attended to. None: all real.
            position_ids: (B, T) int64. None: how many real tokens stand before this one.
        Returns:
            (B, T, D) in the model's dtype. Rows on padding are finite and mean nothing.
        Raises:
            ValueError: shapes disagree.
        """
        self._check(tokens, attention_mask, position_ids)
        if attention_mask is None:
            real, visible = torch.ones_like(tokens, dtype=torch.bool), None
        else:
            real = attention_mask.bool()
            # a sequence of padding only sees itself: softmax over no key at all would be NaN
            visible = (real | ~real.any(-1, keepdim=True))[:, None, None, :]
        if position_ids is None:
            position_ids = (real.cumsum(-1) - 1).clamp_min(0)
        x = self.embed_tokens(tokens)
        cos, sin = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, visible)
        return self.norm(x)

    @staticmethod
    def _check(tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        if tokens.dim() != 2:
            raise ValueError(
                f"MaskedDecoder: tokens must have shape (B, T), got shape {tuple(tokens.shape)}."
            )
        for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if value is not None and value.shape != tokens.shape:
                raise ValueError(
                    f"MaskedDecoder: {name} must have the shape of tokens, {tuple(tokens.shape)}, "
                    f"got shape {tuple(value.shape)}."
                )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | bool = True,
    ) -> DecoderOutput:
        """Hidden states, and logits of the positions asked for.

        Args:
            input_ids, attention_mask, position_ids: as `hidden`.
            logits_to_keep: True, every position; False, none; or a (B, T) bool mask of N positions, read row by row.
        Returns:
            logits (B, T, V), None or (N, V), float32 (float64 of a float64 model); last_hidden_state (B, T, D).
        Raises:
            ValueError: shapes disagree.
        """
        hidden = self.hidden(input_ids, attention_mask, position_ids)
        if logits_to_keep is False:
            return DecoderOutput(last_hidden_state=hidden)
        rows = hidden
        if isinstance(logits_to_keep, Tensor):
            if logits_to_keep.dtype != torch.bool or logits_to_keep.shape != input_ids.shape:
                raise ValueError(
                    f"MaskedDecoder: logits_to_keep must be a bool or a bool tensor of shape {tuple(input_ids.shape)}, "
                    f"got shape {tuple(logits_to_keep.shape)}, {logits_to_keep.dtype}."
                )
            rows = hidden[logits_to_keep]
        return DecoderOutput(logits=head_logits(rows, self.head_weight), last_hidden_state=hidden)


AutoConfig.register(MaskedDecoderConfig.model_type, MaskedDecoderConfig, exist_ok=True)
AutoModel.register(MaskedDecoderConfig, MaskedDecoder, exist_ok=True)
AutoModelForMaskedLM.register(MaskedDecoderConfig, MaskedDecoder, exist_ok=True)
