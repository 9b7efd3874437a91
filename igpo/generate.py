"""`igpo generate`: completions of prompts, and what the canvas looks like on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.live import Live
from torch import Tensor

from .canvas import masked_canvases
from .config import Config, ConfigError, DataConfig
from .config_io import validate
from .data import load_prompts, prompt_ids
from .logging import output, progress, say
from .options import GenerateOptions
from .policy import build_policy, canvas_ids, load_tokenizer, require_model
from .replay import Trace, write_page
from .rewards.grader import completion_texts
from .rollout import denoise
from .types import Prompt, Seed

OnStep = Callable[[int, Tensor], None]


def run(cfg: Config, options: GenerateOptions) -> list[str]:
    """`igpo generate`: num_samples completions per prompt, as text or as JSONL; show_steps shows the denoising,
    replay_file keeps it as a page."""
    validate(cfg)
    if options.num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {options.num_samples}.")
    require_model(cfg, "generate")
    if options.num_samples > 1 and cfg.rollout.temperature == 0:
        raise ConfigError(
            f"num_samples must be 1 at temperature 0, where all are the same, got {options.num_samples}."
        )
    tokenizer = load_tokenizer(cfg.model)
    prompts = read_prompts(cfg.data, options, tokenizer)
    policy = build_policy(cfg, tokenizer)
    size = max(1, cfg.rollout.rollout_batch_size // options.num_samples)
    if options.show_steps or options.replay_file:
        size = 1
    texts: list[str] = []
    traces: list[Trace] = []
    with progress(len(prompts), "generate") as advance:
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            canvas = masked_canvases(
                some, num_generations=options.num_samples, completion_length=cfg.rollout.max_completion_length,
                device=policy.device, **canvas_ids(tokenizer),
            )  # fmt: skip
            trace = Trace(canvas, some[0].text, cfg.rollout.diffusion_steps)
            with shown_steps(trace, tokenizer, options) as on_step:
                seed = Seed(cfg.train.seed).named("generate")
                rollouts = denoise(policy, canvas, cfg.rollout, seed, on_step=on_step)
            if options.replay_file:
                # what an early stop filled came after the last step
                trace.see(int(rollouts.num_steps[0]), rollouts.tokens)
                traces.append(trace)
            texts += completion_texts(rollouts, tokenizer)
            advance(len(some))
    _write(prompts, texts, options)
    if options.replay_file:
        write_page(Path(options.replay_file), traces, tokenizer)
        say(f"written: {options.replay_file}")
    return texts


def read_prompts(cfg: DataConfig, options: GenerateOptions, tokenizer: Any) -> list[Prompt]:
    """From `prompt`, a JSONL file (its prompt_column), or a text file with a prompt a line. Raises ConfigError."""
    if (options.prompt is None) == (options.prompt_file is None):
        raise ConfigError("generate must have either prompt or prompt_file, got both or neither.")
    if options.prompt_file is None:
        texts = [options.prompt or ""]
    elif options.prompt_file.endswith(".jsonl"):
        plain = DataConfig(
            prompt_column=cfg.prompt_column,
            trace_column=None,
            max_prompt_length=cfg.max_prompt_length,
        )
        return load_prompts(options.prompt_file, plain, tokenizer)
    else:
        texts = Path(options.prompt_file).read_text(encoding="utf-8").splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ConfigError("generate: there is no prompt: every line is blank.")
    pairs = zip(texts, prompt_ids(texts, tokenizer), strict=True)
    return [Prompt(text, ids, row) for row, (text, ids) in enumerate(pairs)]


@contextmanager
def shown_steps(trace: Trace, tokenizer: Any, options: GenerateOptions) -> Iterator[OnStep | None]:
    """A callback that records every step in the trace and, with show_steps, shows it: live on a terminal, else as
    lines. None when neither is asked for."""
    if not options.show_steps:
        yield trace.see if options.replay_file else None
        return
    if not output.is_terminal:

        def as_line(step: int, tokens: Tensor) -> None:
            trace.see(step, tokens)
            text = trace.text(tokenizer).plain.replace("\n", "\\n")
            output.print(f"{step:4d} {text}", soft_wrap=True, markup=False, highlight=False)

        yield as_line
        return
    with Live(console=output, auto_refresh=False) as live:

        def redraw(step: int, tokens: Tensor) -> None:
            trace.see(step, tokens)
            live.update(trace.text(tokenizer), refresh=True)

        yield redraw


def _write(prompts: Sequence[Prompt], texts: Sequence[str], options: GenerateOptions) -> None:
    owners = torch.arange(len(prompts)).repeat_interleave(options.num_samples).tolist()
    if options.output_file is None:
        for owner, text in zip(owners, texts, strict=True):
            output.print(
                f"> {prompts[owner].text}\n{text}\n", markup=False, highlight=False, soft_wrap=True
            )
        return
    path = Path(options.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"prompt": prompts[owner].text, "sample": i % options.num_samples, "completion": text}
        for i, (owner, text) in enumerate(zip(owners, texts, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    say(f"written: {path}")
