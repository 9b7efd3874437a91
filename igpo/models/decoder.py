"""A bidirectional transformer decoder that predicts masked tokens: LLaMA blocks without the causal mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from igpo.ops._head import head_logits
from igpo.types import Seed

from . import storage
from .attention import Attention, RMSNorm, Rotation, rotation, why_not
from .cache import CanvasView, KVCache
from .decoder_config import MaskedDecoderConfig
from .inputs import Inputs, aligned, aligned_streams, last_real, read_inputs, read_streams
from .layout import MIN_ROWS, Plan
from .moe import MixtureOfExperts, SwiGLU
from .weights import as_bytes


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MaskedDecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_dense_layers
        self.mlp = SwiGLU(config) if dense else MixtureOfExperts(config)

    def forward(self, x: Tensor, positions: Rotation, plan: Plan) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, plan)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class DecoderOutput(ModelOutput):
    """logits: (B, T, V), (N, V) or None, as logits_to_keep asked; float32.   last_hidden_state: (B, T, D).

    Rows are those of the released code: of a shifted model (config.shifted), row i predicts token i + 1.
    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


class MaskedDecoder(PreTrainedModel):
    """The native policy (igpo.types.Policy): row i of `hidden`, through the head, predicts token i.

    `MaskedDecoder.from_seed(config, seed)` makes one with reproducible weights; `MaskedDecoder(config)` draws them from
    torch's global generator, as every torch module does. `load_model` reads a saved or public one.
    """

    config: MaskedDecoderConfig  # type: ignore[assignment]
    config_class = MaskedDecoderConfig
    base_model_prefix = ""  # the model is its own base: checkpoints hold one set of names
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (transformers reads a plain class attribute)
    _supports_sdpa = True

    def __init__(self, config: MaskedDecoderConfig) -> None:
        super().__init__(config)
        if config.mask_token_id is None and config.released is None:
            raise ValueError(
                "MaskedDecoder: config.mask_token_id must be set, got None. "
                "Use the id of the tokenizer's mask token."
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # a tied head has no module: there is one matrix, under one name, in memory and in the file
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.vocabulary_in_use = config.vocab_size
        self.attention = "sdpa"
        self.post_init()

    @classmethod
    def from_seed(cls, config: MaskedDecoderConfig, seed: Seed | int) -> MaskedDecoder:
        """A float32 model on the CPU whose weights depend on (config, seed) only.

        Matrices are normal with std initializer_range, those that write into the residual stream
        divided by sqrt(2 * layers) (GPT-2); norms are one, biases zero. Global random state is left alone.
        """
        stream = (Seed(seed) if isinstance(seed, int) else seed).named("init")
        with torch.device("meta"):
            model = cls(config)
        model = model.to_empty(device="cpu")
        residual = (2 * config.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.zero_()
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                std = config.initializer_range
                if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
                    std *= residual
                draws = stream.named(name).generator().standard_normal(parameter.shape, "float32")
                parameter.copy_(torch.from_numpy(draws).mul_(std))
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', for its Auto classes: safetensors only, streamed, and complete or refused.

        Takes config, dtype (or torch_dtype; "auto" is None), device, attn_implementation, and revision, cache_dir,
        token, local_files_only for a hub id. igpo.models.load_model is the same, typed.
        """
        return storage.load(cls, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, max_shard_size: int | str = "5GB", **kwargs: Any
    ) -> None:
        """Writes config.json and safetensors files; a public checkpoint gets back the names and keys it came with."""
        if kwargs:
            raise TypeError(
                f"save_pretrained: takes max_shard_size alone, got {', '.join(kwargs)}."
            )
        storage.save(self, Path(save_directory), as_bytes(max_shard_size))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def set_attn_implementation(self, attn_implementation: str, *args: Any, **kwargs: Any) -> None:
        """The attention backend: sdpa, flex_attention or flash_attention_2. Raises ValueError, with the reason."""
        reason = why_not(attn_implementation, self.config)
        if reason is not None:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} cannot be used: {reason}."
            )
        self.attention = attn_implementation

    @property
    def head_weight(self) -> Tensor:
        """(V, D): logits = hidden @ head_weight.T, over the part of the vocabulary in use."""
        weight = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        return weight if len(weight) == self.vocabulary_in_use else weight[: self.vocabulary_in_use]

    @property
    def head_bias(self) -> None:
        return None

    @property
    def block_length(self) -> int | None:
        """Of block-causal attention: rollouts go block by block. None: full attention."""
        return self.config.block_length

    def use_vocabulary(self, size: int) -> None:
        """Restricts head_weight to the first `size` rows.

        Public checkpoints have more rows than their tokenizer has tokens: padding of the matrix, or image codes
        (MMaDA). They must not be drawn, nor enter the probabilities of those that are.
        """
        if not 0 < size <= self.config.vocab_size:
            raise ValueError(
                f"use_vocabulary: size must be in [1, {self.config.vocab_size}], got {size}."
            )
        self.vocabulary_in_use = size

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Room for `capacity` tokens of `batch` sequences, for `hidden`."""
        return KVCache(self.config, batch, capacity, dtype=self.dtype, device=self.device)

    def hidden(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        cache: KVCache | CanvasView | None = None,
        store: bool = False,
    ) -> Tensor:
        """The final hidden states, after the last norm: row i, through the head, predicts token i.

        Args:
            tokens: (B, T) int64.
            attention_mask: (B, T), True or 1 on real tokens; padding is never attended to. None: all real.
                Or (B | 1, 1, T, T) bool, True where a query may see a key; it replaces the model's own block mask.
            position_ids: (B, T) int64; blocks of a block-causal model are position_ids // block_length. None: 0, 1, …
                from the first column of each document.
            document_ids: (B, T) integers; a run of equal ids is a document, and tokens see their own alone (packing).
                None: a row is one document.
            cache: keys and values of tokens before these, which see them too; or a CanvasView, of which these are
                columns, and which always stores them. Only without gradients.
            store: put these tokens into the KVCache as well; otherwise they leave it as it was.
        Returns:
            (B, T, D) in the model's dtype. Rows on padding are finite and mean nothing.
        Raises:
            ValueError: shapes disagree, or the attention backend cannot do it.
        """
        inputs = self._inputs(tokens, attention_mask, position_ids, document_ids, cache)
        states = self._states(inputs)
        before = cache.last if isinstance(cache, KVCache) else None
        if isinstance(cache, KVCache) and store:
            blocks = torch.zeros_like(tokens) if inputs.blocks is None else inputs.blocks
            cache.advance(inputs.real, blocks)
            last = last_real(inputs.real)[:, -1:, None].expand(-1, -1, states.shape[-1])
            cache.last = states.gather(1, last)[:, 0]
        if not self.config.shifted:
            return states
        return aligned(states, inputs.real, before, inputs.documents)

    def hidden_of_blocks(
        self,
        noisy: Tensor,
        clean: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """As `hidden` of every block at a canvas of its own, behind the finished blocks before it, in one pass.

        Row i is that of `hidden` on clean up to the block of i and noisy in it: the model computes [noisy || clean], 2T
        tokens, in which noisy blocks see themselves and the clean blocks before them.

        Args:
            noisy, clean: (B, T) int64, the same sequences with and without masks.
            attention_mask, position_ids, document_ids: (B, T), as `hidden`; of both copies.
        Returns:
            (B, T, D) in the model's dtype.
        Raises:
            ValueError: shapes disagree, or the model is not block-causal.
        Source: arXiv:2503.09573 (BD3-LM); arXiv:2512.22234 (DiRL).
        """
        inputs = read_streams(
            noisy, clean, attention_mask, position_ids,
            backend=self.attention, block_length=self.config.block_length, document_ids=document_ids,
        )  # fmt: skip
        states = self._states(inputs)
        return (
            aligned_streams(states, inputs) if self.config.shifted else states[:, : noisy.shape[1]]
        )

    def _inputs(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        cache: KVCache | CanvasView | None = None,
    ) -> Inputs:
        return read_inputs(
            tokens, attention_mask, position_ids,
            backend=self.attention, block_length=self.config.block_length, cache=cache, document_ids=document_ids,
        )  # fmt: skip

    def _states(self, inputs: Inputs) -> Tensor:
        """The final hidden states, in the rows of the released code."""
        plan = inputs.plan
        x = plan.pack(self.embed_tokens(inputs.tokens))
        positions = rotation(plan.pack(inputs.positions), self.config, x.dtype)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            # transformers recomputes layers in train mode only; our programs never leave eval mode
            if layer.gradient_checkpointing and not layer.training and torch.is_grad_enabled():
                recompute: Any = layer._gradient_checkpointing_func
                x = recompute(layer, x, positions, plan)
            else:
                x = layer(x, positions, plan)
        return plan.unpack(self.norm(x))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | bool = True,
        document_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """Hidden states, and logits of the positions asked for, in the rows of the released code.

        Args:
            input_ids, attention_mask, position_ids, document_ids: as `hidden`.
            logits_to_keep: True, every position; False, none; or a (B, T) bool mask of N positions, read row by row.
        Returns:
            logits (B, T, V), None or (N, V), float32 (float64 of a float64 model); last_hidden_state (B, T, D).
            Of a shifted model (config.shifted), row i predicts token i + 1; `hidden` has the row that predicts token i.
        Raises:
            ValueError: shapes disagree.
        """
        inputs = self._inputs(input_ids, attention_mask, position_ids, document_ids)
        states = self._states(inputs)
        if logits_to_keep is False:
            return DecoderOutput(last_hidden_state=states)
        rows = states
        if isinstance(logits_to_keep, Tensor):
            if logits_to_keep.dtype != torch.bool or logits_to_keep.shape != input_ids.shape:
                raise ValueError(
                    f"MaskedDecoder: logits_to_keep must be a bool or a bool tensor of shape {tuple(input_ids.shape)}, "
                    f"got shape {tuple(logits_to_keep.shape)}, {logits_to_keep.dtype}."
                )
            rows = states[logits_to_keep]
        return DecoderOutput(logits=self._logits(rows), last_hidden_state=states)

    def _logits(self, rows: Tensor) -> Tensor:
        """(…, D) -> (…, V), over the whole vocabulary."""
        weight = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        flat = rows.flatten(0, -2)
        missing = MIN_ROWS - len(flat)
        if rows.device.type != "cpu" or missing <= 0 or not len(flat):
            return head_logits(rows, weight)
        padded = F.pad(flat, (0, 0, 0, missing))  # see MIN_ROWS
        return head_logits(padded, weight)[: len(flat)].unflatten(0, rows.shape[:-1])
