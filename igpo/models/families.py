"""The public families the decoder covers: how their config.json reads in ours, and what their tensors are called.

Dispatch is on (model_type, architectures[0]): "llada" and "Dream" are each two unrelated architectures. Every entry
says where it is from; docs/models.md says what is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .names import LLADA, LLADA2, LLAMA, TensorNames

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """native: config.json -> arguments of MaskedDecoderConfig. ids: special tokens of the published vocabulary, taken
    where the config does not say. block_length: of attention, where the config does not say; None is full attention.
    turn_end: the token the chat template ends a turn with. tokenizer: "fast" files name their own class; "qwen2"
    files name one in Python that would have to be run, and Qwen2's gives the same ids.
    """

    name: str
    model_type: str
    architecture: str
    native: Callable[[Values], dict[str, Any]]
    names: TensorNames
    ids: Mapping[str, int]
    turn_end: str
    tokenizer: str
    block_length: int | None = None

    def arguments(self, values: Values) -> dict[str, Any]:
        """The arguments of MaskedDecoderConfig for a config.json of this family. Raises ValueError."""
        native = self.native(values)
        for name, published in self.ids.items():
            # a smaller vocabulary is not the published one, and its ids are not known
            default = published if published < native["vocab_size"] else None
            given = values.get(name)
            native[name] = default if given is None else given
        native["block_length"] = values.get("block_size") or self.block_length
        native["torch_dtype"] = values.get("dtype") or values.get("torch_dtype")
        return native


def require(values: Values, **only: Any) -> None:
    """Raises ValueError when a key that is present has a value the decoder does not implement."""
    for key, wanted in only.items():
        given = values.get(key, wanted)
        if given is not None and given != wanted:
            raise ValueError(
                f"config.json: {key} must be {wanted!r} for {values.get('model_type')!r} models, got {given!r}. "
                "The decoder does not implement it."
            )


def _llada(values: Values) -> dict[str, Any]:
    require(
        values, alibi=False, attention_layer_norm=False, layer_norm_type="rms", block_type="llama",
        activation_type="silu", include_bias=False, bias_for_layer_norm=False, scale_logits=False, rope=True,
        input_emb_norm=False, block_group_size=1, layer_norm_with_affine=True,
    )  # fmt: skip
    heads = values["n_heads"]
    return {
        "vocab_size": values.get("embedding_size") or values["vocab_size"],
        "hidden_size": values["d_model"],
        "intermediate_size": values.get("mlp_hidden_size")
        or values["mlp_ratio"] * values["d_model"],
        "num_hidden_layers": values["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("n_kv_heads")
        or (1 if values.get("multi_query_attention") else heads),
        "rope_theta": values["rope_theta"],
        "rope_rounding": "float32" if values.get("rope_full_precision", True) else "activation",
        "rms_norm_eps": values.get("rms_norm_eps", 1e-5),
        "initializer_range": values.get("init_std", 0.02),
        "tie_word_embeddings": values.get("weight_tying", False),
        "qkv_bias": values.get("include_qkv_bias", False),
    }


def _llama(values: Values) -> dict[str, Any]:
    """What the families with Hugging Face's key names share."""
    require(values, rope_scaling=None, hidden_act="silu", use_sliding_window=False)
    sizes = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    )  # fmt: skip
    native = {name: values[name] for name in sizes}
    theta = values.get("rope_theta") or values.get("rope_parameters", {})["rope_theta"]
    return native | {
        "head_dim": values.get("head_dim"),
        "intermediate_size": values.get("intermediate_size") or 0,
        "rope_theta": float(theta),
        "rope_rounding": "activation",
        "rms_norm_eps": values["rms_norm_eps"],
        "initializer_range": values.get("initializer_range", 0.02),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
    }


def _dream(values: Values) -> dict[str, Any]:
    return _llama(values) | {"qkv_bias": True, "shifted": True}


def _qwen3(values: Values) -> dict[str, Any]:
    require(values, attention_bias=False)
    return _llama(values) | {"qk_norm": True}


def _qwen3_moe(values: Values) -> dict[str, Any]:
    require(values, decoder_sparse_step=1, mlp_only_layers=[])
    return _qwen3(values) | {
        "num_experts": values["num_experts"],
        "num_experts_per_tok": values["num_experts_per_tok"],
        "moe_intermediate_size": values["moe_intermediate_size"],
        "norm_topk_prob": values.get("norm_topk_prob", True),
    }


