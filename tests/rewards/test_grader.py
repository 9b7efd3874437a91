"""The grader: decoding, verdicts, reward functions in TRL's form, weights, and what it refuses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from igpo.canvas import masked_canvases
from igpo.config import RewardConfig
from igpo.rewards import REWARDS, Grade, RewardError, make_grader
from igpo.tokenizer import train_tokenizer
from igpo.types import Prompt, Rollouts

TOKENIZER = train_tokenizer(["#### 0123456789 a b c"], 300)
EOS, MASK, PAD = TOKENIZER.eos_token_id, TOKENIZER.mask_token_id, TOKENIZER.pad_token_id
LENGTH = 24
PROMPTS = [
    Prompt("1+1?", (5,), 0, answer="2", columns={"level": 1}),
    Prompt("2+2?", (5,), 1, answer="4", columns={"level": 2, "topic": "sums"}),
]


def rollouts(*texts: str, prompts: Sequence[Prompt] = PROMPTS) -> Rollouts:
    """One finished completion per text, the same number for each prompt."""
    generations = len(texts) // len(prompts)
    canvas = masked_canvases(
        prompts, num_generations=generations, completion_length=LENGTH, mask_id=MASK, pad_id=PAD, eos_id=EOS
    )  # fmt: skip
    tokens, zeros = canvas.tokens.clone(), torch.zeros(canvas.frozen.shape)
    for row, text in enumerate(texts):
        ids = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS]
        tokens[row, canvas.prompt_length :] = EOS
        tokens[row, canvas.prompt_length :][: len(ids)] = torch.tensor(ids)
    return Rollouts(canvas, tokens, zeros.long(), zeros, zeros, zeros[:, 0].long(), 0)


def grader(*names: str, weights: tuple[float, ...] = (), **options: Any) -> Grade:
    return make_grader(TOKENIZER, RewardConfig(names, weights), **options)


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """REWARDS, to add functions to."""
    monkeypatch.setattr("igpo.rewards.functions.REWARDS", REWARDS.copy())
    from igpo.rewards import functions

    return functions.REWARDS


def test_grades_completions_up_to_the_first_eos() -> None:
    found = rollouts("a\n#### 2", "#### 3", "4", "b")
    row = found.tokens[2, found.canvas.prompt_length :]
    row[5] = TOKENIZER("9")["input_ids"][0]  # after EOS: no part of the completion
    graded = grader("correctness")(found, PROMPTS)
    assert graded.completions == ("a\n#### 2", "#### 3", "4", "b")
    assert graded.correct.tolist() == [True, False, True, False]
    assert graded.rewards.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert graded.rewards.dtype == torch.float32
    assert graded.rescued.tolist() == [False] * 4
    assert graded.parts["correctness"].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_grades_completions_up_to_the_end_of_the_turn() -> None:
    found = rollouts("4a", "a4", "b", "b")
    (stop,) = TOKENIZER("a")["input_ids"]
    found = replace(found, canvas=replace(found.canvas, stop_token_ids=frozenset({stop})))
    assert grader("correctness")(found, PROMPTS).completions == ("4", "", "b", "b")


def test_format_is_about_form_only() -> None:
    texts = ["a\n#### 7", "#### 7 ", "#### 7\nb", "7", "#### 1\n#### 7", "#### a"]
    graded = grader("format")(rollouts(*texts), PROMPTS)
    assert graded.rewards.tolist() == [1, 1, 0, 0, 0, 0]
    assert not graded.correct.any()


def test_functions_get_texts_and_columns(functions: dict[str, Any]) -> None:
    seen: dict[str, Any] = {}

    def spy(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.25] * len(prompts)

    functions["spy"] = spy
    graded = grader("spy", "correctness", weights=(2.0, -1.0))(rollouts("2", "3"), PROMPTS)
    assert seen == {
        "prompts": ["1+1?", "2+2?"],
        "completions": ["2", "3"],
        "level": [1, 2],
        "topic": [None, "sums"],
    }
    assert graded.rewards.tolist() == [-0.5, 0.5]
    assert list(graded.parts) == ["spy", "correctness"]


def test_none_leaves_a_function_out_of_the_sum(functions: dict[str, Any]) -> None:
    functions["some"] = lambda completions, **_: [5.0, None]
    graded = grader("some", "correctness")(rollouts("2", "4"), PROMPTS)
    assert graded.rewards.tolist() == [6.0, 1.0]
    assert graded.parts["some"][0] == 5
    assert math.isnan(graded.parts["some"][1])


def test_async_functions_run_together_even_inside_an_event_loop(functions: dict[str, Any]) -> None:
    met = []

    def half(name: str) -> Any:
        async def reward(completions: list[str], **_: Any) -> list[float]:
            met.append(name)
            for _ in range(1000):  # each waits for the other: in sequence this would not end
                if len(met) == 2:
                    return [0.5] * len(completions)
                await asyncio.sleep(0.001)
            return [math.nan]

        return reward

    functions |= {"left": half("left"), "right": half("right")}
    grade = grader("left", "right")

    async def notebook() -> list[float]:
        return grade(rollouts("2", "4"), PROMPTS).rewards.tolist()

    assert asyncio.run(notebook()) == [1.0, 1.0]


def test_a_function_by_its_path() -> None:
    graded = grader("igpo.rewards.functions:answer_format")(rollouts("#### 1", "1"), PROMPTS)
    assert graded.rewards.tolist() == [1.0, 0.0]


def test_a_task_is_judged_in_worker_processes(functions: dict[str, Any]) -> None:
    prompts = [
        Prompt("q", (5,), 0, columns={"numbers": [2, 3], "target": 6}),
        Prompt("q", (5,), 1, columns={"numbers": [2, 4], "target": 6}),
    ]
    found = rollouts("<answer>2*3</answer>", "<answer>2*4</answer>", prompts=prompts)
    cfg = RewardConfig(("score", "correctness"), (2.0, 1.0), task="countdown")
    graded = make_grader(TOKENIZER, cfg)(found, prompts)
    assert graded.correct.tolist() == [True, False]
    assert graded.rewards.tolist() == [3.0, 0.0]
    assert graded.metrics == {
        "verify/completions": 2.0, "verify/timeouts": 0.0, "verify/failures": 0.0
    }  # fmt: skip
    for columns, message in (
        ({"numbers": [2, 4]}, r"dataset row 1: .*'countdown' needs column 'target', got numbers"),
        ({"numbers": "2,4", "target": 6}, r"dataset row 1: .* must be \{\"numbers\""),
    ):
        bad = [prompts[0], Prompt("q", (5,), 1, columns=columns)]
        with pytest.raises(RewardError, match=message):
            make_grader(TOKENIZER, cfg)(found, bad)


def test_an_answer_task_reads_the_answer_of_the_prompt() -> None:
    cfg = RewardConfig(task="gsm8k", compat="d1")
    graded = make_grader(TOKENIZER, cfg)(rollouts(r"\boxed{2}", "4"), PROMPTS)
    assert graded.correct.tolist() == [True, False]  # the default would accept the last number


def test_functions_that_name_them_get_the_tokens(functions: dict[str, Any]) -> None:
    functions["length"] = lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids]
    assert grader("length")(rollouts("2", "44"), PROMPTS).rewards.tolist() == [1.0, 2.0]


def test_a_verifier_replaces_the_comparison_of_answers() -> None:
    prompts = [Prompt("say a", (5,), 0), Prompt("say b", (5,), 1)]
    texts = ("a", "a")
    judge = grader("correctness", verifier=lambda text, prompt: prompt.text.endswith(text))
    graded = judge(rollouts(*texts, prompts=prompts), prompts)
    assert graded.correct.tolist() == [True, False]
    assert graded.rewards.tolist() == [1.0, 0.0]
    with pytest.raises(
        RewardError,
        match=r"no reward function applies to a completion of dataset row 0: correctness",
    ):
        grader("correctness")(rollouts(*texts, prompts=prompts), prompts)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], r"reward function 'bad' must return one value per completion, got 1 for 2"),
        (1.0, r"must return a list of numbers, got float"),
        ("12", r"must return a list of numbers, got str"),
        ([1.0, "x"], r"must return finite numbers or None, got 'x' for dataset row 1"),
        ([math.nan, 1.0], r"must return finite numbers or None, got nan for dataset row 0"),
        ([1.0, math.inf], r"must return finite numbers or None, got inf for dataset row 1"),
        (
            [None, 1.0],
            r"no reward function applies to a completion of dataset row 0: bad all answered None",
        ),
    ],
)
def test_what_is_no_reward_is_refused(functions: dict[str, Any], answer: Any, message: str) -> None:
    functions["bad"] = lambda **_: answer
    with pytest.raises(RewardError, match=message):
        grader("bad")(rollouts("2", "4"), PROMPTS)


def test_what_a_function_raises_goes_through(functions: dict[str, Any]) -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("column")

    functions["broken"] = broken
    with pytest.raises(KeyError, match="column"):
        grader("broken")(rollouts("2", "4"), PROMPTS)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ((), (), "reward_funcs must name at least one function"),
        (
            ("formats",),
            (),
            r"must be correctness, score, format, .* or module:function, got 'formats'. The nearest one is 'format'",
        ),
        (("no_such_module:f",), (), r"there is no module 'no_such_module' on the path"),
        (("math:nope",), (), r"module 'math' has no attribute 'nope'"),
        (("math:pi",), (), r"'math:pi' must be callable, got float"),
        (
            ("format",),
            (1.0, 2.0),
            r"reward_weights must have one number per reward function, got 2 for 1",
        ),
    ],
)
def test_bad_settings_are_refused(
    names: tuple[str, ...], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grader(*names, weights=weights)
