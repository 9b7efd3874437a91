"""Parameter names: what a public checkpoint calls each tensor, and which part of which parameter of ours it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .decoder_config import MaskedDecoderConfig


class Piece(NamedTuple):
    """A view of one of our parameters: all of it, or one expert's matrix, or its gate (0) or up (1) half."""

    name: str
    expert: int | None = None
    half: int | None = None

    def view(self, parameters: Mapping[str, Tensor]) -> Tensor:
        tensor = parameters[self.name]
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.half is None else tensor.chunk(2)[self.half]


Table = dict[str, tuple[Piece, ...]]  # released name -> the pieces whose rows it holds, in order


@dataclass(frozen=True)
class TensorNames:
    """How a family writes names. Modules of a layer that are not in `modules` have our names.

    layer: the prefix of layer {0}.   modules: our module path inside a layer -> theirs.   fused_qkv: the module that
    holds the rows of q, k and v, in this order.
    """

    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{0}."
    modules: Mapping[str, str] = field(default_factory=dict)
    fused_qkv: str | None = None

    def table(self, config: MaskedDecoderConfig, ours: Sequence[str]) -> Table:
        """The table for a model whose state dict has the keys `ours`."""
        outside = {
            "embed_tokens.weight": self.embedding,
            "norm.weight": self.norm,
            "lm_head.weight": self.head,
        }
        table: dict[str, list[Piece]] = {}
        for name in ours:
            inside = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
            if inside is None:
                table[outside[name]] = [Piece(name)]
                continue
            for theirs, piece in self._inside(name, inside[2], config):
                table.setdefault(self.layer.format(inside[1]) + theirs, []).append(piece)
        return {name: tuple(pieces) for name, pieces in table.items()}

    def _inside(self, name: str, path: str, config: MaskedDecoderConfig) -> list[tuple[str, Piece]]:
        experts = range(config.num_experts)
        if path == "mlp.experts.gate_up_proj":
            return [
                (f"mlp.experts.{e}.{matrix}_proj.weight", Piece(name, e, half))
                for e in experts
                for half, matrix in enumerate(("gate", "up"))
            ]
        if path == "mlp.experts.down_proj":
            return [(f"mlp.experts.{e}.down_proj.weight", Piece(name, e)) for e in experts]
        module, _, leaf = path.rpartition(".")
        if self.fused_qkv and re.fullmatch(r"self_attn\.[qkv]_proj", module):
            return [(f"{self.fused_qkv}.{leaf}", Piece(name))]
        return [(f"{self.modules.get(module, module)}.{leaf}", Piece(name))]

    def linear(self, theirs: str) -> list[str]:
        """Our names of the linear layers that a family calls `theirs` (last component), inside a layer."""
        if self.fused_qkv and theirs == self.fused_qkv.rpartition(".")[2]:
            return ["q_proj", "k_proj", "v_proj"]
        return [
            our.rpartition(".")[2]
            for our, their in self.modules.items()
            if their.rpartition(".")[2] == theirs and our.endswith("_proj")
        ]


LLAMA = TensorNames()
LLADA = TensorNames(
    embedding="model.transformer.wte.weight",
    norm="model.transformer.ln_f.weight",
    head="model.transformer.ff_out.weight",
    layer="model.transformer.blocks.{0}.",
    modules={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out",
        "post_attention_layernorm": "ff_norm",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    },
)
LLADA2 = TensorNames(
    embedding="model.word_embeddings.weight",
    modules={
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
    },
    fused_qkv="attention.query_key_value",
)


def tensor_table(
    names: TensorNames | None, config: MaskedDecoderConfig, ours: Sequence[str]
) -> Table:
    """The table of a family, or that of a model saved under our own names."""
    return {name: (Piece(name),) for name in ours} if names is None else names.table(config, ours)
