from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from igpo import config_io, logging
from igpo.config import Config, ConfigError
from igpo.logging import RunLog, duration, progress
from igpo.types import Canvas, Graded, Prompt, Rollouts


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(logging, "console", Console(file=text, width=60))
    return text


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    shown = Console(file=text, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(logging, "console", shown)
    return text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A clock that the test moves on: clock(5) is five seconds later."""
    now = [100.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: now[0])

    def later(seconds: float) -> None:
        now[0] += seconds

    return later


def config(folder: Path, *overrides: str) -> Config:
    return config_io.load([], [f"output_dir={folder}", "report_to=none", *overrides])


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_progress_is_plain_lines_where_there_is_no_terminal(plain: io.StringIO, clock) -> None:
    with progress(10, "eval") as advance:
        for i in range(10):
            clock(4)
            advance(accuracy=i / 10)
    assert plain.getvalue().splitlines() == [
        "eval 3/10, eta 28.0 s, accuracy 0.2",
        "eval 6/10, eta 16.0 s, accuracy 0.5",
        "eval 9/10, eta 4.0 s, accuracy 0.8",
        "eval 10/10, took 40.0 s, accuracy 0.9",
    ]


def test_a_failed_job_is_not_reported_as_finished(plain: io.StringIO) -> None:
    with pytest.raises(KeyError), progress(10, "eval"):
        raise KeyError
    assert plain.getvalue() == ""


def test_progress_is_a_bar_with_the_time_left_on_a_terminal(terminal: io.StringIO) -> None:
    with progress(2, "train") as advance:
        advance(reward=0.5)
        with progress(4, "eval") as inner:
            inner(4)
        advance()
    shown = terminal.getvalue()
    assert "1/2" in shown or "0/2" in shown  # the bar is drawn ten times a second
    assert "reward 0.5" in shown
    assert "eval 4/4, took" in shown
    assert "train 2/2, took" in shown
    assert logging._shown == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (11220, "3 h 07 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_folder_of_a_run_says_what_ran(tmp_path: Path) -> None:
    cfg = config(tmp_path, "beta=0.5")
    RunLog(cfg).close()
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["config"]["rl.beta"] == 0.5
    assert start["versions"]["torch"] == torch.__version__
    assert start["backends"]
    assert config_io.load([tmp_path / "config.yaml"]) == cfg


def test_metrics_are_on_disk_at_once_and_valid_json(tmp_path: Path) -> None:
    with RunLog(config(tmp_path)) as log:
        log.log(0, {"reward": 0.5, "kl": float("nan"), "ratio": float("inf")})
        assert lines(tmp_path) == [{"step": 0, "reward": 0.5, "kl": None, "ratio": None}]


def test_a_continuation_drops_what_is_run_again(tmp_path: Path) -> None:
    with RunLog(config(tmp_path)) as log:
        for step in range(4):
            log.log(step, {"reward": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')  # killed while writing
    with RunLog(config(tmp_path), first_step=2) as log:
        log.log(2, {"reward": 20.0})
    assert [line["reward"] for line in lines(tmp_path)] == [0.0, 1.0, 20.0]
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["first_step"] for start in starts] == [0, 2]


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with RunLog(config(tmp_path)) as log:
            log.log(0, {"reward": value})
    assert [line["reward"] for line in lines(tmp_path)] == [2.0]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(config(tmp_path, "report_to=tensorboard")) as log:
        log.log(3, {"reward": 0.25, "kl": float("nan")})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(3, 0.25)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_are_called_by_their_common_interface(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []
    module = types.SimpleNamespace(
        init=lambda **options: calls.append(
            ("init", options["name"], options["config"]["rl.beta"])
        ),
        log=lambda values, step: calls.append(("log", values, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    with RunLog(config(tmp_path / "mine", f"report_to={name}")) as log:
        log.log(7, {"reward": 1.0})
    assert calls == [("init", "mine", 0.01), ("log", {"reward": 1.0}, 7), ("finish",)]


def test_a_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="report_to: wandb is not installed: pip install wandb"):
        RunLog(config(tmp_path, "report_to=wandb"))


def test_the_completions_table_shows_text_as_it_is() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    canvas = Canvas(
        tokens,
        tokens.bool(),
        tokens,
        tokens[:, :2].bool(),
        tokens[:, 0],
        torch.tensor([0, 1]),
        1,
        9,
    )
    values = tokens[:, :2].float()
    rollouts = Rollouts(canvas, tokens, tokens[:, :2], values, values, tokens[:, 0], 2)
    graded = Graded(
        rollouts, torch.tensor([1.0, 0.0]), torch.tensor([True, False]), torch.tensor([False, True]),
        ("[b]5[/b]", "six"), {"correctness": torch.tensor([1.0, float("nan")])},
    )  # fmt: skip
    prompts = [Prompt("[2+3]", (1,), 0), Prompt("1+5", (1,), 1)]
    text = io.StringIO()
    table = logging.completions_table(graded, prompts, torch.tensor([0.5, -0.5]))
    Console(file=text, width=120).print(table)
    first, second = [line for line in text.getvalue().splitlines() if "5" in line and "+" in line]
    assert "[2+3]" in first
    assert "[b]5[/b]" in first
    assert "0.5" in first
    assert "nan" in second
    assert "yes" in second
