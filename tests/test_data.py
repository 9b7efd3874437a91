"""Problems from files: what a prompt, its trace and its hints are, which step gets which, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo.config import DataConfig
from igpo.data import DataError, batches, hint_end, load_prompts, strip_calculator_annotations
from igpo.rewards import has_answer
from igpo.tokenizer import train_tokenizer
from igpo.types import Prompt, Seed

CFG = DataConfig()
ROWS = [
    {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
        " How many clips did Natalia sell altogether in April and May?",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips"
        " altogether in April and May.\n#### 72",
    },
    {
        "question": "Weng earns $12 an hour. Yesterday she did 50 minutes of babysitting. How much did she earn?",
        "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 ="
        " $<<0.2*50=10>>10.\n#### 10",
    },
]
TOKENIZER = train_tokenizer([text for row in ROWS for text in row.values()], 400)


def write(folder: Path, *rows: object) -> Path:
    path = folder / "problems.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_gsm8k_row(tmp_path: Path) -> None:
    first, second = load_prompts(write(tmp_path, *ROWS), CFG, TOKENIZER)
    assert first.text == ROWS[0]["question"]
    assert first.answer == "72"
    assert first.row_id == 0
    assert first.trace == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
    )
    assert TOKENIZER.decode(first.ids) == "<|bos|>" + first.text + "\n"
    assert first.trace_ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(first.trace_ids[:-1]) == first.trace
    shown = TOKENIZER.decode(first.trace_ids[: first.hint_length])
    assert shown == "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = "
    assert first.columns == {"answer": ROWS[0]["answer"]}
    assert second.answer == "10"
    assert second.row_id == 1


def test_a_chat_template_is_used(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a"], 300)
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}[out]{% endif %}"
    (prompt,) = load_prompts(write(tmp_path, ROWS[1]), CFG, tokenizer)
    assert tokenizer.decode(prompt.ids) == f"[user]{ROWS[1]['question']}[out]"


def test_blank_lines_keep_row_ids_and_limit_counts_problems(tmp_path: Path) -> None:
    path = write(tmp_path, "", ROWS[0], "  ", ROWS[1])
    assert [p.row_id for p in load_prompts(path, CFG, TOKENIZER)] == [1, 3]
    assert [p.row_id for p in load_prompts(path, CFG, TOKENIZER, limit=1)] == [1]


def test_no_trace_means_no_hints(tmp_path: Path) -> None:
    cfg = replace(CFG, trace_column=None)
    (prompt,) = load_prompts(write(tmp_path, {"question": "2+2?"}), cfg, TOKENIZER)
    assert prompt.trace is None
    assert prompt.trace_ids == ()
    assert prompt.hint_length == 0
    assert prompt.answer is None


def test_an_answer_column_of_numbers_ends_the_trace(tmp_path: Path) -> None:
    cfg = replace(CFG, trace_column="how", answer_column="result")
    row = {"question": "2+2?", "how": "2 and 2 make 4", "result": 4, "level": 1}
    (prompt,) = load_prompts(write(tmp_path, row), cfg, TOKENIZER)
    assert prompt.trace == "2 and 2 make 4\n#### 4"
    assert prompt.answer == "4"
    assert TOKENIZER.decode(prompt.trace_ids[: prompt.hint_length]) == "2 and 2 make "
    assert prompt.columns == {"how": "2 and 2 make 4", "result": 4, "level": 1}


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"q": "x"}, {}, r"problems.jsonl:2: column 'question' must be there, got only q. Set prompt_column"),
        ({"question": "x"}, {}, r":2: column 'answer' must be there, got only question. Set trace_column"),
        ({"question": 3}, {}, r":2: column 'question' must be text that is not empty, got 3"),
        ({"question": "x", "answer": "4"}, {}, r":2: column 'answer' must hold an answer after '####', got '4'"),
        ({"question": "x", "answer": "4 ####  "}, {}, r"must hold an answer after '####'"),
        (ROWS[0], {"answer_column": "final"}, r":2: column 'final' must be there"),
        (ROWS[0], {"max_prompt_length": 9}, r"column 'question' must be at most max_prompt_length=9 tokens, got \d+"),
        ("{'a'}", {}, r":2: must be JSON: Expecting property name enclosed in double quotes, column 2"),
        ("[1]", {}, r":2: must be a JSON object, got \[1\]"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, row: object, changes: dict, message: str) -> None:
    good = {"question": "1?", "answer": "#### 1", "q": "", "final": "1"}
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, good, row), replace(CFG, **changes), TOKENIZER)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: No such file"):
        load_prompts(tmp_path / "none.jsonl", CFG, TOKENIZER)
    with pytest.raises(DataError, match="must hold at least one problem, got none"):
        load_prompts(write(tmp_path, ""), CFG, TOKENIZER)
    (tmp_path / "latin").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(DataError, match="must be UTF-8 text, byte 14 is not"):
        load_prompts(tmp_path / "latin", CFG, TOKENIZER)


@pytest.mark.parametrize(
    ("solution", "answer", "shown"),
    [
        ("so 72 and 72 clips", "72", "so 72 and "),
        ("172 and 72.5 and 7200", "72", "172 and 72.5 and 7200"),
        ("it is 1,000 m", "1000", "it is "),
        ("it is $1000.00", "1,000", "it is $"),
        ("x is blue, then", "blue", "x is "),
        ("bluegreen", "blue", "bluegreen"),
        ("she has 72.", "72", "she has "),
        ("anything", None, "anything"),
    ],
)
def test_hints_stop_at_the_last_copy_of_the_answer(
    solution: str, answer: str | None, shown: str
) -> None:
    assert solution[: hint_end(solution, answer)] == shown


@given(
    st.text(st.characters(codec="utf-8"), max_size=40), st.integers(0, 10**6), st.text(max_size=40)
)
def test_no_hint_token_reaches_into_the_answer(before: str, value: int, after: str) -> None:
    solution = strip_calculator_annotations(f"{before} {value} {after}".replace("#", " ")).strip()
    with TemporaryDirectory() as folder:
        path = write(Path(folder), {"question": "q", "answer": f"{solution}\n#### {value}"})
        (prompt,) = load_prompts(path, CFG, TOKENIZER)
    shown = TOKENIZER.decode(prompt.trace_ids[: prompt.hint_length])
    end = hint_end(solution, str(value))
    assert prompt.trace is not None
    assert end < len(solution)
    assert prompt.trace.encode().startswith(shown.rstrip("\ufffd").encode())
    assert len(shown.rstrip("\ufffd")) <= end


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), (i,), i) for i in range(count)]


@given(st.integers(1, 30), st.data())
def test_an_epoch_is_a_permutation_in_whole_steps(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, count))
    order = batches(prompts(count), size, Seed(data.draw(st.integers(0, 99))))
    steps = count // size
    for epoch in range(3):
        seen = Counter(p.row_id for step in range(steps) for p in order.at(epoch * steps + step))
        assert sum(seen.values()) == steps * size
        assert set(seen.values()) == {1}


def test_batches_are_a_function_of_seed_and_step() -> None:
    first, again, other = (batches(prompts(50), 8, Seed(s)) for s in (1, 1, 2))
    steps = [20, 3, 0, 21, 3]
    assert [again.at(s) for s in reversed(range(22))][::-1] == [first.at(s) for s in range(22)]
    assert [first.at(s) for s in steps] != [other.at(s) for s in steps]
    assert first.at(0) != first.at(6)  # another epoch, another order


@pytest.mark.parametrize("size", [0, 4])
def test_impossible_steps_are_refused(size: int) -> None:
    with pytest.raises(DataError, match=rf"prompts_per_step must be in 1..3 .*, got {size}"):
        batches(prompts(3), size, Seed(0))


@pytest.mark.parametrize(("split", "count"), [("train", 1000), ("test", 1319)])
def test_real_rows_load_and_verify(shared: Path, split: str, count: int) -> None:
    cfg = replace(CFG, max_prompt_length=2000)
    found = load_prompts(shared / f"data/gsm8k/{split}.jsonl", cfg, TOKENIZER, limit=count)
    assert len(found) == count
    for prompt in found:
        assert prompt.trace is not None
        assert prompt.answer is not None
        assert "<<" not in prompt.trace
        assert has_answer(prompt.trace, prompt.answer)
        assert not has_answer(prompt.trace, prompt.answer + "1")
        assert 0 <= prompt.hint_length < len(prompt.trace_ids)
