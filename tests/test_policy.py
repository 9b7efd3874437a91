from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from igpo.config import Config, ConfigError, ModelConfig
from igpo.policy import build_policy, load_tokenizer, placement, reference_of

TOKENS = torch.tensor([[6, 3, 7, 4, 1, 1]])


def hidden(policy) -> Tensor:
    with torch.no_grad():
        return policy.hidden(TOKENS, None, None)


@pytest.fixture
def base(tiny: Callable[..., Config], tmp_path: Path) -> str:
    """The folder of a saved model with its tokenizer."""
    cfg = tiny()
    tokenizer = load_tokenizer(cfg.model)
    folder = tmp_path / "base"
    build_policy(cfg, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_new_model_follows_from_shape_vocabulary_and_seed(tiny: Callable[..., Config]) -> None:
    cfg = tiny()
    tokenizer = load_tokenizer(cfg.model)
    first, second = build_policy(cfg, tokenizer), build_policy(cfg, tokenizer)
    other = build_policy(tiny("seed=4"), tokenizer)
    assert first.config.vocab_size == len(tokenizer)
    assert first.config.mask_token_id == tokenizer.mask_token_id
    assert torch.equal(hidden(first), hidden(second))
    assert not torch.equal(hidden(first), hidden(other))
    assert not first.training


def test_a_saved_model_is_loaded_with_its_tokenizer(tiny: Callable[..., Config], base: str) -> None:
    cfg = tiny(f"model_name_or_path={base}", "tokenizer_name_or_path=none", "seed=9")
    loaded = build_policy(cfg, load_tokenizer(cfg.model))
    assert torch.equal(hidden(loaded), hidden(build_policy(tiny(), load_tokenizer(cfg.model))))


def test_dtype_is_that_of_the_weights(tiny: Callable[..., Config]) -> None:
    cfg = tiny("dtype=bfloat16")
    assert build_policy(cfg, load_tokenizer(cfg.model)).dtype == torch.bfloat16
    assert placement(ModelConfig(device="cpu")) == (torch.device("cpu"), torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(ConfigError, match="device=cuda: torch finds no CUDA device"):
        placement(ModelConfig(device="cuda"))


def test_lora_starts_as_the_base_and_follows_from_the_seed(
    tiny: Callable[..., Config], base: str
) -> None:
    cfg = tiny(f"model_name_or_path={base}", "use_lora=true", "lora_r=2", "lora_alpha=4")
    tokenizer = load_tokenizer(cfg.model)
    plain = build_policy(tiny(f"model_name_or_path={base}"), tokenizer)
    first, second = build_policy(cfg, tokenizer), build_policy(cfg, tokenizer)
    assert torch.equal(hidden(first), hidden(plain))
    trained = {name: p for name, p in first.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    # q, k, v, o, gate, up, down: two factors each
    assert len(trained) == 14
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(p.any() for name, p in trained.items() if "lora_A" in name)


def test_chosen_lora_targets_and_no_others(tiny: Callable[..., Config], base: str) -> None:
    cfg = tiny(f"model_name_or_path={base}", "use_lora=true", "lora_target_modules=q_proj,v_proj")
    policy = build_policy(cfg, load_tokenizer(cfg.model))
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(names) == 4
    assert all("q_proj" in name or "v_proj" in name for name in names)


def test_a_lora_target_that_matches_nothing_is_an_error(
    tiny: Callable[..., Config], base: str
) -> None:
    cfg = tiny(f"model_name_or_path={base}", "use_lora=true", "lora_target_modules=q_proj,ff_proj")
    with pytest.raises(
        ConfigError, match=r"'ff_proj' matches no linear layer\. There are: down_proj, gate_proj"
    ):
        build_policy(cfg, load_tokenizer(cfg.model))


def test_a_saved_adapter_is_merged_into_its_base(
    tiny: Callable[..., Config], base: str, tmp_path: Path
) -> None:
    cfg = tiny(f"model_name_or_path={base}", "use_lora=true", "lora_r=2")
    tokenizer = load_tokenizer(cfg.model)
    policy = build_policy(cfg, tokenizer)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    policy.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = tiny(f"model_name_or_path={tmp_path / 'adapter'}", "tokenizer_name_or_path=none")
    merged = build_policy(again, load_tokenizer(again.model))
    torch.testing.assert_close(hidden(merged), hidden(policy))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with pytest.raises(ConfigError, match=r"holds a LoRA adapter\. Name its base model"):
        build_policy(replace(again, lora=cfg.lora), tokenizer)


@pytest.mark.parametrize("lora", ["use_lora=false", "use_lora=true"])
def test_the_reference_stays_where_the_policy_began(
    tiny: Callable[..., Config], base: str, lora: str
) -> None:
    cfg = tiny(f"model_name_or_path={base}", lora)
    policy = build_policy(cfg, load_tokenizer(cfg.model))
    reference = reference_of(policy, cfg)
    began = hidden(policy)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1)
    moved = hidden(policy)
    with reference() as frozen:
        assert torch.equal(hidden(frozen), began)
    assert torch.equal(hidden(policy), moved)
    assert not torch.equal(moved, began)


def test_a_tokenizer_is_needed_and_must_be_complete(tmp_path: Path, problems: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer_name_or_path must name a folder when"):
        load_tokenizer(ModelConfig())
    with pytest.raises(ConfigError, match="there is no folder 'nowhere'"):
        load_tokenizer(ModelConfig(tokenizer_name_or_path="nowhere"))
    tokenizer = load_tokenizer(ModelConfig(tokenizer_name_or_path=str(problems)))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="must have a eos_token, got none"):
        load_tokenizer(ModelConfig(tokenizer_name_or_path=str(tmp_path / "tokenizer")))


def test_model_and_tokenizer_must_belong_together(tiny: Callable[..., Config], base: str) -> None:
    cfg = tiny(f"model_name_or_path={base}")
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.mask_token = "+"
    with pytest.raises(ConfigError, match="tokenizer's mask token is 3, the model's 1"):
        build_policy(cfg, tokenizer)
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.add_tokens(["new"])
    with pytest.raises(ConfigError, match="tokenizer has 26 tokens, the model 25"):
        build_policy(cfg, tokenizer)
