"""Evaluation: completions of held-out problems, verified, with intervals and the protocol beside the number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .canvas import GENERATIONS_PER_PROMPT, masked_canvases
from .config import Config, ConfigError
from .config_io import validate
from .data import load_prompts
from .lines import replace_whole
from .logging import output, progress, say
from .options import EvalOptions
from .policy import build_policy, canvas_ids, load_tokenizer, require_model
from .protocol import at_length, identity, lengths_of, protocol
from .rewards import Grade, make_grader
from .rewards.grader import completion_ids
from .rollout import denoise
from .scores import Completion, summary
from .shards import Key, Predictions, Shard
from .types import Graded, Metrics, Policy, Prompt, Seed, take

Unit = tuple[int, int]  # index of a prompt, sample


def evaluate(
    policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], grade: Grade, cfg: Config
) -> Metrics:
    """num_eval_generations completions of every problem at eval_temperature, graded.

    Random streams belong to (seed, row of the dataset, sample), so the result does not depend on eval_batch_size.

    Returns:
        accuracy, avg@n and pass@k with their intervals (`scores.summary`; pass@k is the unbiased estimate
        1 - C(n-c, k) / C(n, k), arXiv:2107.03374, equation 1), reward, completion_length (tokens before the end),
        num_steps, num_problems, the verifier's verify/timeouts and verify/failures, and forwards (sequences times
        model calls).
    """
    lines, forwards = [], 0.0
    for graded in complete(policy, tokenizer, prompts, grade, cfg):
        lines += _lines(graded, prompts)
        forwards += graded.rollouts.num_forwards
    return {**summary(lines, Seed(cfg.train.seed)), "forwards": forwards}


def complete(
    policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], grade: Grade, cfg: Config,
    todo: Sequence[Unit] | None = None, description: str = "eval",
) -> Iterator[Graded]:  # fmt: skip
    """The graded completions of todo (None: all), batch after batch; group_ids count over all prompts."""
    samples, batch_size = cfg.evaluation.num_eval_generations, cfg.evaluation.eval_batch_size
    rollout = replace(
        cfg.rollout, temperature=cfg.evaluation.eval_temperature, rollout_batch_size=batch_size
    )
    if todo is None:
        todo = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    seed, right = Seed(cfg.train.seed).named("evaluation"), 0
    with progress(len(todo), description) as advance:
        for start in range(0, len(todo), batch_size):
            units = todo[start : start + batch_size]
            indices = list(dict.fromkeys(index for index, _ in units))
            some = [prompts[index] for index in indices]
            canvas = masked_canvases(
                some, num_generations=samples, completion_length=rollout.max_completion_length,
                device=policy.head_weight.device, **canvas_ids(tokenizer),
            )  # fmt: skip
            rows = [indices.index(index) * samples + sample for index, sample in units]
            canvas = take(canvas, torch.tensor(rows, device=canvas.tokens.device))
            graded = grade(denoise(policy, canvas, rollout, seed), some)
            right += int(graded.correct.sum())
            advance(len(units), accuracy=right / (start + len(units)))
            yield _renumbered(graded, indices)


def _renumbered(graded: Graded, indices: Sequence[int]) -> Graded:
    canvas = graded.rollouts.canvas
    groups = torch.tensor(indices, device=canvas.tokens.device)[canvas.group_ids]
    canvas = replace(canvas, group_ids=groups)
    return replace(graded, rollouts=replace(graded.rollouts, canvas=canvas))


def _lines(graded: Graded, prompts: Sequence[Prompt]) -> Iterator[Completion]:
    canvas = graded.rollouts.canvas
    ids = completion_ids(graded.rollouts)
    for b, (group, row) in enumerate(
        zip(canvas.group_ids.tolist(), canvas.row_ids.tolist(), strict=True)
    ):
        prompt = prompts[group]
        yield Completion(
            row=prompt.row_id, sample=row % GENERATIONS_PER_PROMPT, prompt=prompt.text,
            completion=graded.completions[b], answer=prompt.answer, correct=bool(graded.correct[b]),
            reward=float(graded.rewards[b]), num_tokens=len(ids[b]), num_steps=int(graded.rollouts.num_steps[b]),
            max_completion_length=canvas.completion.shape[1],
            failure=None if graded.failures is None else graded.failures[b],
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
    """`igpo eval`: completes what is not done yet of its share of the problems, at every length of eval_lengths.

    Every completion goes into predictions.jsonl (of several processes: into a file of each) as soon as it is there. The
    process that finds all of them done prints a table with a column per length and writes evaluation.json (numbers and
    protocol) into output_dir.

    Returns:
        The numbers of the last length; none while other processes have something to do.
    Raises:
        ConfigError: settings that cannot be meant, or predictions of another protocol in the way.
    """
    validate(cfg, need=("eval_file",))
    check(cfg)
    settings = [at_length(cfg, length) for length in lengths_of(cfg)]
    require_model(cfg, "eval")
    shard = Shard.of(options)
    cfg = _placed(cfg)
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.eval_file, cfg.data, tokenizer, limit=cfg.evaluation.eval_limit)
    folder = Path(cfg.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = Path(options.predictions_file or folder / "predictions.jsonl")
    order = [key for setting in settings for key in _keys(setting, prompts)]
    with Predictions(file, shard, identity(cfg, tokenizer, prompts)) as predictions:
        _complete(cfg, tokenizer, prompts, predictions, shard)
        lines = predictions.merge(order)
    if not lines:
        say(f"eval: {predictions.file.path} is complete; other processes are not done")
        return {}
    seed = Seed(cfg.train.seed)
    found: dict[int, Metrics] = {
        length: summary([x for x in lines if x.max_completion_length == length], seed)
        for length in lengths_of(cfg)
    }
    _report(cfg, found, protocol(cfg, tokenizer, prompts), file)
    return list(found.values())[-1]


def _placed(cfg: Config) -> Config:
    """torchrun's processes take a GPU each."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or cfg.model.device != "auto" or not torch.cuda.is_available():
        return cfg
    torch.cuda.set_device(int(rank))
    return replace(cfg, model=replace(cfg.model, device=f"cuda:{rank}"))


