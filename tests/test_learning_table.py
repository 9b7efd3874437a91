"""The study behind docs/learning_table.md: its tasks, what it counts, what it runs again, what it calls a tie."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from igpo.demo.study import mean
from igpo.models import MaskedDecoder
from igpo.rl.algorithms import ALGORITHMS, build_algorithm
from igpo.types import Seed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def bench() -> Iterator:
    """bench("learning.study") -> that module of benchmarks/."""
    folder = str(ROOT / "benchmarks")
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if folder in (getattr(sys.modules[name], "__file__", "") or ""):
            del sys.modules[name]


@pytest.fixture
def small(bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A study of one RL step from a start of two updates, on the chains."""
    shapes = bench("learning.recipe").SHAPES
    monkeypatch.setitem(shapes, "chain", replace(shapes["chain"], warm_steps=2, warm_blocks=2))
    return bench("learning.study").Study(tmp_path / "starts", ("chain",), num_steps=1, num_eval=8)


@pytest.mark.parametrize("name", ["chain", "countdown", "sudoku"])
def test_tasks_have_right_traces_whole_blocks_and_disjoint_splits(bench, name: str) -> None:
    task, shape = bench("learning.tasks").TASKS[name], bench("learning.recipe").SHAPES[name]
    train, held_out = (task.problems(60, Seed(1), split) for split in ("train", "held-out"))
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert len({p.text for p in held_out}) == 60
    assert held_out == task.problems(60, Seed(1), "held-out")
    tokenizer = task.tokenizer()
    for prompt in held_out[:20]:
        assert len(prompt.ids) % shape.block_length == 0
        assert len(prompt.trace_ids) == shape.completion_length
        written = [i for i in prompt.trace_ids if i != tokenizer.eos_token_id]
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert task.is_correct(prompt, text)
        assert not task.is_correct(prompt, text[:-1])


def test_no_held_out_grid_is_a_training_grid_and_every_puzzle_has_one_solution(bench) -> None:
    solutions = importlib.import_module("igpo.rewards.sudoku").solutions
    task = bench("learning.tasks").TASKS["sudoku"]
    train, held_out = (task.problems(60, Seed(1), split) for split in ("train", "held-out"))
    assert not {p.answer for p in train} & {p.answer for p in held_out}
    for prompt in held_out:
        assert solutions(prompt.columns["puzzle"]) == [prompt.answer]


def test_countdown_splits_do_not_share_numbers_and_target_in_any_order(bench) -> None:
    task = bench("learning.tasks").TASKS["countdown"]
    keys = [
        {
            (*sorted(p.columns["numbers"]), p.columns["target"])
            for p in task.problems(200, Seed(1), s)
        }
        for s in ("train", "held-out")
    ]
    assert not keys[0] & keys[1]


def test_a_pool_gives_its_own_problems_again(bench) -> None:
    tasks = bench("learning.tasks")
    pool = tasks.Pool(tasks.TASKS["countdown"], 12)
    found = pool.problems(8, Seed(3), "train")
    assert {p.text for p in found} <= {p.text for p in pool.drawn}
    assert [p.row_id for p in found] == list(range(8))
    assert found == pool.problems(8, Seed(3), "train")


def test_every_row_is_a_preset_under_the_shared_settings(bench) -> None:
    recipe = bench("learning.recipe")
    rows = recipe.entries()
    assert list(ALGORITHMS) == list(rows)[: len(ALGORITHMS)]
    for task in recipe.SHAPES:
        for name, entry in rows.items():
            cfg = recipe.config(task, entry, 3)
            build_algorithm(cfg.rl, cfg.rollout, lambda r, p: r, pad_id=0)  # type: ignore[arg-type, return-value]
            assert cfg.rl.algorithm == (name if name in ALGORITHMS else entry.algorithm)
            assert (cfg.rl.num_generations, cfg.rl.num_iterations) == (8, recipe.UPDATES)
            shared = recipe.config(task, rows["grpo"], 3)
            assert replace(cfg, rl=shared.rl, rollout=shared.rollout) == shared
            assert cfg.rollout == replace(shared.rollout, **entry.rollout)


