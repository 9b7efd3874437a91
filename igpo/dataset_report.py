"""`igpo data`: what training and evaluation data look like to the model, and what they share."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .config import Config, ConfigError
from .data import NGRAM, Problem, load_prompts, overlaps, problems
from .logging import output, say
from .options import DataOptions
from .policy import load_tokenizer
from .types import Prompt

_SHOWN = 5  # shared problems that are printed


def run(cfg: Config, options: DataOptions) -> None:
    """Prints problems and lengths in tokens, a whole prompt with its trace, and the training problems that the
    evaluation data hold too."""
    files = {"train_file": cfg.data.train_file, "eval_file": cfg.data.eval_file}
    named = {key: file for key, file in files.items() if file is not None}
    if not named:
        raise ConfigError("data: set train_file, eval_file or both.")
    tokenizer = load_tokenizer(cfg.model) if _has_tokenizer(cfg) else None
    table = Table("", "problems", "with answer", "with trace", "prompt tokens", "trace tokens")
    sample = None
    for key, file in named.items():
        limit = options.limit
        found = list(problems(file, cfg.data, limit))
        prompts: list[Prompt] = []
        if tokenizer is not None:
            prompts = load_prompts(file, cfg.data, tokenizer, limit=limit)
            sample = sample or (tokenizer.decode(prompts[0].ids), prompts[0].trace)
        table.add_row(
            f"{key}: {file}", str(len(found)), str(sum(p.answer is not None for p in found)),
            str(sum(p.solution is not None for p in found)), _range([len(p.ids) for p in prompts]),
            _range([len(p.trace_ids) for p in prompts if p.trace_ids]),
        )  # fmt: skip
    output.print(table)
    if sample is not None:
        output.print(Text(f"\nThe first prompt:\n{sample[0]}\n\nIts trace:\n{sample[1]}\n"))
    if len(named) == 2:
        train, evaluation = (
            list(problems(file, cfg.data, options.limit)) for file in named.values()
        )
        _say_overlaps(train, evaluation)


def _say_overlaps(train: Sequence[Problem], evaluation: Sequence[Problem]) -> None:
    shared = overlaps(train, evaluation)
    same = sum(o.kind == "same" for o in shared)
    say(
        f"{same} training problems are in the evaluation data; {len(shared) - same} more share {NGRAM} words in a row "
        "with one of its problems."
    )
    by_row = {p.row.row_id: p for p in train}
    for overlap in shared[:_SHOWN]:
        text = " ".join(by_row[overlap.train_row].question.split())
        say(f"  train {overlap.train_row}, evaluation {overlap.eval_row}: {overlap.kind}: {text[:80]}")  # fmt: skip


def _has_tokenizer(cfg: Config) -> bool:
    return (cfg.model.tokenizer_name_or_path or cfg.model.model_name_or_path) is not None


def _range(lengths: Sequence[int]) -> str:
    """Median and maximum."""
    if not lengths:
        return ""
    return f"{sorted(lengths)[len(lengths) // 2]}, at most {max(lengths)}"
