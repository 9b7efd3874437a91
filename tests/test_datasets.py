"""Datasets by name and place: what rows become, templates, what is shared, errors that name row and column."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from igpo.cli import main
from igpo.config import DataConfig
from igpo.data import DataError, Source, load_prompts, overlaps, problems
from igpo.data.recipes import parse
from igpo.rewards import has_answer
from igpo.rewards.shaping import tags
from igpo.rewards.tasks import judge
from igpo.tokenizer import train_tokenizer

CFG = DataConfig(max_prompt_length=1000)
TOKENIZER = train_tokenizer(["what is 2 + 2 ? <reasoning> \\boxed{4} </answer>"], 300)
ROWS: dict[str, Any] = {
    "gsm8k": {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    "math": {"problem": "2+2?", "solution": r"It is $\boxed{4}$.", "level": "Level 1", "type": "Algebra"},
    "math500": {"problem": "2+2?", "solution": "s", "answer": "4", "subject": "Algebra"},
    "amc23": {"question": "2+2?", "answer": 4.0, "url": "u"},
    "metamath": {
        "query": "2+2?", "response": "So 4.\n#### 4\nThe answer is: 4", "type": "GSM_AnsAug", "original_question": "o",
    },
    "openr1": {
        "problem": "2+2?", "solution": "sol", "answer": "4", "generations": ["wrong", "<think>hm</think> right"],
        "correctness_math_verify": [False, True],
    },
    "countdown": {"nums": [1, 3], "target": 4},
    "sudoku": {"puzzle": "1234341221434300", "solution": "1234341221434321"},
}  # fmt: skip


def write(folder: Path, *rows: dict, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_every_dataset_gives_one_schema(tmp_path: Path, name: str) -> None:
    (problem,) = problems(f"{name}={write(tmp_path, ROWS[name])}", CFG)
    assert problem.question in ("2+2?", "Numbers: [1, 3]\nTarget: 4", "Puzzle: 1234341221434300")
    if name not in ("countdown", "sudoku"):
        assert problem.answer == "4"
    wanted = {"gsm8k": "2+2=4", "metamath": "So 4.", "openr1": "right", "amc23": None}
    if name in wanted:
        assert problem.solution == wanted[name]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gsm8k", {"answer": "4"}, r"rows.jsonl:2: column 'answer' must hold an answer after '####', got '4'"),
        ("math", {"solution": "no box"}, r":2: column 'solution' must hold its answer in a \\boxed\{\}"),
        ("math500", {"answer": None}, r":2: column 'answer' must be text that is not empty, got None"),
        ("metamath", {"response": "4"}, r":2: column 'response' must hold an answer after 'The answer is:'"),
        ("openr1", {"answer": ""}, r":2: column 'answer' must be text"),
        ("countdown", {"nums": ["a"]}, r":2: column 'numbers' must be whole numbers"),
        ("sudoku", {"puzzle": "12"}, r":2: column 'puzzle' must be 16 digits 0-4, got '12'"),
    ],
)  # fmt: skip
def test_errors_name_row_and_column(tmp_path: Path, name: str, change: dict, message: str) -> None:
    path = write(tmp_path, ROWS[name], {**ROWS[name], **change})
    with pytest.raises(DataError, match=message):
        list(problems(f"{name}={path}", CFG))
    missing = {k: v for k, v in ROWS[name].items() if k not in change}
    with pytest.raises(DataError, match=r"rows.jsonl:1: column '\w+' must be there, got only"):
        list(problems(f"{name}={write(tmp_path, missing)}", CFG))


def test_metamath_keeps_two_kinds_and_one_response_per_query(tmp_path: Path) -> None:
    row = ROWS["metamath"]
    path = write(
        tmp_path, {**row, "type": "GSM_Rephrased", "query": "other"}, row, {**row, "response": "x The answer is: 5"},
        {**row, "query": "3+1?", "type": "MATH_AnsAug"},
    )  # fmt: skip
    found = list(problems(f"metamath={path}", CFG))
    assert [(p.row.row_id, p.question, p.answer) for p in found] == [
        (1, "2+2?", "4"),
        (3, "3+1?", "4"),
    ]
    assert len(list(problems(f"metamath={path}", CFG, limit=1))) == 1


def test_where_a_name_leads() -> None:
    def of(text: str) -> Source:
        return parse(text, CFG)[1]

    assert of("gsm8k@test") == Source("openai/gsm8k", ("main",), "test")
    assert of("math500").split == "test"
    assert of("owner/name:part@train[:9]") == Source("owner/name", ("part",), "train[:9]")
    assert of("owner/name") == Source("owner/name")
    assert of("/a=b@c/x.jsonl") == Source("/a=b@c/x.jsonl")
    assert str(of("gsm8k@test")) == "openai/gsm8k:main@test"
    with pytest.raises(DataError, match="sudoku: has no public home"):
        of("sudoku")


def test_csv_keeps_leading_zeros_and_refuses_short_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("Puzzle,Solution\n0234341221434321,1234341221434321\n")
    (problem,) = problems(f"sudoku={path}", CFG)
    assert problem.columns == {"puzzle": "0234341221434321", "solution": "1234341221434321"}
    path.write_text("Puzzle,Solution\n0234341221434321\n")
    with pytest.raises(DataError, match=r"s.csv:2: must have the 2 values"):
        list(problems(f"sudoku={path}", CFG))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset with splits, as the hub has them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    place = tmp_path / "set"
    for split, count in (("train", 5), ("test", 2)):
        rows = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(count)]
        place.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(place / f"{split}.parquet")
    return place


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_hub_datasets_with_splits(folder: Path, streaming: bool) -> None:
    cfg = replace(CFG, streaming=streaming)
    assert [p.answer for p in problems(f"{folder}@test", cfg)] == ["1", "2"]
    assert len(list(problems(f"gsm8k={folder}", cfg))) == 5
    assert len(list(problems(f"{folder}/test.parquet", cfg))) == 2
    assert len(load_prompts(str(folder), cfg, TOKENIZER, limit=3)) == 3
    if not streaming:
        assert len(list(problems(f"{folder}@train[:2]", cfg))) == 2
    with pytest.raises(DataError, match=r"set@validation: .*validation"):
        list(problems(f"{folder}@validation", cfg))


def test_datasets_is_needed_for_the_hub_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises
    assert len(list(problems(str(write(tmp_path, ROWS["gsm8k"])), CFG))) == 1
    with pytest.raises(DataError, match=r"need `datasets`: pip install 'igpo\[data\]'"):
        list(problems("gsm8k", CFG))


@pytest.mark.parametrize(
    ("name", "task"), [("gsm8k", "gsm8k"), ("countdown", "countdown"), ("sudoku", "sudoku")]
)
def test_the_d1_form_of_prompts_and_traces(tmp_path: Path, name: str, task: str) -> None:
    row = {**ROWS[name], **({"solution": "3 + 1 = 4", "answer": "3 + 1"} if name == "countdown" else {})}  # fmt: skip
    row |= {"trace": "a cell"} if name == "sudoku" else {}
    cfg = replace(CFG, prompt_template="d1")
    (prompt,) = load_prompts(f"{name}={write(tmp_path, row)}", cfg, TOKENIZER)
    shown = TOKENIZER.decode(prompt.ids)
    assert shown.endswith(f"\n\n{prompt.text}\n<reasoning>")
    assert "</answer>" in shown
    assert "{question}" not in shown
    assert prompt.trace is not None
    assert tags(["q"], [prompt.trace]) == [1.0]
    reference = prompt.columns if name != "gsm8k" else prompt.answer
    assert judge(task, prompt.trace, reference).correct
    if name != "sudoku":
        assert judge(task, prompt.trace, reference, compat="d1").correct
    assert has_answer(prompt.trace, prompt.answer or "") or name == "sudoku"
    hint = TOKENIZER.decode(prompt.trace_ids[: prompt.hint_length])
    assert "answer" not in hint


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("Q: {question} \\boxed{}\nA:")
    path = f"gsm8k={write(tmp_path, ROWS['gsm8k'])}"
    cfg = replace(CFG, prompt_template=str(file), response_prefix="So", completion_format="tags")
    (prompt,) = load_prompts(path, cfg, TOKENIZER)
    assert TOKENIZER.decode(prompt.ids) == "<|bos|>Q: 2+2? \\boxed{}\nA:\nSo"
    assert prompt.trace == "\n2+2=4\n</reasoning>\n<answer>\n\\boxed{4}\n</answer>"
    file.write_text("no place")
    with pytest.raises(DataError, match=r"must hold \{question\}"):
        load_prompts(path, cfg, TOKENIZER)
    with pytest.raises(DataError, match="must be plain, d1 or a file, got 'nope'"):
        load_prompts(path, replace(CFG, prompt_template="nope"), TOKENIZER)
    with pytest.raises(DataError, match="completion_format must be one of marker, tags, tags_raw"):
        load_prompts(path, replace(CFG, completion_format="x"), TOKENIZER)


def test_a_null_trace_is_no_hint(tmp_path: Path) -> None:
    cfg = replace(CFG, trace_column="how", answer_column="a")
    path = write(tmp_path, {"question": "q", "how": None, "a": 1}, {"question": "q", "how": "h", "a": 1.5})  # fmt: skip
    first, second = load_prompts(path, cfg, TOKENIZER)
    assert (first.trace, first.trace_ids, first.answer) == (None, (), "1")
    assert (second.trace, second.answer) == ("h\n#### 1.5", "1.5")


def as_row(text: str) -> dict:
    return {"question": text, "answer": "#### 1"}


def test_overlaps(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    texts = {
        "train": ["What is 2+2?", f"{long} fourteen", "something else", f"x {long}"],
        "test": ["what is 2 + 2", f"zero {long}"],
    }
    train, test = (
        list(problems(str(write(tmp_path, *map(as_row, lines), name=f"{name}.jsonl")), CFG))
        for name, lines in texts.items()
    )
    found = [(o.train_row, o.eval_row, o.kind) for o in overlaps(train, test)]
    assert found == [(0, 0, "same"), (1, 1, "ngram"), (3, 1, "ngram")]
    rows = [{"nums": [1, 3], "target": 4}, {"nums": [3, 1], "target": 4}, {"nums": [3, 1], "target": 2}]  # fmt: skip
    first, *others = problems(f"countdown={write(tmp_path, *rows)}", CFG)
    assert [(o.train_row, o.kind) for o in overlaps(others, [first])] == [(1, "same")]
    with pytest.raises(ValueError, match="ngram must be at least 1, got 0"):
        overlaps(train, test, 0)


def test_the_report_says_what_is_shared(problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = problems / "problems.jsonl"
    words = [f"train_file={file}", f"eval_file={file}", f"tokenizer_name_or_path={problems}"]
    assert main(["data", *words]) == 0
    said = capsys.readouterr()
    assert "10 training problems are in the evaluation data; 0 more" in said.err
    assert "0 + 3 = 3\n#### 3" in said.out
    assert main(["data"]) == 2


def test_the_real_files(shared: Path) -> None:
    data = shared / "data"
    counts = {
        "gsm8k": ("gsm8k/test.jsonl", 1319), "math500": ("math500/test.jsonl", 500), "amc23": ("amc23/test.jsonl", 40),
        "countdown3": ("countdown/test.jsonl", 256), "sudoku": ("sudoku/test.csv", 500),
    }  # fmt: skip
    for name, (file, count) in counts.items():
        found = list(problems(f"{name}={data / file}", CFG))
        assert len(found) == count
        assert all(p.answer or p.columns["target"] for p in found)
