"""The demo's mechanics at sizes that take seconds. That an arm wins is for docs/learning.md, not for a test."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text

from igpo.demo import program, study, warm_start
from igpo.demo.arm import Held, Lift, hint_lift, measure, run_arm
from igpo.demo.plots import COLOURS, LABELS
from igpo.demo.program import Screen, denoised, describe
from igpo.demo.recipe import ARMS, CHAIN, STUDY_ARMS, arm_config
from igpo.demo.results import ArmResult, Frame, Point
from igpo.demo.task import Problems
from igpo.models import MaskedDecoder
from igpo.options import DemoOptions
from igpo.types import Seed

STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the demo runs; before the other fixtures."""
    before = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start() -> MaskedDecoder:
    return warm_start.shipped()


@pytest.fixture(scope="module")
def results(
    one_thread: None, start: MaskedDecoder, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ArmResult]:
    out, held = tmp_path_factory.mktemp("arms"), Held(0.25, 0.75)
    return {arm: run_arm(arm, small(arm), start, held, out, num_problems=16) for arm in STUDY_ARMS}


def small(arm: str, seed: int = 3):
    cfg = arm_config(arm, seed, STEPS)
    return replace(cfg, train=replace(cfg.train, prompts_per_step=2, eval_steps=1))


def test_the_shipped_model_knows_transitions_of_held_out_chains(start: MaskedDecoder) -> None:
    accuracy, probability = warm_start.next_state(start, CHAIN.problems(64, Seed(9), "held-out"))
    assert accuracy > 0.6  # by chance 0.01
    assert 0.5 < probability < 0.9
    size = (Path(warm_start.__file__).parent / warm_start.SHIPPED).stat().st_size
    assert size <= 500_000
    assert 100_000 <= sum(p.numel() for p in start.parameters()) <= 200_000


