from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from igpo import checkpoint
from igpo.checkpoint import State
from igpo.config import Config, ConfigError
from igpo.logging import RunLog
from igpo.models import load_model
from igpo.rl.algorithms import build_algorithm
from igpo.train import Run, set_up, train
from igpo.types import Graded, Prompt, Rollouts


def grade(rollouts: Rollouts, prompts: Sequence[Prompt]) -> Graded:
    """The share of even tokens; few groups have a row that counts as correct, so the explorer has work."""
    rewards = (rollouts.completion % 2 == 0).float().mean(1)
    correct = rewards >= 0.85
    return Graded(rollouts, rewards, correct, torch.zeros_like(correct), ("",) * len(rewards))


def go(cfg: Config) -> tuple[Run, list[dict[str, Any]]]:
    run = set_up(cfg)
    algorithm = build_algorithm(cfg.rl, cfg.rollout, grade, pad_id=run.tokenizer.pad_token_id)
    run = replace(run, grade=grade, algorithm=algorithm)
    with RunLog(cfg, run.state.step) as log:
        train(run, log)
    lines = (Path(cfg.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return run, [{k: v for k, v in json.loads(line).items() if k != "step_time"} for line in lines]


def assert_same_state(first: Run, second: Run) -> None:
    for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = first.updater.state_dict(), second.updater.state_dict()
    assert ours["done"] == theirs["done"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for index, values in ours["weights"].items():
        assert values.keys() == theirs["weights"][index].keys()
        for name, value in values.items():
            assert torch.equal(value, theirs["weights"][index][name]), name


@pytest.fixture
def base(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    run = set_up(tiny())
    run.policy.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ["plain", "linear-bfloat16", "lora"])
def test_an_interrupted_run_goes_on_bitwise(
    tiny: Callable[..., Config], tmp_path: Path, base: Path, kind: str
) -> None:
    """2k steps at once, against k steps, a new process, k steps: weights, moments, masters, metrics."""
    options = {
        "plain": [],
        "linear-bfloat16": ["lr_scheduler_type=linear", "dtype=bfloat16"],
        "lora": ["use_lora=true", "lora_r=2", f"model_name_or_path={base}"],
    }[kind]
    whole, lines = go(tiny(*options, "save_steps=2"))
    assert any(line["inpaint/replaced"] > 0 for line in lines), (
        "IGPO's branch is part of what is resumed"
    )
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # as if killed after step 2
    resumed, again = go(tiny(*options, "save_steps=2", "resume_from_checkpoint=last"))
    assert resumed.state.step == 2
    assert_same_state(whole, resumed)
    assert again == lines


def test_a_finished_run_can_be_prolonged(tiny: Callable[..., Config], tmp_path: Path) -> None:
    whole, lines = go(tiny())
    part = f"output_dir={tmp_path / 'part'}"
    go(tiny("max_steps=3", part))
    folder = tmp_path / "part" / "checkpoint-3"
    resumed, again = go(tiny(part, f"resume_from_checkpoint={folder}", "logging_steps=1"))
    assert_same_state(whole, resumed)
    assert again == lines


def test_a_checkpoint_is_a_model_folder(tiny: Callable[..., Config], tmp_path: Path) -> None:
    run, _ = go(tiny("max_steps=1"))
    folder = tmp_path / "run" / "checkpoint-1"
    for a, b in zip(load_model(folder).parameters(), run.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    alone = tiny(
        f"model_name_or_path={folder}",
        "tokenizer_name_or_path=none",
        f"output_dir={tmp_path / 'next'}",
    )
    assert set_up(alone).tokenizer.mask_token_id == run.tokenizer.mask_token_id


def test_the_kl_reference_is_the_policy_training_began_with(tiny: Callable[..., Config]) -> None:
    first, _ = go(tiny("max_steps=2", "beta=0.1"))
    began = set_up(tiny("output_dir=unused"))
    resumed = set_up(tiny("max_steps=3", "beta=0.1", "resume_from_checkpoint=last"))
    assert resumed.reference is not None
    with resumed.reference() as frozen:
        for a, b in zip(frozen.parameters(), began.policy.parameters(), strict=True):  # type: ignore[attr-defined]
            assert torch.equal(a, b)
    assert_same_state(resumed, first)


def test_only_the_newest_checkpoints_are_kept(tiny: Callable[..., Config], tmp_path: Path) -> None:
    go(tiny("save_steps=1", "save_total_limit=2", "num_iterations=1"))
    names = [folder.name for folder in checkpoint.existing(tmp_path / "run")]
    assert names == ["checkpoint-3", "checkpoint-4"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", ".checkpoint-11.partial", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoint.existing(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
    ]


def test_a_run_killed_while_saving_leaves_the_checkpoint_before(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny("max_steps=2", "num_iterations=1")
    run = set_up(cfg)
    good = checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, State(1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, State(2))
    last = replace(cfg, train=replace(cfg.train, resume_from_checkpoint="last"))
    assert checkpoint.find(last) == good
    saved = checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, State(2))
    assert checkpoint.find(last) == saved
    assert not list((tmp_path / "run").glob(".*"))


def test_the_optimizer_file_holds_tensors_and_numbers_only(tiny: Callable[..., Config]) -> None:
    cfg = tiny()
    run = set_up(cfg)
    folder = checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, State(0))
    assert torch.load(folder / "optimizer.pt", weights_only=True)["done"] == 0
    facts = json.loads((folder / "state.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["config"]["train.seed"] == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature=0.7", "the run had other settings: rollout.temperature was 1.2, is 0.7"),
        ("seed=5", "train.seed was 3, is 5"),
        ("suppress_tokens=4", "rollout.suppress_tokens was [], is [4]"),
    ],
)
def test_settings_the_continuation_depends_on_may_not_change(
    tiny: Callable[..., Config], override: str, message: str
) -> None:
    cfg = tiny("max_steps=1")
    run = set_up(cfg)
    checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, State(1))
    with pytest.raises(ConfigError, match=re.escape(message)):
        set_up(tiny("resume_from_checkpoint=last", override))


def test_the_length_may_change_unless_the_schedule_depends_on_it(
    tiny: Callable[..., Config],
) -> None:
    cfg = tiny("max_steps=1", "lr_scheduler_type=linear")
    run = set_up(cfg)
    checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, State(1))
    longer = ("max_steps=2", "resume_from_checkpoint=last", "lr_scheduler_type=linear")
    with pytest.raises(ConfigError, match=r"train\.max_steps was 1, is 2"):
        set_up(tiny(*longer))


