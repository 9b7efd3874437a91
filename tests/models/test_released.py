"""Public checkpoints: read, computed and written back as their own code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from public_configs import LLADA, PUBLIC, describe, public_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from igpo.models import MaskedDecoder, load_model
from igpo.models.families import FAMILIES
from igpo.models.loading import CLASSES

TOKENS = torch.arange(24).reshape(2, 12) * 5 % 120
FIXTURES = ("llada", "dream", "lladamoe", "sdar", "llada2")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_are_those_of_the_public_code(shared: Path, name: str) -> None:
    folder = shared / "fixtures" / "models" / name
    reference = load_file(folder / "reference.safetensors")
    block = int(reference["block"]) if "block" in reference else None
    model = load_model(folder, block_length=block)
    # experts are summed in another order than the public code does: 5e-7
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-6 if "moe" in name or name == "llada2" else 0}
    with torch.no_grad():
        torch.testing.assert_close(model(reference["ids"]).logits, reference["logits"], **close)
        if "am" not in reference:
            return
        # of llada, `logits_masked` has the old causal-when-padded bug of its code; `logits_bias` is what padding means
        key, slack = ("logits_bias", 1e-6) if name == "llada" else ("logits_masked", close["atol"])
        real = reference["am"].bool()
        logits = model(reference["ids"], reference["am"], reference.get("pos")).logits
        torch.testing.assert_close(logits[real], reference[key][real], rtol=0, atol=slack)


@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures_are_written_back_as_they_came(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "fixtures" / "models" / name
    load_model(folder).save_pretrained(tmp_path)
    original, written = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert original.keys() == written.keys()
    assert all(torch.equal(original[key], written[key]) for key in original)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_random_models_come_back_with_the_same_names(tmp_path: Path, name: str) -> None:
    model = public_model(name)
    model.save_pretrained(tmp_path / "first")
    again = load_model(tmp_path / "first")
    assert type(again) is type(model)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    again.save_pretrained(tmp_path / "second", max_shard_size=100_000)
    first, second = stored(tmp_path / "first"), stored(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config == PUBLIC[name]
    assert len(list((tmp_path / "second").glob("model-*.safetensors"))) > 1
    assert torch.equal(load_model(tmp_path / "second")(TOKENS).logits, model(TOKENS).logits)


# parameters and stored bytes of the released checkpoints: docs/models.md
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "LLaDA-8B": (
        LLADA | {
            "d_model": 4096, "embedding_size": 126464, "mlp_hidden_size": 12288, "n_heads": 32, "n_kv_heads": 32,
            "n_layers": 32, "mask_token_id": 126336,
        }, 8_015_581_184, 291,
    ),
    "Dream-7B": (
        PUBLIC["dream"] | {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "mask_token_id": 151666,
        }, 7_615_616_512, 339,
    ),
    "SDAR-8B": (
        PUBLIC["sdar"] | {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "mask_token_id": 151669,
        }, 8_190_735_360, 399,
    ),
    "LLaDA-MoE-7B-A1B": (
        PUBLIC["llada-moe"] | {
            "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
            "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024,
            "moe_layer_freq": [1] * 16, "mask_token_id": None,
        }, 7_356_880_896, 3 + 16 * (9 + 3 * 64),
    ),
    "LLaDA2.0-mini": (
        PUBLIC["llada2"] | {
            "vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256,
            "num_experts_per_tok": 8, "moe_intermediate_size": 512, "n_group": 8, "topk_group": 4,
            "mask_token_id": None, "eos_token_id": None,
        }, 16_255_643_392, 14_813,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_full_size_models_have_the_released_tensors(name: str) -> None:
    """Shapes only, on the meta device: parameters (and router biases) and tensors as the released index files count."""
    from igpo.models.storage import table_of

    values, parameters, tensors = SIZES[name]
    config_class, cls = CLASSES[values["model_type"]]
    with torch.device("meta"):
        model = cls(config_class.from_dict(values))
    assert sum(t.numel() for t in model.state_dict().values()) == parameters
    assert len(table_of(model)) == tensors


def test_published_ids_fill_what_a_config_leaves_out() -> None:
    config = CLASSES["llada2_moe"][0].from_dict(SIZES["LLaDA2.0-mini"][0] | {"pad_token_id": None})
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (
        156895,
        156892,
        156892,
    )
    assert config.block_length == 32
    small = CLASSES["llada2_moe"][0].from_dict(PUBLIC["llada2"] | {"mask_token_id": None})
    assert small.mask_token_id is None  # another vocabulary than the published one


def test_auto_classes_load_without_the_code_of_the_repository(tmp_path: Path) -> None:
    model = public_model("llada")
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 128
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
        assert type(loaded) is type(model)
        assert loaded.dtype == torch.bfloat16
    flex = AutoModel.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert flex.attention == "flex_attention"
    with pytest.raises(TypeError, match="from_pretrained: does not take quantization_config"):
        type(model).from_pretrained(tmp_path, quantization_config={})


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123"
    public_model("dream").save_pretrained(snapshot)
    refs = tmp_path / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    model = load_model("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert model.name_or_path == "someone/tiny"
    assert torch.equal(model(TOKENS).logits, public_model("dream")(TOKENS).logits)
    with pytest.raises(FileNotFoundError, match="'someone/other' must be a folder or a hub id"):
        load_model("someone/other", cache_dir=tmp_path, local_files_only=True)


def test_dtypes(tmp_path: Path) -> None:
    model = public_model("llada2")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    # released in float32 (2.1) or bfloat16 (2.0): a choice between experts, kept in float32 either way
    assert loaded.layers[1].mlp.gate.expert_bias.dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"of one dtype to be kept as saved, got BF16, F32\. Give dtype"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("name", PUBLIC)
@torch.no_grad()
def test_bfloat16_is_near_float32(name: str) -> None:
    model = public_model(name)
    exact = model(TOKENS).last_hidden_state
    rounded = model.to(torch.bfloat16)(TOKENS)
    assert rounded.logits.dtype == torch.float32
    error = (rounded.last_hidden_state.float() - exact).square().mean() / exact.square().mean()
    # experts near a tie change places
    assert error.sqrt() < (0.3 if model.config.num_experts else 0.03)


def test_the_block_length_asked_for_is_saved(tmp_path: Path) -> None:
    public_model("llada2").save_pretrained(tmp_path / "a")
    assert load_model(tmp_path / "a").config.block_length == 32
    load_model(tmp_path / "a", block_length=3).save_pretrained(tmp_path / "b")
    assert load_model(tmp_path / "b").config.block_length == 3
    with pytest.raises(ValueError, match="block_length must be positive, got 0"):
        load_model(tmp_path / "a", block_length=0)


def test_one_error_names_every_difference(tmp_path: Path) -> None:
    public_model("llada2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.experts.3.gate_proj.weight"]
    weights["model.layers.0.attention.query_key_value.weight"] = torch.zeros(96, 64)
    weights["extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"exactly those config\.json describes") as error:
        load_model(tmp_path)
    for part in (
        "missing: model.layers.1.mlp.experts.3.gate_proj.weight;",
        "unknown: extra;",
        "of another shape: model.layers.0.attention.query_key_value.weight [96, 64] for [128, 64].",
    ):
        assert part in str(error.value)


def test_long_lists_of_differences_are_cut(tmp_path: Path) -> None:
    public_model("sdar").save_pretrained(tmp_path)
    describe(tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"layers\.2.* and 3 more"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llada", {"alibi": True}, "alibi must be False for 'llada' models, got True"),
        ("llada", {"layer_norm_type": "low_precision"}, "layer_norm_type must be 'rms'"),
        ("dream", {"rope_scaling": {"type": "yarn"}}, "rope_scaling must be None"),
        ("sdar", {"attention_bias": True}, "attention_bias must be False"),
        ("llada-moe", {"moe_layer_freq": [0, 1]}, r"moe_layer_freq must be \[1, 1\]"),
        ("dream", {"architectures": ["DreamOn"]}, "Dream/DreamForCausalLM.*; got Dream/DreamOn"),
        ("llada2", {"topk_group": 5}, r"topk_group must be in \[1, 4\], got 5"),
        ("llada2", {"num_experts_per_tok": 6}, r"num_experts_per_tok must be in \[1, 4\], got 6"),
    ],
)
def test_what_the_decoder_does_not_implement_is_refused(
    tmp_path: Path, name: str, change: dict, message: str
) -> None:
    public_model(name).save_pretrained(tmp_path)
    describe(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    model: MaskedDecoder = public_model("llada")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model-00002-of-00004\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="max_shard_size must be bytes or like '5GB'"):
        model.save_pretrained(tmp_path, max_shard_size="5 gigs")


def test_the_documentation_lists_every_family_and_its_ids() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        assert f"| {family.model_type} / {family.architecture} |" in text
        for token in family.ids.values():
            assert str(token) in text, token
        assert family.turn_end.replace("|", "\\|") in text
