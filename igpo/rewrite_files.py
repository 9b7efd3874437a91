"""The journal of `igpo rewrite`, and its files: accepted traces, rejects with reasons, numbers, a figure of lengths."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import Config, ConfigError
from .data import Problem
from .lines import LineFile, as_lines, replace_whole
from .options import RewriteOptions

_PER = 1e6  # prices are for a million tokens


@dataclass(frozen=True)
class Result:
    """What became of one problem. reason: why the trace is rejected, None where it is accepted."""

    row: int
    reason: str | None = None
    trace: str = ""
    num_tokens: int = 0
    num_tokens_before: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """Finished results, appended as they come and safe on the disk before the next is asked for.

    A line a kill has cut short is dropped. Raises ConfigError when it belongs to other settings.
    """

    def __init__(self, output: Path, settings: str) -> None:
        self.file = LineFile(output.with_suffix(".journal.jsonl"))
        lines = self.file.records
        if not lines:
            self.file.append([{"settings": settings}])
        elif lines[0].get("settings") != settings:
            self.file.close()
            raise ConfigError(
                f"rewrite: {self.file.path} belongs to a run with other settings. Delete it, or choose another "
                "output_file."
            )
        self.results = {line["row"]: Result(**line) for line in lines[1:]}

    def add(self, result: Result) -> None:
        self.results[result.row] = result
        self.file.append([asdict(result)])

    def shown(self, options: RewriteOptions) -> dict[str, float]:
        """Numbers beside the progress bar."""
        accepted = sum(r.reason is None for r in self.results.values())
        numbers = {"accepted": accepted / max(1, len(self.results))}
        spent = cost(self.results.values(), options)
        return {**numbers, **({"cost": spent} if spent else {})}

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def cost(results: Any, options: RewriteOptions) -> float:
    """In the currency of the prices."""
    return (
        sum(
            r.prompt_tokens * options.prompt_price + r.completion_tokens * options.completion_price
            for r in results
        )
        / _PER
    )


def write_results(
    output: Path, found: Sequence[Problem], journal: Journal, cfg: Config, options: RewriteOptions
) -> dict[str, float]:
    """Writes output (JSONL that train_file takes, originals kept), .rejects.jsonl, .json and .png beside it."""
    by_row = {p.row.row_id: p for p in found}
    results = [journal.results[row] for row in sorted(journal.results) if row in by_row]
    accepted = [r for r in results if r.reason is None]
    replace_whole(output, as_lines([_accepted(by_row[r.row], r, cfg) for r in accepted]))
    rejects = [_rejected(by_row[r.row], r) for r in results if r.reason is not None]
    replace_whole(output.with_suffix(".rejects.jsonl"), as_lines(rejects))
    numbers = _numbers(results, options)
    reasons = dict(Counter(_kind(r) for r in results))
    summary = {"numbers": numbers, "reasons": reasons, "options": asdict(options)}
    output.with_suffix(".json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if accepted:
        _plot(accepted, options.max_trace_length or 0, output.with_suffix(".png"))
    return numbers


def _accepted(problem: Problem, result: Result, cfg: Config) -> dict[str, Any]:
    marker = cfg.data.answer_marker
    return {
        **problem.columns,
        "row": problem.row.row_id,
        "question": problem.question,
        "answer": f"{result.trace}\n{marker} {problem.answer}",
        "original_trace": problem.solution,
    }


def _rejected(problem: Problem, result: Result) -> dict[str, Any]:
    return {
        "row": problem.row.row_id, "reason": result.reason, "question": problem.question, "answer": problem.answer,
        "original_trace": problem.solution, "trace": result.trace, "attempts": result.attempts,
    }  # fmt: skip


def _kind(result: Result) -> str:
    return "accepted" if result.reason is None else result.reason.partition(":")[0]


def _numbers(results: Sequence[Result], options: RewriteOptions) -> dict[str, float]:
    accepted = [r for r in results if r.reason is None]
    numbers = {
        "problems": float(len(results)),
        "accepted": float(len(accepted)),
        "prompt_tokens": float(sum(r.prompt_tokens for r in results)),
        "completion_tokens": float(sum(r.completion_tokens for r in results)),
        "cost": cost(results, options),
    }
    for name, lengths in (
        ("before", [r.num_tokens_before for r in accepted]), ("after", [r.num_tokens for r in accepted])
    ):  # fmt: skip
        if lengths:
            numbers[f"mean_tokens_{name}"] = sum(lengths) / len(lengths)
            numbers[f"max_tokens_{name}"] = float(max(lengths))
    return numbers


def _plot(results: Sequence[Result], budget: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    before, after = [r.num_tokens_before for r in results], [r.num_tokens for r in results]
    top = max(*before, *after, budget)
    bins = [top * i / 60 for i in range(61)]
    axes.hist(before, bins, alpha=0.6, label="before")
    axes.hist(after, bins, alpha=0.6, label="after")
    axes.axvline(budget, color="black", linestyle="--", label="budget")
    axes.set(xlabel="tokens of the completion", ylabel="accepted traces")
    axes.legend()
    figure.savefig(path, dpi=120)
