"""The tokenizer program: special tokens, digits, round trips, determinism, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from igpo.config import ConfigError
from igpo.options import TokenizerOptions
from igpo.tokenizer import run, train_tokenizer

TEXTS = [
    "She sold 48/2 = 24 clips in May.",
    "She sold 48+24 = 72 clips altogether in April and May.",
] * 3
TOKENIZER = train_tokenizer(TEXTS, 280)


def test_every_special_token_is_one_token_that_text_cannot_contain() -> None:
    ids = [
        TOKENIZER.pad_token_id,
        TOKENIZER.bos_token_id,
        TOKENIZER.eos_token_id,
        TOKENIZER.mask_token_id,
    ]
    assert ids == [0, 1, 2, 3]
    assert min(TOKENIZER("any text", add_special_tokens=False)["input_ids"]) > 3


def test_merges_are_learned_but_never_over_digits() -> None:
    assert len(TOKENIZER) == 280
    tokens = TOKENIZER.tokenize("She sold 4824 clips")
    assert len(tokens) < len("She sold 4824 clips")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == ["4", "8", "2", "4"]


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    if not any(token in text for token in TOKENIZER.all_special_tokens):
        assert TOKENIZER.decode(ids) == text


def test_the_same_texts_give_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, 280).get_vocab() == TOKENIZER.get_vocab()


def test_the_program_writes_a_folder_that_transformers_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jsonl, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    jsonl.write_text(
        "\n".join(json.dumps({"question": t, "answer": t}) for t in TEXTS) + "\n\n",
        encoding="utf-8",
    )
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    out = tmp_path / "tokenizer"
    run(TokenizerOptions(files=(str(jsonl), str(text)), vocab_size=280, output_dir=str(out)))
    loaded = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert len(loaded) == 280
    assert loaded.mask_token == "<|mask|>"
    assert loaded.decode(loaded(TEXTS[0], add_special_tokens=False)["input_ids"]) == TEXTS[0]
    assert "280 tokens from 18 texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {"files": ()}, "files must name at least one"),
        (None, {}, r"x.jsonl: No such file"),
        ("\n", {}, "files: no text in"),
        ('{"question": "a"}', {}, r"x.jsonl:1: must have text in column 'answer'"),
        ("\n{", {}, r"x.jsonl:2: must be JSON: Expecting property name"),
        ("[1]", {}, r"x.jsonl:1: must have text in column 'question'"),
        ('{"question": "a", "answer": "b"}', {"vocab_size": 259}, r"vocab_size must be at least 260 .*, got 259"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    tmp_path: Path, content: str | None, options: dict, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        run(
            TokenizerOptions(
                **{"files": (str(path),), "output_dir": str(tmp_path / "out"), **options}
            )
        )
    assert not (tmp_path / "out").exists()
