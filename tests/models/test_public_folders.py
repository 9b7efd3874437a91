"""From a folder in a public family's form to a trained one, with every program in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from public_configs import describe
from public_folders import ROWS, llada_folder, qwen_folder
from safetensors.torch import load_file, save_file

from igpo import evaluate, train
from igpo.config import Config, ConfigError
from igpo.models import load_model, load_tokenizer, stop_token_ids
from igpo.models.families import FAMILIES
from igpo.models.storage import table_of
from igpo.ops._head import head_logits
from igpo.options import EvalOptions
from igpo.policy import build_policy
from igpo.policy import load_tokenizer as program_tokenizer

FOLDERS = {"llada": llada_folder, "dream": qwen_folder, "sdar": qwen_folder}


@pytest.fixture(params=list(FOLDERS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FOLDERS[request.param](tmp_path / request.param)


@pytest.fixture
def public(tiny: Callable[..., Config], folder: Path) -> Callable[..., Config]:
    return lambda *overrides: tiny(
        f"model_name_or_path={folder}",
        "tokenizer_name_or_path=none",
        "max_steps=2",
        "reward_funcs=public_folders:ascii_share",
        *overrides,
    )


def test_special_tokens_are_complete(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    config = load_model(folder).config
    assert tokenizer.is_fast
    assert tokenizer.mask_token_id == config.mask_token_id
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == config.eos_token_id
    assert tokenizer.decode(tokenizer("12 + 3 = 15")["input_ids"]) == "12 + 3 = 15"
    assert len(tokenizer) < config.vocab_size == ROWS


def test_a_completion_ends_with_the_turn_of_the_chat_template(folder: Path) -> None:
    end = "<|eot_id|>" if folder.name == "llada" else "<|im_end|>"
    tokenizer = load_tokenizer(folder)
    ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    tokenizer.chat_template = (
        tokenizer.chat_template or "{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant"
    )
    assert stop_token_ids(tokenizer) == ids
    assert {f.turn_end for f in FAMILIES if f.model_type.lower() == folder.name} >= {end}
    tokenizer.chat_template = None
    assert stop_token_ids(tokenizer) == {tokenizer.eos_token_id}


def test_the_chat_template_of_the_files_is_used(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llada_folder(tmp_path / "llada"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "3+4"}], tokenize=False)
    assert text == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n3+4<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_training_writes_the_layout_it_read(folder: Path, public: Callable[..., Config]) -> None:
    cfg = public()
    train.run(cfg)
    written = Path(cfg.train.output_dir) / "checkpoint-2"
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(written / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, written)]
    assert configs[0] == configs[1]
    again = public(f"model_name_or_path={written}", f"eval_file={cfg.data.train_file}")
    assert 0 <= evaluate.run(again, EvalOptions())["accuracy"] <= 1
    tokenizer = program_tokenizer(again.model)
    assert tokenizer.mask_token_id == program_tokenizer(cfg.model).mask_token_id


@pytest.mark.parametrize("folder", ["sdar"], indirect=True)
def test_resuming_is_bitwise(public: Callable[..., Config]) -> None:
    whole = public("save_steps=1", "max_steps=3")
    train.run(whole)
    first = Path(whole.train.output_dir)
    again = public(
        "max_steps=3", f"output_dir={first}-2", f"resume_from_checkpoint={first / 'checkpoint-1'}"
    )
    train.run(again)
    one, two = (
        load_file(p / "checkpoint-3" / "model.safetensors") for p in (first, Path(f"{first}-2"))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rows_the_tokenizer_does_not_have_are_never_drawn(public: Callable[..., Config]) -> None:
    cfg = public()
    tokenizer = program_tokenizer(cfg.model)
    policy = build_policy(cfg, tokenizer)
    tokens = torch.arange(12)[None]
    hidden = policy.hidden(tokens)
    assert len(policy.head_weight) == len(tokenizer)
    full = policy(tokens).logits
    assert full.shape[-1] == ROWS
    mine = head_logits(hidden, policy.head_weight)
    rows = slice(0, -1) if policy.config.shifted else slice(1, None)
    torch.testing.assert_close(mine[:, 1:], full[:, rows, : len(tokenizer)])


def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    folder = llada_folder(tmp_path / "llada")
    describe(folder, mask_token_id=299)
    with pytest.raises(
        ValueError, match=r"mask_token_id of the model is 299, got a vocabulary of 262"
    ):
        load_tokenizer(folder)
    other = qwen_folder(tmp_path / "dream")
    describe(other, mask_token_id=257)
    with pytest.raises(ValueError, match="its mask token is 260, the model's 257"):
        load_tokenizer(other)
    with pytest.raises(ConfigError, match=r"has no tokenizer_config\.json"):
        program_tokenizer(tiny(f"tokenizer_name_or_path={tmp_path}").model)


# what a LoRA target may be called -> layers it adapts in each of the two layers
TARGETS = {
    "llada": {"q_proj": 1, "attn_out": 1, "ff_proj": 1, "ff_out": 1, "up_proj": 1, "down_proj": 1, "": 7},
    "dream": {"q_proj": 1, "o_proj": 1, "gate_proj": 1, "": 7},
    "sdar": {"v_proj": 1, "": 7},
}  # fmt: skip


def test_lora_targets_by_the_names_of_the_family(
    request: pytest.FixtureRequest, folder: Path, public: Callable[..., Config]
) -> None:
    for target, layers in TARGETS[folder.name].items():
        cfg = public("use_lora=true", "lora_r=2", f"lora_target_modules={target or 'none'}")
        policy = build_policy(cfg, program_tokenizer(cfg.model))
        trained = [name for name, p in policy.named_parameters() if p.requires_grad]
        assert len(trained) == layers * 2 * 2, target
        assert not any("lm_head" in name for name in trained)
    cfg = public("use_lora=true", "lora_target_modules=wq")
    with pytest.raises(ConfigError, match="'wq' matches no linear layer"):
        build_policy(cfg, program_tokenizer(cfg.model))


@pytest.mark.parametrize("folder", ["dream"], indirect=True)
def test_a_frozen_head_gets_no_gradient(
    public: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the parameter nor inside the op: the head's gradient has as many numbers as the head."""
    from igpo.ops import _linear

    sizes = []
    init = _linear.HeadGradient.__init__

    def watched(self, *args) -> None:
        init(self, *args)
        sizes.append(self.weight.numel())

    monkeypatch.setattr(_linear.HeadGradient, "__init__", watched)
    cfg = public("freeze_head=true", "max_steps=1", "gradient_checkpointing=true")
    train.run(cfg)
    assert sizes
    assert not any(sizes)
    saved = load_model(Path(cfg.train.output_dir) / "checkpoint-1")
    started = load_model(cfg.model.model_name_or_path or "")
    assert torch.equal(saved.head_weight, started.head_weight)
    assert not torch.equal(saved.norm.weight, started.norm.weight)


