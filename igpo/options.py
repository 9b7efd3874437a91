"""What a command takes beside the configuration tree (docs/architecture.md, "Programs"). Imports nothing of igpo.

Comments are the help text of `igpo COMMAND --help`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DryRunOptions:
    tflops: float | None = None  # rate of the model on the device, for times; None: a measured one


@dataclass(frozen=True)
class EvalOptions:
    # a published evaluation set with its protocol: gsm8k, math500, amc23, countdown, sudoku (docs/evaluation.md)
    task: str | None = None
    # JSONL: every completion with its verdict; None: predictions.jsonl in output_dir
    predictions_file: str | None = None
    num_shards: int | None = None  # processes that share the problems; None: torchrun's, else 1
    shard_index: int | None = None  # of this process, from 0; None: its rank


@dataclass(frozen=True)
class GenerateOptions:
    prompt: str | None = None  # one prompt, as typed
    prompt_file: str | None = None  # JSONL (prompt_column), or one prompt a line
    output_file: str | None = None  # JSONL; None: standard output
    num_samples: int = 1  # completions per prompt
    show_steps: bool = False  # show the canvas after every denoise step, tokens coloured by step
    replay_file: str | None = None  # HTML: plays the denoising of each prompt's first completion


@dataclass(frozen=True)
class ReportOptions:
    """`igpo report RUN ...` takes these alone."""

    runs: tuple[str, ...] = ()  # folders; words without = are these
    out: str = "report.html"


@dataclass(frozen=True)
class DataOptions:
    limit: int | None = None  # the first problems only


@dataclass(frozen=True)
class RewriteOptions:
    output_file: str = "rewritten.jsonl"  # beside it: .rejects.jsonl, .json, .png, .journal.jsonl
    base_url: str | None = None  # an OpenAI-compatible endpoint; None: rules, without a model
    rewrite_model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    max_trace_length: int | None = None  # tokens, EOS included; None: max_completion_length
    concurrency: int = 16  # requests at once
    num_attempts: int = 2  # for a trace that is rejected
    max_retries: int = 5  # of a request, with exponential back-off
    request_timeout_s: float = 120.0
    rewrite_temperature: float = 0.7
    max_tokens: int = 2048  # of a reply
    prompt_price: float = 0.0  # per million tokens
    completion_price: float = 0.0
    limit: int | None = None  # the first problems only


@dataclass(frozen=True)
class PuzzleOptions:
    """`igpo puzzles` takes these alone."""

    puzzle: str = "countdown"  # or sudoku, addition
    num_problems: int = 10000
    seed: int = 3
    output_file: str | None = None  # JSONL; None: PUZZLE.jsonl
    exclude_file: str | None = None  # problems of this file are left out
    num_numbers: int = 3  # countdown
    max_number: int = 100
    max_target: int = 100
    num_empty: int = 8  # sudoku: cells to fill
    num_digits: int = 3  # addition


@dataclass(frozen=True)
class TokenizerOptions:
    """`igpo tokenizer` takes these alone."""

    files: tuple[str, ...] = ()  # JSONL, or plain text
    columns: tuple[str, ...] = ("question", "answer")  # of the JSONL files
    vocab_size: int = 2048
    output_dir: str = "tokenizer"


@dataclass(frozen=True)
class DemoOptions:
    """`igpo demo` takes these alone."""

    out: str = "demo-out"  # folder of the figure, the page and the numbers
    from_scratch: bool = False  # True: pretrain the small model instead of loading it
    seed: int = 3
