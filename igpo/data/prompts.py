"""Problems as prompts: tokens, the completion to learn from, and how much of it may be shown as a hint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from igpo.config import DataConfig
from igpo.types import Prompt

from .recipes import Problem, parse, problems
from .sources import DataError
from .templates import Template, template

_NUMBER = re.compile(r"(?<![\d.,])\d[\d,]*(?:\.\d+)?(?!\d)")


def load_prompts(
    path: str | Path | None, cfg: DataConfig, tokenizer: Any, *, limit: int | None = None
) -> list[Prompt]:
    """Reads a dataset whose rows have a prompt, and usually a worked solution and an answer.

    The prompt goes through cfg.prompt_template and the tokenizer's chat template, or, without one, becomes BOS (if
    there is one), the text and a newline. The completion the policy should give is "SOLUTION\\nMARKER ANSWER" (or the
    template's form) and EOS: trace_ids, of which the first hint_length end before the last place in the solution where
    the answer stands (IGPO never shows the answer or its last copy; arXiv:2509.10396, section 3). Calculator
    annotations are removed.

    Args:
        path: a file (.jsonl, .csv, .parquet), a folder or hub dataset ("owner/name:config@split"), a dataset by name
            ("gsm8k@test", igpo.data.RECIPES), or a name with a place ("math500=FILE"). None, an option without a value,
            is an error. Rows with `chosen` and `rejected` are preference pairs, and need no trace and no answer.
        cfg: for datasets without a name, the columns: the answer is in answer_column, or else follows answer_marker in
            the trace.
        tokenizer: a fast tokenizer with eos_token.
        limit: reads the first `limit` problems only.
    Returns:
        One Prompt per problem; row_id is its 0-based line or row.
    Raises:
        DataError: nothing there, no problems, or a row that is not as cfg or the dataset's recipe says. Nothing is
        skipped (but what a recipe leaves out) or cut.
    """
    if path is None:
        raise DataError("a JSONL file of problems must be named, got none.")
    found = list(problems(str(path), cfg, limit))
    if not found:
        raise DataError(f"{path}: must hold at least one problem, got none.")
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(
            f"tokenizer must be a fast one (offsets are needed to place hints), got {kind}."
        )
    form = template(cfg, parse(str(path), cfg)[0].kind)
    texts = [form.fill(problem.question) for problem in found]
    all_ids = prompt_ids(texts, tokenizer, form.prefix)
    for problem, ids in zip(found, all_ids, strict=True):
        if len(ids) > cfg.max_prompt_length:
            problem.row.fail(
                cfg.prompt_column, f"be at most max_prompt_length={cfg.max_prompt_length} tokens", f"{len(ids)}",
                "Raise max_prompt_length or remove the line; prompts are never cut.",
            )  # fmt: skip
    return _prompts(found, all_ids, form, tokenizer)


def prompt_ids(texts: Sequence[str], tokenizer: Any, prefix: str = "") -> list[tuple[int, ...]]:
    """The tokens prompts are rolled out from: the chat template, or BOS (if there is one), text and a newline; then the
    part of the completion that is given."""
    if tokenizer.chat_template:
        messages = [[{"role": "user", "content": text}] for text in texts]
        options = {"add_generation_prompt": True, "tokenize": False}
        rendered = [text + prefix for text in tokenizer.apply_chat_template(messages, **options)]
        return [tuple(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    first = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    whole = [f"{text}\n{prefix}" for text in texts]
    return [(*first, *ids) for ids in tokenizer(whole, add_special_tokens=False)["input_ids"]]


def _prompts(
    found: Sequence[Problem], all_ids: Sequence[tuple[int, ...]], form: Template, tokenizer: Any
) -> list[Prompt]:
    traces, starts = [], []
    for problem in found:
        trace, start = "", 0
        if problem.solution is not None:
            trace, start = form.completion(problem.solution, problem.answer)
        traces.append(trace)
        starts.append(start)
    tokens = tokenizer(traces, add_special_tokens=False, return_offsets_mapping=True)
    tokenized = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    prompts = []
    pairs = _pairs(found, tokenizer)
    for problem, ids, trace, start, (trace_ids, offsets), pair in zip(
        found, all_ids, traces, starts, tokenized, pairs, strict=True
    ):
        end = start + hint_end(problem.solution or "", problem.answer)
        shown = next((i for i, (_, stop) in enumerate(offsets) if stop > end), len(offsets))
        there = problem.solution is not None
        prompts.append(
            Prompt(
                text=problem.question, ids=ids, row_id=problem.row.row_id, answer=problem.answer,
                trace=trace if there else None, trace_ids=(*trace_ids, tokenizer.eos_token_id) if there else (),
                hint_length=shown, columns=problem.columns, pair=pair,
            )
        )  # fmt: skip
    return prompts


def _pairs(found: Sequence[Problem], tokenizer: Any) -> list[Any]:
    """Of every problem the tokens of its two completions, EOS included; None where it has none."""
    texts = [text for problem in found for text in problem.pair or ()]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ids = iter([(*tokens, tokenizer.eos_token_id) for tokens in encoded])
    return [None if problem.pair is None else (next(ids), next(ids)) for problem in found]


def hint_end(solution: str, answer: str | None) -> int:
    """How many characters of a worked solution stand before the last copy of its answer; all without a copy.

    Numbers are compared by value: 1,000 is a copy of 1000, and 172 holds no copy of 72.
    """
    if answer is None:
        return len(solution)
    value = _number(answer)
    if value is not None:
        found = [m.start() for m in _NUMBER.finditer(solution) if _number(m[0]) == value]
    else:
        pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
        found = [m.start() for m in re.finditer(pattern, solution)]
    return found[-1] if found else len(solution)


def _number(text: str) -> Fraction | None:
    text = text.strip().lstrip("$").rstrip(".%").replace(",", "").removeprefix("-")
    plain = re.fullmatch(r"\d{1,100}(\.\d{1,100})?", text)
    return Fraction(text) if plain else None