def test_a_run_counts_its_forwards(small, bench) -> None:
    recipe, study = bench("learning.recipe"), bench("learning.study")
    rows = recipe.entries()
    size, steps, updates = 64, 8, recipe.UPDATES
    line = study.run_one(small, "chain", "grpo", rows["grpo"], 0)
    # a mask of the prompt per update: the policy before, and the reference
    expected = {"rollouts": size * steps, "exploration": 0, "training": size * updates}
    assert line["forwards"] == expected | {"scoring": 2 * size * updates}
    assert line["completions"] == size
    assert 0 <= line["after"] <= 1
    assert json.loads(json.dumps(line)) == line
    vine = study.run_one(small, "chain", "vineppo", rows["vineppo"], 0)
    # two completions of the second block's four steps for every row
    assert vine["forwards"]["exploration"] == 2 * size * 4
    assert vine["forwards"]["rollouts"] == line["forwards"]["rollouts"]
    assert vine["reward"] == line["reward"]  # the same first rollouts
    blocks = study.run_one(small, "chain", "dipo", rows["dipo"], 0)
    assert blocks["start"] != line["start"]


def test_a_study_goes_on_where_it_stopped_and_notices_another_recipe(
    small, bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, study = bench("learning.recipe"), bench("learning.study")
    made: list[tuple[str, int]] = []

    def recorded(found, task: str, name: str, entry, seed: int) -> dict:
        made.append((name, seed))
        return {
            "task": task, "row": name, "seed": seed, "recipe": found.recipe(task, entry), "after": 0.5,
        }  # fmt: skip

    monkeypatch.setattr(study, "run_one", recorded)
    path = tmp_path / "lines.jsonl"
    study.run(small, ["grpo", "igpo"], range(2), path)
    assert made == [("grpo", 0), ("igpo", 0), ("grpo", 1), ("igpo", 1)]  # seed by seed
    made.clear()
    study.run(small, ["grpo", "igpo"], range(2), path)
    assert made == []
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    study.run(small, ["grpo", "igpo"], range(2), path)
    assert made == [("igpo", 1)]
    made.clear()
    monkeypatch.setattr(recipe, "LEARNING_RATE", 1e-3)
    assert not any(study.is_current(small, x) for x in study.read(path))
    study.run(small, ["grpo"], range(1), path)
    assert made == [("grpo", 0)]
    assert len(study.read(path)) == 4  # the new line stands for the old one
    assert [study.is_current(small, x) for x in study.read(path)] == [True, False, False, False]


def test_another_start_is_another_recipe(small, bench) -> None:
    rows = bench("learning.recipe").entries()
    before = small.recipe("chain", rows["grpo"])
    model: MaskedDecoder = small.places["chain", False].model
    with torch.no_grad():
        model.norm.weight[0] += 1
    small.places["chain", False].__dict__.pop("fingerprint", None)
    assert small.recipe("chain", rows["grpo"]) != before


def lines_of(task: str, row: str, *after: float | None, start: str = "s") -> list[dict]:
    counts = dict.fromkeys(("rollouts", "exploration", "scoring", "training"), 1000)
    return [
        {
            "task": task, "row": row, "seed": seed, "start": start, "before": 0.25, "after": x, "reward": 0.1,
            "reward_last": 0.2, "completions": 64, "forwards": counts, "seconds": 1.0,
            "stopped": None if x is not None else "the loss is nan",
        }
        for seed, x in enumerate(after)
    ]  # fmt: skip


def test_ties_are_differences_within_students_interval_of_the_pairs(bench) -> None:
    report = bench("learning.report")
    grpo = lines_of("chain", "grpo", 0.30, 0.40, 0.20)
    shifted = lines_of("chain", "igpo", 0.40, 0.52, 0.31)  # +0.10, +0.12, +0.11: sd 0.01
    found = report.paired(shifted, grpo)
    assert found.value == pytest.approx(0.11)
    assert found.half_width == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert report.verdict(found) == "+"
    assert report.verdict(report.paired(grpo, shifted)) == "-"
    noisy = lines_of("chain", "wd1", 0.60, 0.41, 0.21)  # +0.30, +0.01, +0.01: mean 0.107, sd 0.167
    assert report.verdict(report.paired(noisy, grpo)) == "tie"
    assert report.verdict(mean([0.0, 0.0, 0.0])) == "tie"
    stopped = lines_of("chain", "spg", 0.6, None, None)
    assert report.paired(stopped, grpo) is None


def test_rows_are_compared_from_the_same_start_only(bench) -> None:
    report = bench("learning.report")
    lines = [
        *lines_of("chain", "grpo", 0.30, 0.40, 0.20),
        *lines_of("chain", "igpo", 0.40, 0.52, 0.31),
        *lines_of("chain", "dipo", 0.10, 0.12, None, start="b"),
        *lines_of("chain", report.OF_BLOCKS, 0.10, 0.13, 0.1, start="b"),
    ]
    summary = report.summarise(lines, ["grpo", "igpo", "spg", "dipo", report.OF_BLOCKS])
    assert summary["missing"] == {"chain": ["spg"]}
    rows = summary["tasks"]["chain"]
    assert rows["igpo"]["against"].keys() == {"grpo"}
    assert rows["dipo"]["against"].keys() == {report.OF_BLOCKS}
    assert rows["dipo"]["stopped"] == {"2": "the loss is nan"}
    assert report.groups(rows, "grpo") == {"+": ["igpo"], "tie": [], "-": []}
    text = report.table(rows)
    assert (
        "| `igpo` | 0.410 ± 0.262 | **+0.110 ± 0.025** | – | 1.0 | 1.0 | 1.0 | 1.0 | 4.0 |" in text
    )
    assert "(1 of 3 stopped)" in text
    assert "tie (-0.005 ± 0.064 †)" in text


def test_the_figure_is_drawn(bench, tmp_path: Path) -> None:
    report = bench("learning.report")
    lines = [*lines_of("chain", "grpo", 0.3, 0.4), *lines_of("sudoku", "grpo", 0.3)]
    report.plot(report.summarise(lines, ["grpo"])["tasks"], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def committed() -> tuple[dict, Path]:
    path = sorted(RESULTS.glob("*-learning_table.json"))[-1]
    return json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".jsonl")


def test_the_committed_summary_is_that_of_the_committed_runs(bench) -> None:
    summary, runs = committed()
    lines = bench("learning.study").read(runs)
    found = bench("learning.report").summarise(lines, list(bench("learning.recipe").entries()))
    assert json.loads(json.dumps(found["tasks"])) == summary["tasks"]
    assert {x["commit"] for x in lines} == set(summary["commits"])
    assert not any("+changes" in commit for commit in summary["commits"])
    for rows in summary["tasks"].values():
        assert all(len(x["seeds"]) + len(x["stopped"]) >= 3 for x in rows.values())


def test_the_page_has_the_tables_and_names_what_they_lack(bench) -> None:
    report, (summary, _) = bench("learning.report"), committed()
    page = (ROOT / "docs" / "learning_table.md").read_text(encoding="utf-8")
    assert report.overview(summary["tasks"]) in page
    for task, rows in summary["tasks"].items():
        assert f"## {report.SHOWN[task]}\n" in page
        assert report.table(rows) in page
        _, _, lacking = page.partition("## Not in the tables")
        for name in ALGORITHMS:
            assert name in rows or f"`{name}`" in lacking, f"{name}: run it, or name it there"
    assert set(summary["tasks"]) == set(report.SHOWN)
