"""The page that compares runs: numbers are those of the files, runs under way and of other kinds are read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from igpo.cli import main
from igpo.config import ConfigError
from igpo.report import page, read, running_mean


def write_run(folder: Path, reward: float, **config: object) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": i, "reward": reward * i, "kl": None if i == 1 else 0.5, "inpaint/groups_all_wrong": 0.25}
        for i in range(20)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 20, "rew')  # a run under way
    start = {"config": {"beta": 0.1, **config}, "git_commit": "abc", "machine": {"gpus": ["H200"]}}
    (folder / "run.json").write_text(json.dumps({"starts": [{"config": {"beta": 9}}, start]}))
    return folder


def write_evaluation(folder: Path) -> Path:
    folder.mkdir(parents=True)
    numbers = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.612, "reward": 1.0}
    record = {
        "lengths": {"128": numbers},
        "protocol": {"block_length": 32, "versions": {"torch": "2"}},
    }
    (folder / "evaluation.json").write_text(json.dumps(record))
    return folder


class Checked(HTMLParser):
    """Counts tags, and remembers what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        places = [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.loaded += [place for place in places if not place.startswith("#")]


def row(text: str, label: str) -> list[str]:
    cells = re.findall(rf"<tr><td>{re.escape(label)}</td>(.*?)</tr>", text)
    return re.findall("<td>(.*?)</td>", cells[0])


def test_a_page_of_two_runs_and_an_evaluation(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", 1.0, eta=[0.2]), write_run(tmp_path / "<b>", 2.0, eta=[0.4]),
        write_evaluation(tmp_path / "c"),
    ]  # fmt: skip
    out = tmp_path / "deep" / "page.html"
    assert main(["report", *map(str, folders), f"out={out}"]) == 0
    text = out.read_text()
    checked = Checked()
    checked.feed(text)
    assert checked.tags.count("svg") == 1
    assert "script" not in checked.tags
    assert checked.loaded == []
    assert "<b>" not in text
    assert row(text, "eta")[:2] == ["[0.2]", "[0.4]"]
    assert row(text, "steps") == ["20", "20", ""]
    assert row(text, "reward (reward)") == ["18.5", "37", ""]
    assert row(text, "KL to the reference (kl)")[0] == "0.5"
    assert row(text, "accuracy, 128 tokens") == ["", "", "50.0 % [40.0, 61.2]"]
    assert row(text, "block_length") == ["", "", "32"]
    assert row(text, "GPUs")[:2] == ["H200", "H200"]
    assert "groups that are all wrong" in text
    assert page([read(folder) for folder in folders]) == text


def test_one_run_has_no_differences(tmp_path: Path) -> None:
    text = page([read(write_run(tmp_path / "a", 1.0))])
    assert "Settings that differ" not in text
    assert "beta" not in text


def test_a_trained_run(trained, tmp_path: Path) -> None:
    from igpo.config_io import dump

    config = tmp_path / "c.yaml"
    config.write_text(dump(trained()))
    assert main(["train", str(config), "max_steps=2", f"output_dir={tmp_path / 'x'}"]) == 0
    text = page([read(tmp_path / "x")])
    for title in ("reward", "entropy of the draws, nats", "clipped fraction", "KL to the reference",
                  "completion length, tokens", "fraction of hint tokens"):  # fmt: skip
        assert f">{title} (" in text


def test_folders_without_a_run_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"must hold metrics.jsonl or evaluation.json"):
        read(tmp_path)
    assert main(["report"]) == 2
    assert "name the folders of the runs" in capsys.readouterr().err
    assert main(["report", "--help"]) == 0
    assert "usage: igpo report RUNS ... [key=value ...]" in capsys.readouterr().out


def test_running_mean() -> None:
    assert running_mean([1.0, 2.0, 6.0], 2) == [1.0, 1.5, 4.0]
    assert running_mean([], 3) == []
