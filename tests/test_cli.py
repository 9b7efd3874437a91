from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import igpo
from igpo import cli
from igpo.cli import COMMANDS, main
from igpo.config import Config, ConfigError
from igpo.config_io import assign, dump, pairs, split
from igpo.optim import TrainingError
from igpo.options import DemoOptions, GenerateOptions
from igpo.rl.algorithms import ALGORITHMS
from igpo.rl.presets import BASELINES, PRESETS, preset_of


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """program("igpo.sft", run=f) stands in for the module of a command."""

    def stand_in(name: str, **functions: Any) -> None:
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**functions))  # type: ignore[arg-type]

    return stand_in


def test_every_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in COMMANDS)
    assert main([]) == 2
    for name, command in COMMANDS.items():
        assert main([name, "--help"]) == 0
        assert command.summary in capsys.readouterr().out


def test_help_lists_every_key_with_type_default_and_comment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["generate", "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "num_generations=8  (int)  # G" in lines
    assert "prompt=none  (str | None)  # one prompt, as typed" in lines
    assert "rl.inpaint:" in lines


def test_a_program_gets_its_configuration_and_options(program, tmp_path: Path) -> None:
    got: list[Any] = []
    program("igpo.generate", run=lambda *arguments: got.extend(arguments))
    file = tmp_path / "a.yaml"
    file.write_text("beta: 0.5\ntemperature: 0.1\n")
    words = ["temperature=0.2", "--prompt", "1 + 1 =", "--show-steps", "--num_samples=3"]
    assert main(["generate", str(file), *words]) == 0
    cfg, options = got
    assert isinstance(cfg, Config)
    assert (cfg.rl.beta, cfg.rollout.temperature) == (0.5, 0.2)
    assert options == GenerateOptions(prompt="1 + 1 =", show_steps=True, num_samples=3)


def test_a_program_without_a_tree_gets_its_options_alone(program) -> None:
    got: list[Any] = []
    program("igpo.demo", main=got.append)
    assert main(["demo", "--out", "elsewhere", "from_scratch=true"]) == 0
    assert got == [DemoOptions(out="elsewhere", from_scratch=True)]


def test_a_preset_comes_before_files_and_overrides(program, tmp_path: Path) -> None:
    got: list[Config] = []
    program("igpo.train", run=got.append)
    file = tmp_path / "a.yaml"
    file.write_text("epsilon: 0.3\n")
    words = [str(file), "num_iterations=2", "model_name_or_path=somewhere"]
    assert main(["train", "preset=diffu_grpo", *words]) == 0
    rl = got[0].rl
    assert (rl.algorithm, rl.epsilon, rl.num_iterations, rl.beta) == ("grpo", 0.3, 2, 0.04)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_starts_from_the_preset_of_its_algorithm(
    program, algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as the preset by name, wherever the algorithm is named; the last name counts."""
    got: list[Config] = []
    program("igpo.train", run=got.append)
    file, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text(f"algorithm: {algorithm}\n")
    other.write_text("algorithm: espo\n")
    words = ["model_name_or_path=somewhere", "epsilon=0.3"]
    name = str(preset_of(algorithm))
    for given in ([f"algorithm={algorithm}"], [str(file)], [str(other), str(file)],
                  [str(other), f"algorithm={algorithm}"], [str(file), f"preset={name}"]):  # fmt: skip
        assert main(["train", *given, *words]) == 0
        assert capsys.readouterr().err.startswith(f"preset {name} beneath what is given (")
    assert len(set(got)) == 1
    settings = assign(Config(), pairs(PRESETS[name]), "preset")
    settings = assign(settings, [("algorithm", algorithm), *map(split, words)], "command line")
    assert got[0] == settings


def test_every_algorithm_has_a_preset_or_is_a_baseline() -> None:
    own = {preset["rl"]["algorithm"]: name for name, preset in PRESETS.items()}
    assert len(own) == len(PRESETS)
    assert set(own) | set(BASELINES) == set(ALGORITHMS)
    assert not set(own) & set(BASELINES)
    assert {preset_of(name) for name in BASELINES} == {"igpo"}
    assert all(preset_of(algorithm) == name for algorithm, name in own.items())
    assert preset_of("raft") is None


def test_a_preset_can_be_left_out_and_another_command_has_none(
    program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Config] = []
    for name in ("igpo.train", "igpo.sft"):
        program(name, run=got.append)
    assert main(["train", "preset=none", "algorithm=espo"]) == 0
    assert main(["sft", "algorithm=espo"]) == 0
    assert capsys.readouterr().err == ""
    assert got == [assign(Config(), [("algorithm", "espo")], "command line")] * 2
    assert main(["train"]) == 0  # a model from scratch: LoRA would train nothing that was learned
    assert got[2] == Config()
    said = "preset igpo beneath what is given, but for its LoRA: the model is new (preset=none: the defaults)\n"
    assert capsys.readouterr().err == said
    assert main(["sft", "preset=espo"]) == 0
    assert got[3].rl.algorithm == "espo"
    assert main(["train", "algorithm=raft"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("algorithm raft has no preset")
    monkeypatch.setenv("RANK", "1")  # of several processes the first says it
    assert main(["train"]) == 0
    assert capsys.readouterr().err == ""


def test_a_complete_configuration_is_not_changed(program, tmp_path: Path) -> None:
    got: list[Config] = []
    program("igpo.train", run=got.append)
    file = tmp_path / "config.yaml"
    kept = assign(Config(), [("algorithm", "espo"), ("temperature", 0.3)], "test")
    file.write_text(dump(kept))
    assert main(["train", str(file)]) == 0
    assert got == [kept]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "igpo: unknown command 'trian'. The nearest one is 'train'."),
        (["train", "betta=1"], "igpo train: command line: unknown key 'betta'. The nearest one is 'beta'."),
        (["train", "--betta", "1"], "igpo train: command line: unknown key 'betta'. The nearest one is 'beta'."),
        (["train", "beta=x"], "igpo train: command line: rl.beta must be a finite number, got 'x' (str)."),
        (["train", "--beta"], "igpo train: command line: --beta needs a value."),
        (["train", "none.yaml"], "igpo train: none.yaml: No such file or directory."),
        (["train", "max_steps=0"], "igpo train: max_steps must be at least 1, got 0."),
        (
            ["sft", "preset="],
            f"igpo sft: command line: preset must be auto, none or one of {', '.join(PRESETS)}, got ''.",
        ),
        (
            ["train", "preset=igpo", "algorithm=grpo"],
            "igpo train: command line: preset must be diffu_grpo with algorithm 'grpo', got 'igpo'. "
            "Leave out one of the two; or set preset=none, and the settings one by one.",
        ),
        (["demo", "a.yaml"], "igpo demo: command line: 'a.yaml' must be key=value; this command takes no file."),
        (["demo", "sed=1"], "igpo demo: command line: unknown key 'sed'. The nearest one is 'seed'."),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("no"), 2),
        (FileNotFoundError("no"), 2),
        (ModuleNotFoundError("no", name="transformers.models"), 2),
        (TrainingError("no"), 1),
        (FloatingPointError("no"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_a_run_are_one_line(
    program, error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cfg: Config) -> None:
        raise error

    program("igpo.sft", run=fail)
    assert main(["sft"]) == status
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_defects_and_asked_for_tracebacks_are_not_hidden(program) -> None:
    def fail(cfg: Config) -> None:
        raise {"runs/igpo": KeyError, "x": TrainingError}[cfg.train.output_dir]("no")

    program("igpo.sft", run=fail)
    with pytest.raises(KeyError):
        main(["sft"])
    with pytest.raises(TrainingError):
        main(["sft", "--traceback", "output_dir=x"])


def test_env_reports_versions_machine_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"igpo", "python", "torch", "numpy"} <= report["versions"].keys()
    assert report["machine"]["torch_threads"] >= 1
    assert any(line == "merge_hints reference: runs here" for line in report["backends"])


def test_python_m_igpo_is_the_command_and_ops_the_table_of_backends() -> None:
    words = [sys.executable, "-m", "igpo", "ops"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].startswith(f"igpo {igpo.__version__}, torch {torch.__version__}")
    assert any(line.split()[:2] == ["merge_hints", "reference"] for line in said)


def test_help_needs_torch_and_numpy_only() -> None:
    """A program that needs the extras then says which command brings them."""
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "rich", "yaml", "tokenizers", "safetensors", "tyro", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from igpo.cli import main
assert main(["--help"]) == 0
assert main(["train", "--help"]) == 0
assert main(["env"]) == 0
assert main(["sft", "beta=0"]) == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    (line,) = done.stderr.splitlines()
    assert line.endswith("is not installed: pip install 'igpo[train]'")


def test_commands_name_functions_that_exist() -> None:
    for name, command in COMMANDS.items():
        module, _, function = command.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_interruption_says_so(program, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(cfg: Config) -> None:
        raise KeyboardInterrupt

    program("igpo.train", run=fail)
    assert main(["train"]) == cli.INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "igpo train: interrupted"
