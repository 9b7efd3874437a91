"""The configurations of configs/: loadable, every number with its source, equal to the presets; and --dry-run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from public_configs import PUBLIC

from igpo.cli import COMMANDS, main, parse
from igpo.config import Config, LoraConfig, ModelConfig
from igpo.config_io import assign, flatten, load, read, validate
from igpo.dry_run import memory, model_shape, parameters, work
from igpo.rl.algorithms import build_algorithm
from igpo.rl.presets import PRESETS

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SOURCE = re.compile(
    r"#.*(\[(paper|code|d1|llada|ours)\]|as eta_low|none|prompts are never cut|two tokens)"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_one(path: Path) -> None:
    cfg = load([path], ["model_name_or_path=model"])
    validate(cfg)
    build_algorithm(cfg.rl, cfg.rollout, lambda rollouts, prompts: rollouts, pad_id=0)  # type: ignore[arg-type, return-value]
    for line in path.read_text().splitlines():
        number = re.match(r"\s+\w+: \[?[-\d.]", line)
        if number:
            assert SOURCE.search(line), f"{path.name}: say where this comes from: {line.strip()}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_all_that_its_preset_says(path: Path) -> None:
    """So the preset that `igpo train` puts beneath it changes nothing."""
    command = COMMANDS["train" if "rl" in yaml.safe_load(path.read_text()) else "sft"]
    (cfg,) = parse(command, [str(path), "model_name_or_path=model"])
    assert cfg == load([path], ["model_name_or_path=model"])


# what configs/ adds to a preset, or the file's own task decides
APART = {"lora.lora_target_modules", "train.save_steps", "train.warmup_steps", "rl.num_iterations"}


@pytest.mark.parametrize(
    ("name", "preset"),
    [("llada-8b-igpo", "igpo"), ("llada-8b-d1-gsm8k", "diffu_grpo"), ("llada-8b-d1-sudoku", "diffu_grpo"),
     ("llada-8b-agrpo-gsm8k", "agrpo"), ("llada-8b-agrpo-countdown", "agrpo")],
)  # fmt: skip
def test_numbers_are_those_of_the_presets(name: str, preset: str) -> None:
    def settings(pairs: Any) -> dict[str, Any]:
        return flatten(assign(Config(), pairs, "test"))

    def of_preset(tree: Any, path: str = "") -> Any:
        for key, value in tree.items():
            place = f"{path}{key}"
            yield from (
                of_preset(value, f"{place}.") if isinstance(value, dict) else [(place, value)]
            )

    wanted = settings(of_preset(PRESETS[preset]))
    found = flatten(load([ROOT / "configs" / f"{name}.yaml"]))
    names = {key for key, _ in of_preset(PRESETS[preset])}
    assert {k: found[k] for k in names - APART} == {k: wanted[k] for k in names - APART}


def test_baselines_differ_from_igpo_by_the_explorer_alone() -> None:
    igpo = flatten(load([ROOT / "configs" / "llada-8b-igpo.yaml"]))
    for name in ("grpo", "grpo-resample"):
        other = flatten(load([ROOT / "configs" / f"llada-8b-{name}.yaml"]))
        differing = {key for key in igpo if igpo[key] != other[key]}
        assert {"rl.algorithm"} <= differing
        assert all(key == "rl.algorithm" or key.startswith("rl.inpaint.") for key in differing)


def words(problems: Path, tmp_path: Path) -> list[str]:
    return [
        f"tokenizer_name_or_path={problems}", f"train_file={problems / 'problems.jsonl'}", "prompt_template=plain",
        f"output_dir={tmp_path / 'never'}", "max_completion_length=32", "diffusion_steps=16", "device=cpu",
        "task=answer", "trace_column=answer", "prompt_column=question", "num_iterations=2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["llada-8b-igpo", "llada-8b-d1-gsm8k", "llada-8b-agrpo-gsm8k"])
def test_dry_run_of_training(
    name: str, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = ROOT / "configs" / f"{name}.yaml"
    model = tmp_path / "model"
    made = words(problems, tmp_path)
    # LoRA needs a folder; its shape is all a dry run reads of it
    model.mkdir()
    shape = {
        "vocab_size": 30,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
    }
    (model / "config.json").write_text(json.dumps({"model_type": "igpo_decoder", **shape}))
    command = ["train", str(config), *made, f"model_name_or_path={model}", "--dry-run"]
    command += [  # a block that divides the short canvas
        "tflops=0.5",
        *(["block_length=8"] if "agrpo" in name else []),
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "dry run: passed" in said.err
    for text in (
        "AdamW moments",
        "PFLOP",
        "a step, every group rescued" if name == "llada-8b-igpo" else "a step",
        "problems",
        "inpaint/groups_all_wrong",
    ):
        assert text in said.out
    assert "0 + 3 =" in said.out
    assert "times at the 0.5 TFLOP/s given" in said.err
    assert not (tmp_path / "never").exists()


def test_dry_run_has_the_blocks_of_the_model(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {"mask_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = tmp_path / "sdar"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(PUBLIC["sdar"] | ids))
    made = [*words(problems, tmp_path), f"model_name_or_path={model}", "attn_implementation=sdpa"]
    sizes = ["max_completion_length=8", "block_length=4", "diffusion_steps=8", "num_generations=2"]
    assert main(["train", "preset=dipo", *made, *sizes, "--dry-run"]) == 0
    assert "dry run: passed" in capsys.readouterr().err


def test_dry_run_of_sft(
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("igpo.time_plan.measured", list)
    made = [w for w in words(problems, tmp_path) if not w.startswith("num_iterations")]
    config = ROOT / "configs" / "llada-8b-sft.yaml"
    assert main(["sft", str(config), *made, "use_lora=false", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "update" in said.out
    assert "no rate of train_step was measured on" in said.err
    assert "dry run: passed" in said.err
    assert not (tmp_path / "never").exists()


def test_the_plan_counts_what_is_there(problems: Path) -> None:
    model = ModelConfig(tokenizer_name_or_path=str(problems), dtype="bfloat16", device="cpu")
    cfg = Config(model=model)
    shape = model_shape(cfg)
    everything, trained = parameters(shape, cfg)
    assert everything == trained
    layer = 4 * 128 * 128 + 3 * 128 * 344 + 2 * 128
    assert everything == 4 * layer + 2 * 25 * 128 + 128
    states = memory(cfg, shape, is_sft=False)
    assert states["together"] * 2**30 == pytest.approx(everything * (2 + 4 + 4 + 8 + 2))
    assert memory(cfg, shape, is_sft=True)["together"] < states["together"]
    adapters = Config(model=model, lora=LoraConfig(True, lora_r=2, lora_target_modules=("q_proj",)))
    assert parameters(shape, adapters)[1] == 4 * 2 * (128 + 128)
    found = {line.part: line for line in work(cfg, shape, 2.0, is_sft=False)}
    assert found["rollout"].forwards == found["rescue"].forwards == 64 * 8 * 128
    assert found["rollout"].seconds == found["rollout"].flops / 2e12


def test_the_page_names_every_configuration() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    for path in CONFIGS:
        assert path.name in text
        assert read(path)
