"""Evaluation: numbers that follow from verdicts, independence of the batch size, and the program's files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo import evaluate as program
from igpo.cli import main
from igpo.config import Config, ConfigError
from igpo.config_io import assign, dump
from igpo.data import load_prompts
from igpo.evaluate import evaluate
from igpo.options import EvalOptions
from igpo.policy import build_policy, load_tokenizer
from igpo.rewards import make_grader
from igpo.scores import Completion, bootstrap, pass_at_k, summary, wilson
from igpo.types import Seed


def line(row: int, correct: bool) -> Completion:
    return Completion(row, 0, "q", "a", "1", correct, float(correct), 7, 4)


@given(st.integers(1, 6), st.data())
def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_one(
    n: int, data: st.DataObject
) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_wilson_interval_is_that_of_the_books() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.16113), abs=1e-5)
    assert wilson(1.0, 20)[1] == 1.0


def test_summary_counts_problems_not_completions() -> None:
    verdicts = {0: [True, True, True, True], 1: [True, False, False, False], 2: [False] * 4}
    found = summary([line(row, v) for row, vs in verdicts.items() for v in vs])
    assert found["accuracy"] == pytest.approx(5 / 12)
    assert found["pass@2"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["pass@4"] == pytest.approx(2 / 3)
    assert found["num_problems"] == 3
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    one = summary([line(row, row < 3) for row in range(10)])
    assert (one["accuracy_low"], one["accuracy_high"]) == wilson(0.3, 10)
    assert "pass@2" not in one


def test_bootstrap_intervals_are_those_of_the_mean() -> None:
    values = [0.0, 1.0, 0.25, 0.5] * 50
    low, high = bootstrap(values, Seed(1))
    mean, half = 0.4375, 1.96 * (sum((v - 0.4375) ** 2 for v in values) / len(values) ** 2) ** 0.5
    assert low == pytest.approx(mean - half, abs=0.01)
    assert high == pytest.approx(mean + half, abs=0.01)
    assert bootstrap(values, Seed(1)) == (low, high)
    assert bootstrap([0.5] * 3, Seed(1)) == (0.5, 0.5)


def test_several_completions_have_avg_and_pass_with_intervals() -> None:
    found = summary([line(row, sample <= row % 3) for row in range(30) for sample in range(4)])
    assert found["avg@4"] == found["accuracy"] == found["pass@1"]
    assert found["avg@4_low"] < found["avg@4"] < found["avg@4_high"]
    assert found["pass@1"] < found["pass@2"] < found["pass@4"] == 1.0
    assert found["pass@4_low"] == 1.0


def options(cfg: Config, **changes: object) -> Config:
    return assign(cfg, list(changes.items()), "test")


def test_the_result_does_not_depend_on_the_batch_size(tiny: Callable[..., Config]) -> None:
    cfg = options(tiny(), eval_temperature=1.0, num_eval_generations=3)
    tokenizer = load_tokenizer(cfg.model)
    policy, grade = build_policy(cfg, tokenizer), make_grader(tokenizer, cfg.reward)
    prompts = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    found = []
    for size in (1, 5, 64):
        batched = options(cfg, eval_batch_size=size)
        chunks = program.complete(policy, tokenizer, prompts, grade, batched)
        found.append([text for graded in chunks for text in graded.completions])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3 * len(prompts)
    other = program.complete(
        policy, tokenizer, prompts, grade, replace(cfg, train=replace(cfg.train, seed=9))
    )
    assert [text for graded in other for text in graded.completions] != found[0]


def test_evaluate_agrees_with_a_verifier_that_knows(tiny: Callable[..., Config]) -> None:
    cfg = options(tiny(), num_eval_generations=2)
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    grade = make_grader(tokenizer, cfg.reward, verifier=lambda _, prompt: prompt.row_id == 0)
    metrics = evaluate(build_policy(cfg, tokenizer), tokenizer, prompts, grade, cfg)
    assert metrics["accuracy"] == pytest.approx(1 / len(prompts))
    assert metrics["reward"] == pytest.approx(1 / len(prompts))
    assert metrics["forwards"] > 0
    assert 0 <= metrics["completion_length"] <= cfg.rollout.max_completion_length


def test_the_program_writes_numbers_protocol_and_every_completion(
    trained: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cfg = trained(f"output_dir={tmp_path / 'out'}")
    cfg = options(
        cfg,
        eval_file=cfg.data.train_file,
        num_eval_generations=2,
        eval_temperature=1.0,
        eval_limit=2,
    )
    config, predictions = tmp_path / "eval.yaml", tmp_path / "deep" / "predictions.jsonl"
    config.write_text(dump(cfg), encoding="utf-8")
    assert main(["eval", str(config), f"predictions_file={predictions}"]) == 0
    lines = [json.loads(text) for text in predictions.read_text().splitlines()]
    assert [(x["row"], x["sample"]) for x in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["metrics"]["accuracy"] == sum(x["correct"] for x in lines) / 4
    assert record["protocol"]["temperature"] == 1.0
    assert record["protocol"]["num_eval_generations"] == 2
    assert "accuracy" in capsys.readouterr().out


def test_lengths_are_evaluated_side_by_side(
    trained: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = trained().data.train_file
    config = tmp_path / "eval.yaml"
    config.write_text(dump(trained(f"output_dir={tmp_path / 'out'}")), encoding="utf-8")
    words = ["eval", str(config), f"eval_file={file}", "eval_limit=3", "reward.task=gsm8k"]
    assert main([*words, "eval_lengths=4,8"]) == 0
    out = tmp_path / "out"
    record = json.loads((out / "evaluation.json").read_text())
    assert list(record["lengths"]) == ["4", "8"]
    assert record["metrics"] == record["lengths"]["8"]
    facts = record["protocol"]
    assert (facts["max_completion_length"], facts["diffusion_steps"]) == ([4, 8], [2, 4])
    assert (facts["task"], facts["first_prompt"], facts["num_problems"]) == ("gsm8k", "0 + 3 =", 3)
    assert facts["versions"]["torch"]
    lines = [json.loads(text) for text in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(x["max_completion_length"], x["row"]) for x in lines] == [
        (n, r) for n in (4, 8) for r in range(3)
    ]
    assert record["lengths"]["4"]["verify/failures"] == 0
    assert "4 tokens" in capsys.readouterr().out
    assert main([*words, "eval_lengths=6"]) == 2
    assert (
        "eval_lengths must be multiples of block_length=4 that keep 8/4 tokens"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_eval_generations": 2},
            "num_eval_generations must be 1 at eval_temperature 0, .* got 2",
        ),
        ({"num_eval_generations": 0}, "num_eval_generations must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"eval_temperature": -1.0}, "eval_temperature must not be negative, got -1.0"),
        ({}, "model_name_or_path must name the folder of a model for eval, got none"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    tiny: Callable[..., Config], changes: dict[str, object], message: str
) -> None:
    cfg = options(tiny(), eval_file=tiny().data.train_file, **changes)
    with pytest.raises(ConfigError, match=message):
        program.run(cfg, EvalOptions())
