"""Logits beside other people's code of the same layers, on the same random weights.

transformers has no LLaDA, Dream or SDAR, but the causal models they grew from: with a mask of queries and keys in place
of theirs they compute the same. The families' own files run where a folder has them (IGPO_PUBLIC_CODE).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from public_configs import MASK, PUBLIC, public_model
from safetensors.torch import load_file, save_file
from torch import Tensor

BATCH, T, PADDING = 3, 13, 5


class Sibling(NamedTuple):
    """Of a family: the name its class begins with in transformers, and what it needs to know beyond the sizes."""

    name: str
    options: dict[str, Any]


SIBLINGS: dict[str, Sibling] = {
    "llada": Sibling("Llama", {}),
    "llada-grouped-tied": Sibling("Llama", {}),
    "mmada": Sibling("Llama", {}),
    "dream": Sibling("Qwen2", {}),
    "dream-reasoner": Sibling("Qwen3", {}),
    "sdar": Sibling("Qwen3", {}),
    "sdar-moe": Sibling("Qwen3Moe", {}),
    "llada-moe": Sibling("Qwen3Moe", {}),
    # LLaDA2's router, groups, half rotary and shared expert are those of GLM-4.5
    "llada2": Sibling(
        "Glm4Moe",
        {
            "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5, "use_qk_norm": True, "partial_rotary_factor": 0.5,
        },
    ),
}  # fmt: skip


def sibling(name: str, model: Any) -> Any:
    """transformers' model with the shape and the weights of ours."""
    kind, options = SIBLINGS[name]
    c = model.config
    shape = {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim, "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings, "num_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_per_tok, "moe_intermediate_size": c.moe_intermediate_size,
        "norm_topk_prob": c.norm_topk_prob, "attention_bias": False, "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": c.rope_theta,
            "partial_rotary_factor": options.get("partial_rotary_factor", 1.0),
        },
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**shape, **options)
    found = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    weights = {
        (key if key.startswith("lm_head") else f"model.{key}").replace(
            "gate.expert_bias", "gate.e_score_correction_bias"
        ): value
        for key, value in model.state_dict().items()
    }
    missing, unexpected = found.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if c.tie_word_embeddings else set())
    found.tie_weights()
    return found


def inputs(block: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, which are real (the second row is padded on the left), positions, who sees whom."""
    tokens = (torch.arange(BATCH * T).reshape(BATCH, T) * 29 % 120) + 2
    tokens[:, ::3] = MASK
    real = torch.ones(BATCH, T, dtype=torch.bool)
    real[1, :PADDING] = False
    positions = (real.cumsum(1) - 1).clamp_min(0)
    seen = real[:, None].expand(-1, T, -1)
    if block is not None:
        blocks = positions // block
        seen = seen & (blocks[:, None] <= blocks[..., None])
    return tokens, real, positions, seen | ~seen.any(-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLIC)
def test_logits_are_those_of_the_sibling_in_transformers(name: str) -> None:
    """Measured: 0 without experts; with them, summed in another order, 2e-6 (logits up to 10)."""
    model = public_model(name)
    other = sibling(name, model)
    tokens, real, positions, seen = inputs(model.block_length)
    mask = torch.zeros(BATCH, 1, T, T, dtype=torch.float32).masked_fill(~seen[:, None], -1e30)
    theirs = other(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    ours = model(tokens, real, positions).logits
    assert float(theirs.abs().max()) > 1
    slack = 1e-5 if model.config.num_experts else 1e-6
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=slack)
    # the mask matters: with transformers' own, causal one the logits are others
    causal = other(tokens, position_ids=positions, use_cache=False).logits
    assert float((causal - theirs)[0].abs().max()) > 0.01


# --- the families' own files

# in a process without igpo, whose classes would take the place of the public ones; built from the class itself, as
# from_pretrained of some versions of transformers fails on code written for others
_PUBLIC = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder, name = Path(sys.argv[1]), sys.argv[2]
modeling, configuration = (next(folder.glob(f"{kind}_*.py")).stem for kind in ("modeling", "configuration"))
try:
    made = get_class_from_dynamic_module(f"{modeling}.{name}", str(folder))
    kind = getattr(made, "config_class", None) or sys.exit("its class names no config_class")
    values = json.loads((folder / "config.json").read_text())
    values.pop("auto_map", None)
    config = kind(**values | {"init_device": "cpu", "_attn_implementation": "eager"})
    config.use_cache = False
    model = made(config)
except (ImportError, KeyError, AttributeError, TypeError) as error:
    sys.exit(f"this transformers cannot run it: {type(error).__name__}: {error}")
model.load_state_dict(load_file(folder / "model.safetensors"))
given = load_file(folder / "inputs.safetensors")
logits = model.float().eval()(given.pop("tokens"), **given).logits
save_file({"logits": logits.detach().float().contiguous()}, folder / "logits.safetensors")
"""
CODE = {
    "llada": "LLaDAModelLM",
    "dream": "DreamModel",
    "sdar": "SDARForCausalLM",
    "llada-moe": "LLaDAMoEModelLM",
    "llada2": "LLaDA2MoeModelLM",
}


@pytest.mark.parametrize("name", CODE)
@torch.no_grad()
def test_logits_are_those_of_the_familys_own_files(name: str, tmp_path: Path) -> None:
    """IGPO_PUBLIC_CODE/NAME holds its Python files, IGPO_PUBLIC_PYTHON (optional) is a Python they run in."""
    place = Path(os.environ.get("IGPO_PUBLIC_CODE", "")) / name
    if not os.environ.get("IGPO_PUBLIC_CODE") or not place.is_dir():
        pytest.skip(
            f"IGPO_PUBLIC_CODE names no folder with {name}/, the family's public Python files"
        )
    model = public_model(name)
    model.save_pretrained(tmp_path)
    for file in place.glob("*.py"):
        shutil.copy(file, tmp_path)
    tokens, _, _, seen = inputs(model.block_length)
    tokens, given = tokens[:1], {}  # nothing padded: some files mean something else by it
    if model.block_length is not None:
        mask = torch.zeros(1, 1, T, T).masked_fill(~seen[:1, None], torch.finfo(torch.float32).min)
        given = {"attention_mask": mask}
    save_file({"tokens": tokens, **given}, tmp_path / "inputs.safetensors")
    python = os.environ.get("IGPO_PUBLIC_PYTHON", sys.executable)
    command = [python, "-c", _PUBLIC, str(tmp_path), CODE[name]]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    if done.returncode == 1 and "cannot run it" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(model(tokens).logits, theirs, rtol=0, atol=1e-5)
