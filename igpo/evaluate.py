"""Evaluation: completions of held-out problems, verified, with intervals and the protocol beside the number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.table import Table

from .canvas import masked_canvases
from .config import Config, ConfigError
from .config_io import validate
from .data import load_prompts
from .environment import git_commit, machine, versions
from .logging import output, progress, say
from .metrics import add
from .options import EvalOptions
from .policy import build_policy, canvas_ids, load_tokenizer, require_model
from .rewards import Grade, make_grader
from .rewards.grader import completion_ids
from .rollout import denoise
from .scores import Completion, summary
from .types import Graded, Metrics, Policy, Prompt, Seed


def evaluate(
    policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], grade: Grade, cfg: Config
) -> Metrics:
    """num_eval_generations completions of every problem at eval_temperature, graded.

    Random streams belong to (seed, row of the dataset, sample), so the result does not depend on eval_batch_size.

    Returns:
        accuracy, avg@n and pass@k with their intervals (`scores.summary`; pass@k is the unbiased estimate
        1 - C(n-c, k) / C(n, k), arXiv:2107.03374, equation 1), reward, completion_length (tokens before the end),
        num_problems, forwards (sequences times model calls), and the verifier's verify/timeouts and verify/failures.
    """
    return _evaluated(policy, tokenizer, prompts, grade, cfg)


def _count(totals: dict[str, float], graded: Graded) -> None:
    add(totals, {"forwards": float(graded.rollouts.num_forwards), **graded.metrics})


def complete(
    policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], grade: Grade, cfg: Config
) -> Iterator[Graded]:
    """The graded completions, batch after batch; group_ids count over all prompts."""
    samples, batch_size = cfg.evaluation.num_eval_generations, cfg.evaluation.eval_batch_size
    rollout = replace(
        cfg.rollout, temperature=cfg.evaluation.eval_temperature, rollout_batch_size=batch_size
    )
    seed, size = Seed(cfg.train.seed).named("evaluation"), max(1, batch_size // samples)
    right = done = 0
    with progress(len(prompts), "eval") as advance:
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            canvas = masked_canvases(
                some, num_generations=samples, completion_length=rollout.max_completion_length,
                device=policy.head_weight.device, **canvas_ids(tokenizer),
            )  # fmt: skip
            graded = grade(denoise(policy, canvas, rollout, seed), some)
            right, done = right + int(graded.correct.sum()), done + len(graded.correct)
            advance(len(some), accuracy=right / done)
            yield _renumbered(graded, start)


def _renumbered(graded: Graded, start: int) -> Graded:
    canvas = graded.rollouts.canvas
    canvas = replace(canvas, group_ids=canvas.group_ids + start)
    return replace(graded, rollouts=replace(graded.rollouts, canvas=canvas))


def _lines(graded: Graded, prompts: Sequence[Prompt]) -> Iterator[Completion]:
    groups = graded.rollouts.canvas.group_ids
    lengths = [len(ids) for ids in completion_ids(graded.rollouts)]
    for b, group in enumerate(groups.tolist()):
        prompt = prompts[group]
        yield Completion(
            row=prompt.row_id, sample=int((groups[:b] == group).sum()), prompt=prompt.text,
            completion=graded.completions[b], answer=prompt.answer, correct=bool(graded.correct[b]),
            reward=float(graded.rewards[b]), num_tokens=lengths[b], num_steps=int(graded.rollouts.num_steps[b]),
            max_completion_length=graded.rollouts.completion.shape[1],
        )  # fmt: skip


def check(cfg: Config) -> None:
    """Raises ConfigError for settings of the evaluation that cannot be meant."""
    e = cfg.evaluation
    for key in ("eval_batch_size", "num_eval_generations"):
        if getattr(e, key) < 1:
            raise ConfigError(f"{key} must be at least 1, got {getattr(e, key)}.")
    if e.eval_temperature < 0:
        raise ConfigError(f"eval_temperature must not be negative, got {e.eval_temperature}.")
    if e.num_eval_generations > 1 and e.eval_temperature == 0:
        raise ConfigError(
            f"num_eval_generations must be 1 at eval_temperature 0, where all completions of a problem are the same, "
            f"got {e.num_eval_generations}. Set eval_temperature."
        )


def run(cfg: Config, options: EvalOptions) -> Metrics:
    """`igpo eval`: prints a table with a column per length of eval_lengths, writes evaluation.json (numbers and
    protocol) and predictions.jsonl (every completion) into output_dir. Returns the numbers of the last length."""
    validate(cfg, need=("eval_file",))
    check(cfg)
    settings = [at_length(cfg, length) for length in lengths_of(cfg)]
    require_model(cfg, "eval")
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.eval_file, cfg.data, tokenizer, limit=cfg.evaluation.eval_limit)
    grade, policy = make_grader(tokenizer, cfg.reward), build_policy(cfg, tokenizer)
    folder = Path(cfg.train.output_dir)
    file = Path(options.predictions_file or folder / "predictions.jsonl")
    for place in (folder, file.parent):
        place.mkdir(parents=True, exist_ok=True)
    found: dict[int, Metrics] = {}
    with file.open("w", encoding="utf-8") as stream:
        for setting in settings:
            numbers = _evaluated(policy, tokenizer, prompts, grade, setting, stream)
            found[setting.rollout.max_completion_length] = numbers
    _report(cfg, found, protocol(cfg, tokenizer, prompts), file)
    return list(found.values())[-1]


def _evaluated(
    policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], grade: Grade, cfg: Config,
    stream: TextIO | None = None,
) -> Metrics:  # fmt: skip
    """Writes every completion into the stream as soon as it is there."""
    lines, totals = [], {"forwards": 0.0}
    for graded in complete(policy, tokenizer, prompts, grade, cfg):
        found = list(_lines(graded, prompts))
        lines += found
        _count(totals, graded)
        if stream is not None:
            stream.writelines(json.dumps(asdict(line)) + "\n" for line in found)
            stream.flush()
    return {**summary(lines, Seed(cfg.train.seed)), **totals}


def lengths_of(cfg: Config) -> tuple[int, ...]:
    return cfg.evaluation.eval_lengths or (cfg.rollout.max_completion_length,)


def at_length(cfg: Config, length: int) -> Config:
    """The configuration with another canvas, and as many tokens per denoise step as before. Raises ConfigError."""
    rollout = cfg.rollout
    steps, rest = divmod(length * rollout.diffusion_steps, rollout.max_completion_length)
    if length < 1 or length % rollout.block_length or rest or not steps:
        raise ConfigError(
            f"eval_lengths must be multiples of block_length={rollout.block_length} that keep "
            f"{rollout.max_completion_length}/{rollout.diffusion_steps} tokens per step, got {length}."
        )
    return replace(
        cfg, rollout=replace(rollout, max_completion_length=length, diffusion_steps=steps)
    )


VERIFICATION = {
    "answer": "answer after the last ####, else the last \\boxed{}, else the last number; numbers are exact",
}


def protocol(cfg: Config, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a reader must know to get the same number again."""
    task = cfg.reward.task
    return {
        "model_name_or_path": cfg.model.model_name_or_path,
        "dtype": cfg.model.dtype,
        "eval_file": cfg.data.eval_file,
        "eval_limit": cfg.evaluation.eval_limit,
        "num_problems": len(prompts),
        "prompt_template": cfg.data.prompt_template,
        "response_prefix": cfg.data.response_prefix,
        "first_prompt": tokenizer.decode(prompts[0].ids),
        "max_completion_length": list(lengths_of(cfg)),
        "block_length": cfg.rollout.block_length,
        "diffusion_steps": [at_length(cfg, n).rollout.diffusion_steps for n in lengths_of(cfg)],
        "remasking": cfg.rollout.remasking,
        "suppress_tokens": list(cfg.rollout.suppress_tokens),
        "early_stop": cfg.rollout.early_stop,
        "temperature": cfg.evaluation.eval_temperature,
        "num_eval_generations": cfg.evaluation.num_eval_generations,
        "seed": cfg.train.seed,
        "padding": "left, masked: the batch size changes no completion",
        "task": task,
        "compat": cfg.reward.compat,
        "verification": VERIFICATION.get(task, f"task {task} of igpo.rewards.verify (docs/rewards.md)"),
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": machine(),
    }  # fmt: skip


def _report(
    cfg: Config, found: dict[int, Metrics], facts: dict[str, Any], predictions: Path
) -> None:
    table = Table("", *(f"{length} tokens" for length in found))
    for name in next(iter(found.values())):
        if not name.endswith(("_low", "_high")):
            table.add_row(name, *(_shown(numbers, name) for numbers in found.values()))
    output.print(table)
    path = Path(cfg.train.output_dir) / "evaluation.json"
    record = {
        "metrics": dict(list(found.values())[-1]),
        "lengths": {str(length): dict(numbers) for length, numbers in found.items()},
        "protocol": facts,
        "predictions": str(predictions),
    }
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    say(f"written: {path}, {predictions}")


def _shown(numbers: Metrics, name: str) -> str:
    """With its interval, if it has one."""
    text = f"{numbers[name]:.4g}"
    ends = [numbers.get(f"{name}_{end}") for end in ("low", "high")]
    return text if None in ends else f"{text} [{ends[0]:.3f}, {ends[1]:.3f}]"