def _llada_moe(values: Values) -> dict[str, Any]:
    require(
        values, attention_bias=False, qk_layernorm=True, partial_rotary_factor=1, moe_router_score_function="softmax",
        moe_layer_freq=[1] * values["num_hidden_layers"], moe_router_enable_expert_bias=False,
    )  # fmt: skip
    return _llama(values) | {
        "qk_norm": True,
        "num_experts": values["num_experts"],
        "num_experts_per_tok": values["num_experts_per_tok"],
        "moe_intermediate_size": values["expert_intermediate_size"],
        "shared_intermediate_size": values.get("shared_expert_intermediate_size") or 0,
        # the released class does not renormalise, whatever norm_topk_prob says
        "routed_scaling_factor": float(values.get("routed_scaling_factor") or 1),
    }


def _llada2(values: Values) -> dict[str, Any]:
    require(values, use_bias=False, use_qkv_bias=False, use_qk_norm=True, score_function="sigmoid")
    native = _llama(values)
    head_dim = native["head_dim"] or native["hidden_size"] // native["num_attention_heads"]
    return native | {
        "qk_norm": True,
        "rotary_dim": int(head_dim * values.get("partial_rotary_factor", 1)),
        "num_experts": values["num_experts"],
        "num_experts_per_tok": values["num_experts_per_tok"],
        "moe_intermediate_size": values["moe_intermediate_size"],
        "shared_intermediate_size": values["num_shared_experts"] * values["moe_intermediate_size"],
        "first_dense_layers": values["first_k_dense_replace"],
        "router": "sigmoid",
        "router_bias": values.get("moe_router_enable_expert_bias", True),
        "norm_topk_prob": values.get("norm_topk_prob", True),
        "routed_scaling_factor": values["routed_scaling_factor"],
        "num_expert_groups": values["n_group"],
        "topk_group": values["topk_group"],
    }


# ids: config.json and tokenizer_config.json of the repositories named in docs/models.md
_LLADA_IDS = {"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}
_DREAM_IDS = {"mask_token_id": 151666, "eos_token_id": 151643, "pad_token_id": 151643}
_SDAR_IDS = {"mask_token_id": 151669, "eos_token_id": 151643, "pad_token_id": 151643}
_LING_IDS = {"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892}
_IM_END = "<|im_end|>"

FAMILIES = (
    Family("LLaDA", "llada", "LLaDAModelLM", _llada, LLADA, _LLADA_IDS, "<|eot_id|>", "fast"),
    Family("LLaDA-MoE", "llada", "LLaDAMoEModelLM", _llada_moe, LLAMA, _LING_IDS, "<|role_end|>", "fast"),
    Family("MMaDA", "mmada", "MMadaModelLM", _llada, LLADA, _LLADA_IDS, "<|eot_id|>", "fast"),
    Family("Dream", "Dream", "DreamModel", _dream, LLAMA, _DREAM_IDS, _IM_END, "qwen2"),
    Family("DreamReasoner", "Dream", "DreamForCausalLM", _qwen3, LLAMA, _SDAR_IDS, _IM_END, "qwen2", 32),
    Family("SDAR", "sdar", "SDARForCausalLM", _qwen3, LLAMA, _SDAR_IDS, _IM_END, "qwen2", 4),
    Family("SDAR-MoE", "sdar_moe", "SDARMoeForCausalLM", _qwen3_moe, LLAMA, _SDAR_IDS, _IM_END, "qwen2", 4),
    Family("LLaDA2", "llada2_moe", "LLaDA2MoeModelLM", _llada2, LLADA2, _LING_IDS, "<|role_end|>", "fast", 32),
)  # fmt: skip


def family_of(values: Values) -> Family:
    """The family of a config.json. Raises ValueError naming those there are."""
    kind, architectures = values.get("model_type"), values.get("architectures") or [None]
    for family in FAMILIES:
        if (kind, architectures[0]) == (family.model_type, family.architecture):
            return family
    known = ", ".join(f"{f.model_type}/{f.architecture}" for f in FAMILIES)
    raise ValueError(
        f"config.json: model_type and architectures must be one of igpo_decoder, {known}; got "
        f"{kind}/{architectures[0]}."
    )