@pytest.mark.parametrize("folder", ["dream"], indirect=True)
def test_activation_checkpointing_recomputes_in_eval_mode(public: Callable[..., Config]) -> None:
    tokens = torch.arange(24).view(2, 12)
    found = []
    for on in ("false", "true"):
        cfg = public(f"gradient_checkpointing={on}")
        policy = build_policy(cfg, program_tokenizer(cfg.model))
        calls: list[int] = []
        policy.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            policy.hidden(tokens)
        policy.hidden(tokens).square().mean().backward()
        found.append(([p.grad for p in policy.layers.parameters()], len(calls)))
    (plain, two), (again, three) = found
    assert (two, three) == (2, 3)
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("folder", ["llada"], indirect=True)
def test_adapters_of_the_public_code_are_understood(
    folder: Path, public: Callable[..., Config], tmp_path: Path
) -> None:
    """The same adapter under our keys and under those of the public class; a key without a place is an error."""
    cfg = public("use_lora=true", "lora_r=2", "max_steps=1", "rl.num_iterations=2")
    train.run(cfg)
    ours = Path(cfg.train.output_dir) / "checkpoint-1"
    theirs = tmp_path / "theirs"
    shutil.copytree(ours, theirs)
    weights = load_file(ours / "adapter_model.safetensors")
    names = {
        pieces[0].name.removesuffix("weight"): released.removesuffix("weight")
        for released, pieces in table_of(load_model(folder)).items()
    }

    def renamed(key: str) -> str:
        module, _, rest = key.removeprefix("base_model.model.").partition("lora_")
        return f"base_model.model.{names[module]}lora_{rest}"

    save_file({renamed(k): v for k, v in weights.items()}, theirs / "adapter_model.safetensors")
    one, two = (
        build_policy(c, program_tokenizer(c.model))
        for c in (public(f"model_name_or_path={place}") for place in (ours, theirs))
    )
    base = load_model(folder)
    moved = 0
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        moved += not torch.equal(a, base.state_dict()[name])
    assert moved == 14
    weights["base_model.model.nowhere.lora_A.weight"] = torch.ones(2, 64)
    save_file(weights, theirs / "adapter_model.safetensors")
    lost = public(f"model_name_or_path={theirs}")
    with pytest.raises(ConfigError, match="must fit the model, got tensors for nowhere"):
        build_policy(lost, program_tokenizer(lost.model))
    del weights["base_model.model.nowhere.lora_A.weight"], weights[next(iter(weights))]
    save_file(weights, theirs / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="the adapter must be complete"):
        build_policy(lost, program_tokenizer(lost.model))