def _keys(cfg: Config, prompts: Sequence[Prompt]) -> Iterator[Key]:
    for prompt in prompts:
        for sample in range(cfg.evaluation.num_eval_generations):
            yield cfg.rollout.max_completion_length, prompt.row_id, sample


def _complete(
    cfg: Config, tokenizer: Any, prompts: Sequence[Prompt], predictions: Predictions, shard: Shard
) -> None:
    """Adds this process's completions that are missing. Without any the model is not loaded."""
    samples = range(cfg.evaluation.num_eval_generations)
    mine = range(shard.index, len(prompts), shard.count)
    todo = {
        length: [
            (i, s) for i in mine for s in samples
            if (length, prompts[i].row_id, s) not in predictions.done
        ]
        for length in lengths_of(cfg)
    }  # fmt: skip
    total, left = len(todo) * len(mine) * len(samples), sum(map(len, todo.values()))
    if left < total:
        say(f"eval: {total - left} of {total} completions are done already")
    if not left:
        return
    grade, policy = make_grader(tokenizer, cfg.reward), build_policy(cfg, tokenizer)
    for length, units in todo.items():
        setting, name = at_length(cfg, length), f"eval, {length} tokens"
        for graded in complete(policy, tokenizer, prompts, grade, setting, units, name):
            predictions.add(_lines(graded, prompts))


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
    replace_whole(path, json.dumps(record, indent=1).encode())
    say(f"written: {path}, {predictions}")


def _shown(numbers: Metrics, name: str) -> str:
    """With its interval, if it has one."""
    text = f"{numbers[name]:.4g}"
    ends = [numbers.get(f"{name}_{end}") for end in ("low", "high")]
    return text if None in ends else f"{text} [{ends[0]:.3f}, {ends[1]:.3f}]"
