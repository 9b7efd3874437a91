"""config.json of every public family, shrunk: the keys are those of the released files, the sizes a test's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from igpo.models import MaskedDecoder
from igpo.models.loading import CLASSES

VOCAB, MASK, PAD = 128, 126, 1

LLADA: dict[str, Any] = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu", "alibi": False,
    "attention_layer_norm": False, "block_type": "llama", "d_model": 64, "embedding_size": VOCAB, "vocab_size": 120,
    "eos_token_id": PAD, "pad_token_id": PAD, "mask_token_id": MASK, "include_bias": False,
    "include_qkv_bias": False, "layer_norm_type": "rms", "mlp_hidden_size": 96, "mlp_ratio": 4,
    "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "rms_norm_eps": 1e-5, "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "weight_tying": False,
    "torch_dtype": "float32", "init_device": "meta", "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    "tie_word_embeddings": False, "mask_token_id": MASK, "eos_token_id": PAD, "pad_token_id": PAD,
    "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
_SDAR = {
    "head_dim": 32,
    "attention_bias": False,
    "attn_implementation": "flex_attention",
    "block_size": 4,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

PUBLIC: dict[str, dict[str, Any]] = {
    "llada": LLADA,
    "llada-grouped-tied": LLADA | {"n_kv_heads": 2, "weight_tying": True},
    "mmada": LLADA
    | {"model_type": "mmada", "architectures": ["MMadaModelLM"], "llm_vocab_size": 100, "new_vocab_size": VOCAB},
    "dream": _LLAMA | {"model_type": "Dream", "architectures": ["DreamModel"], "use_sliding_window": False},
    "dream-reasoner": _LLAMA
    | {"model_type": "Dream", "architectures": ["DreamForCausalLM"], "head_dim": 32, "attention_bias": False},
    "sdar": _LLAMA | _SDAR | {"model_type": "sdar", "architectures": ["SDARForCausalLM"]},
    "sdar-moe": _LLAMA | _EXPERTS
    | {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "head_dim": 32, "norm_topk_prob": True},
    "llada-moe": _LLAMA | {"num_experts": 8, "num_experts_per_tok": 2}
    | {
        "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "num_key_value_heads": 4,
        "expert_intermediate_size": 32, "dense_intermediate_size": 128, "shared_expert_intermediate_size": None,
        "intermediate_size": None, "moe_layer_freq": [1, 1], "qk_layernorm": True, "norm_topk_prob": None,
        "routed_scaling_factor": 1, "partial_rotary_factor": 1, "moe_router_score_function": "softmax",
    },
    "llada2": _LLAMA | _EXPERTS
    | {
        "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "num_hidden_layers": 3, "head_dim": 16,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_shared_experts": 1,
        "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "use_qk_norm": True, "use_qkv_bias": False,
        "use_bias": False,
    },
}  # fmt: skip


def public_model(name: str, seed: int = 0, **changes: Any) -> MaskedDecoder:
    """A random model of a family: weights large enough that context matters, norms, biases and router biases random."""
    values = PUBLIC[name] | changes
    config_class, cls = CLASSES[values["model_type"]]
    config = config_class.from_dict(values)
    config.initializer_range = 0.2
    model = cls.from_seed(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.buffers()]:
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


def describe(folder: Path, **changes: Any) -> None:
    """Changes keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
