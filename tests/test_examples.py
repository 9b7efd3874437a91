"""The examples as a user runs them: the commands of their README, with sizes that take seconds."""

from __future__ import annotations

import json
import math
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from igpo.cli import main

ROOT = Path(__file__).resolve().parents[1]
GSM8K = ROOT / "examples" / "gsm8k-from-scratch"
TWENTY = ROOT / "tests" / "data" / "gsm8k_20.jsonl"

CANVAS = (
    "max_completion_length=128",
    "block_length=32",
    "diffusion_steps=8",
    "max_prompt_length=256",
)
MODEL = ("hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32")
SMALLER = {
    "tokenizer": ("vocab_size=384",),
    "sft": (*CANVAS, *MODEL, "max_steps=4", "eval_steps=2", "logging_steps=1"),
    "train": (
        *CANVAS, "model_name_or_path=runs/sft/checkpoint-4", "max_steps=1", "prompts_per_step=2", "num_generations=2",
        "num_iterations=1",
    ),
    "eval": (*CANVAS, "model_name_or_path=runs/rl/checkpoint-1", "eval_limit=3"),
    "generate": (*CANVAS, "model_name_or_path=runs/rl/checkpoint-1"),
}  # fmt: skip


def commands(readme: Path) -> list[list[str]]:
    """The words of the commands in the README's blocks of ```sh, in their order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme.read_text(encoding="utf-8"), re.S | re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """base.yaml sets their number, for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    def run(words: list[str]) -> int:
        program, *rest = words
        if program == "igpo":
            return main([*rest, *SMALLER[rest[0]]])
        assert program == "python", f"the README's commands are igpo and python, got {program}"
        monkeypatch.setattr(sys, "argv", rest)
        runpy.run_path(rest[0], run_name="__main__")
        return 0

    return run


def test_gsm8k_from_scratch(
    execute: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in GSM8K.iterdir():
        shutil.copy(file, tmp_path)
    shutil.copy(TWENTY, tmp_path / "gsm8k_train.jsonl")
    monkeypatch.chdir(tmp_path)
    found = commands(GSM8K / "README.md")
    assert [words[1] for words in found] == ["short_problems.py", *SMALLER]
    found[0] = [*found[0], "4"]  # held out
    shown = {}
    for words in found:
        assert execute(words) == 0, words
        shown[words[1]] = capsys.readouterr()
    assert len(Path("data/train.jsonl").read_text().splitlines()) == 16
    losses = [line["loss"] for line in logged("sft")]
    assert losses[-1] < losses[0] < 1.3 * math.log(384)
    assert logged("sft")[-1]["eval_loss"] > 0
    assert logged("rl")[0]["inpaint/groups_all_wrong"] > 0
    assert "accuracy" in shown["eval"].out
    result = json.loads(Path("runs/eval/evaluation.json").read_text())
    assert result["metrics"]["num_problems"] == 3
    assert len(Path("predictions.jsonl").read_text().splitlines()) == 3
    steps = [line for line in shown["generate"].out.splitlines() if "\u2591" in line]
    assert len(steps) == 7  # of 8: after the last nothing is masked


def logged(run: str) -> list[dict[str, float]]:
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_readme_shows_the_numbers_of_the_configurations() -> None:
    """Paths in the commands are those the programs before them write."""
    text = (GSM8K / "README.md").read_text(encoding="utf-8")
    for name, section in (("sft", "runs/sft"), ("rl", "runs/rl")):
        yaml = (GSM8K / f"{name}.yaml").read_text(encoding="utf-8")
        steps = re.search(r"^max_steps: (\d+)", yaml, re.M)
        assert steps is not None
        assert f"{section}/checkpoint-{steps[1]}" in text