def test_the_data_may_not_change(tiny: Callable[..., Config], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(str(tiny().data.train_file), data)
    cfg = tiny(f"train_file={data}")
    run = set_up(cfg)
    checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, State(1))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(data, moved)
    again = tiny(f"train_file={moved}", "resume_from_checkpoint=last")
    assert set_up(again).state.step == 1
    moved.write_text("".join(reversed(data.read_text().splitlines(True))))
    with pytest.raises(ConfigError, match="holds other data than then"):
        set_up(again)


def test_a_dataset_by_name_is_known_by_its_rows(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(str(tiny().data.train_file), data)
    cfg = tiny(f"train_file=gsm8k={data}")
    run = set_up(cfg)
    checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, State(1))
    again = tiny(f"train_file=gsm8k={data}", "resume_from_checkpoint=last")
    assert set_up(again).state.step == 1
    data.write_text("".join(reversed(data.read_text().splitlines(True))))
    with pytest.raises(ConfigError, match="holds other data than then"):
        set_up(again)
    named = [checkpoint.digest(replace(cfg.data, train_file=x)) for x in ("gsm8k", "gsm8k@test")]
    assert len({*named, None}) == 3


def test_where_to_resume_from_is_checked(tiny: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=last: .* holds no checkpoint"):
        checkpoint.find(tiny("resume_from_checkpoint=last"))
    with pytest.raises(ConfigError, match="is not the folder of a checkpoint"):
        checkpoint.find(tiny(f"resume_from_checkpoint={tmp_path}"))
    assert checkpoint.find(tiny()) is None
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"already holds checkpoint-5\. Choose another folder, or resume"
    ):
        checkpoint.find(tiny())