def test_training_from_scratch_lowers_the_loss_and_is_reproducible() -> None:
    first, again = (warm_start.train(3) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    longer = warm_start.train(60)
    problems = CHAIN.problems(64, Seed(9), "held-out")
    assert warm_start.next_state(longer, problems)[1] > warm_start.next_state(first, problems)[1]


def test_arms_differ_by_their_algorithm_alone() -> None:
    for arm in STUDY_ARMS:
        cfg = arm_config(arm, 3)
        assert replace(cfg, rl=replace(cfg.rl, algorithm="grpo")) == arm_config("grpo", 3)
    assert len({arm_config(arm, 3).rl.algorithm for arm in STUDY_ARMS}) == len(STUDY_ARMS)
    assert STUDY_ARMS.keys() <= LABELS.keys()
    assert STUDY_ARMS.keys() <= COLOURS.keys()


def test_arms_start_from_the_same_rollouts_and_count_what_they_spend(
    results: dict[str, ArmResult],
) -> None:
    firsts = {(r.points[1].reward, r.points[1].all_wrong) for r in results.values()}
    assert len(firsts) == 1  # the same weights, problems and random streams
    for name, arm in results.items():
        rollouts, forwards = [p.rollouts for p in arm.points], [p.forwards for p in arm.points]
        assert rollouts[0] == forwards[0] == 0
        assert [p.step for p in arm.points] == [0, 1, 2]
        assert arm.points[0].accuracy == arm.before == 0.25
        assert all(p.accuracy is not None for p in arm.points)
        if name in ("igpo", "grpo_resample"):
            second = sum(p.all_wrong for p in arm.points[1:]) * 2 * 8
            assert arm.rollouts == STEPS * 16 + second
            assert arm.hint_success is not None
        else:
            assert arm.hint_success is None
            assert arm.rollouts == STEPS * 16
            assert arm.forwards == STEPS * 16 * 12
        assert all(p.unrescued <= p.all_wrong for p in arm.points)
    assert results["igpo"].rollouts == pytest.approx(results["grpo_resample"].rollouts, abs=32)
    assert results["igpo"].forwards < results["grpo_resample"].forwards  # hints need no denoising
    assert results["grpo"].unrescued == results["grpo"].all_wrong
    assert results["trace_in_group"].unrescued == 0
    assert results["trace_in_group"].frames[0].step_map[0] >= 0
    assert set(results["trace_as_hints"].frames[0].step_map) == {-1}


def test_an_arm_is_reproducible(
    results: dict[str, ArmResult], start: MaskedDecoder, tmp_path: Path
) -> None:
    again = run_arm("igpo", small("igpo"), start, Held(0.25, 0.75), tmp_path, num_problems=16)
    first = results["igpo"]
    assert [replace(p, seconds=0) for p in again.points] == [
        replace(p, seconds=0) for p in first.points
    ]
    assert again.frames == first.frames
    other = run_arm(
        "igpo", small("igpo", seed=4), start, Held(0.25, 0.75), tmp_path / "b", num_problems=16
    )
    assert other.frames != first.frames


def test_problems_are_fresh_and_the_same_for_every_arm() -> None:
    order = Problems(CHAIN, 16, Seed(3))
    seen = [p.text for step in range(4) for p in order.at(step)]
    assert len(set(seen)) == 64
    assert seen[16:32] == [p.text for p in Problems(CHAIN, 16, Seed(3)).at(1)]


def test_hints_raise_the_chance_of_a_right_answer_and_hold_none(start: MaskedDecoder) -> None:
    lift = hint_lift(start, arm_config("igpo", 3), num_problems=32)
    assert 0 < lift.plain < lift.hinted < 1
    for prompt in CHAIN.problems(20, Seed(3), "held-out"):
        words = [CHAIN.words[i] for i in prompt.trace_ids]
        assert (
            prompt.hint_length == CHAIN.num_steps - 1
        )  # neither the last state nor its copy, the answer
        assert words[CHAIN.num_steps] == words[CHAIN.num_steps - 1] == prompt.answer


@pytest.mark.parametrize(
    ("lift", "words"),
    [
        (Lift(0.10, 0.11), "about 1. Hints do not help here"),
        (Lift(0.10, 0.05), "0.50 times, about 1"),
        (Lift(0.04, 0.16), "16.0% with hints: 4.0 times."),
        (Lift(0.0, 0.1), "0.0% without hints, 10.0% with hints."),
    ],
)
def test_the_lift_is_said_as_it_is(lift: Lift, words: str) -> None:
    assert words in describe(lift)


def test_measure_is_about_held_out_problems(start: MaskedDecoder) -> None:
    first, again = (measure(start, arm_config("igpo", seed), 32) for seed in (1, 1))
    assert first == again
    assert 0 < first.accuracy < 1
    assert 0 < first.all_wrong < 1


class Parsed(HTMLParser):
    """Tags and attributes of a page; fails on a tag that is closed and was not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.players = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [found[key] or "" for key in ("src", "href") if key in found]
        self.players += found.get("class") == "player"


def test_the_program_writes_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def tiny(arm: str, seed: int, num_steps: int = STEPS):
        return replace(small(arm, seed), train=replace(small(arm, seed).train, max_steps=num_steps))

    monkeypatch.setattr(program, "arm_config", tiny)
    program.run(DemoOptions(out=str(tmp_path), seed=5), num_steps=STEPS, num_problems=8)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["arms"]) == list(ARMS)
    assert summary["seed"] == 5
    for arm in summary["arms"].values():
        assert {
            "before",
            "after",
            "all_wrong",
            "unrescued",
            "rollouts",
            "forwards",
            "seconds",
            "hint_lift",
            "hint_success",
        } <= arm.keys()
        assert len(arm["points"]) == STEPS + 1
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert parsed.players >= len(ARMS)
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not re.search(r"https?://", page)
    shown = capsys.readouterr()
    assert "hint lift: P(correct)" in shown.err
    assert "no evidence about models of 8 billion" in shown.err
    assert "second attempts right" in shown.out  # whole, at 80 columns
    assert max(map(len, shown.out.splitlines())) <= 80


def test_a_terminal_sees_hints_new_tokens_and_masks_apart() -> None:
    frame = Frame("p", ("1", "2", "3", "</s>"), (-1, 0, 2, 1), correct=True, title="")
    assert denoised(frame, 0).plain == "p  1 2 \u00b7 \u00b7 "
    assert denoised(frame, 2).plain == "p  1 2 3 </s> right"
    styles = {frame_text(denoised(frame, 1))[word] for word in ("1", "</s>")}
    assert styles == {"bold #E69F00", "bold green"}
    screen = Screen()
    screen.begin("igpo")
    screen.frame = frame
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(screen.view())
    text = console.export_text()
    assert "IGPO: starting" in text
    assert "p  1" in text


def frame_text(text: Text) -> dict[str, str]:
    return {text.plain[s.start : s.end].strip(): str(s.style) for s in text.spans}


def test_a_study_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: dict[str, ArmResult]
) -> None:
    ran: list[tuple[str, int]] = []

    def recorded(arm: str, cfg, *_: object, **__: object) -> ArmResult:
        ran.append((arm, cfg.train.seed))
        shift = 0.01 * cfg.train.seed
        return replace(results[arm], name=arm, after=results[arm].after + shift)

    monkeypatch.setattr(study, "run_arm", recorded)
    monkeypatch.setattr(study, "measure", lambda *_: Held(0.2, 0.8))
    monkeypatch.setattr(study, "hint_lift", lambda *_: Lift(0.1, 0.3))
    study.run(2, tmp_path)
    assert len(ran) == 2 * len(STUDY_ARMS)
    lines = (tmp_path / "learning.jsonl").read_text().splitlines()
    (tmp_path / "learning.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    ran.clear()
    summary = study.run(2, tmp_path)
    assert ran == [(arm, 1) for arm in list(STUDY_ARMS)[-3:]]
    found = summary["arms"]["igpo"]["after"]
    assert found["value"] == pytest.approx(results["igpo"].after + 0.005)
    assert found["half_width"] == pytest.approx(12.706 * 0.01 / 2)
    assert [p["step"] for p in summary["arms"]["grpo"]["curve"]] == [0, 1, 2]
    course = summary["arms"]["grpo"]["curve"]
    assert "all_wrong" not in course[0]
    assert [p["all_wrong"]["value"] for p in course[1:]] == [
        p.all_wrong for p in results["grpo"].points[1:]
    ]
    assert study.table(summary).count("\n") == 1 + len(STUDY_ARMS)
    assert json.loads((tmp_path / "learning.json").read_text())["seeds"] == 2


def test_means_have_students_intervals() -> None:
    found = study.mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3
    assert found.half_width == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)


def test_fractions_are_means_over_the_steps_and_not_over_the_start() -> None:
    point = Point(0, 0, 0, 0.0, 0.5, 0.25, 0.25)
    steps = [replace(point, step=1), replace(point, step=2, all_wrong=0.75, unrescued=0.5)]
    arm = ArmResult("igpo", 0.1, 0.2, 0.9, 0.8, None, None, (point, *steps))
    assert (arm.all_wrong, arm.unrescued) == (0.5, 0.375)
