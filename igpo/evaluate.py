"""Evaluation: completions of held-out problems, verified, with intervals and the protocol beside the number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.table import Table

from .canvas import masked_canvases
from .config import Config, ConfigError, EvalOptions
from .config_io import validate
from .data import load_prompts
from .logging import output, progress, say
from .policy import build_policy, load_tokenizer, require_model
from .rewards import Grade, make_grader
from .rollout import denoise
from .types import Graded, Metrics, Policy, Prompt, Rollouts, Seed

Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class Completion:
    """One line of predictions_file."""

    row: int
    sample: int
    prompt: str
    completion: str
    answer: str | None
    correct: bool
    reward: float
    num_tokens: int  # before the first EOS
    num_steps: int


def evaluate(
    policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], grade: Grade, cfg: Config
) -> Metrics:
    """num_eval_generations completions of every problem at eval_temperature, graded.

    Random streams belong to (seed, row of the dataset, sample), so the result does not depend on eval_batch_size.

    Returns:
        accuracy: mean over problems of the fraction of correct completions, with accuracy_low and accuracy_high,
        Wilson's 95 % interval with the number of problems (completions of a problem are not independent).
        pass@k for k = 2, 4, … up to the number of completions: the unbiased estimate 1 - C(n-c, k) / C(n, k)
        (arXiv:2107.03374, equation 1).   reward, completion_length (tokens before EOS), num_problems, forwards
        (sequences times model calls).
    """
    found = list(complete(policy, tokenizer, prompts, grade, cfg))
    lines = [line for graded in found for line in _lines(graded, prompts)]
    return {**summary(lines), "forwards": float(sum(g.rollouts.num_forwards for g in found))}


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
                mask_id=tokenizer.mask_token_id, pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id,
                device=policy.head_weight.device,
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
    lengths = completion_lengths(graded.rollouts)
    for b, group in enumerate(groups.tolist()):
        prompt = prompts[group]
        yield Completion(
            row=prompt.row_id, sample=int((groups[:b] == group).sum()), prompt=prompt.text,
            completion=graded.completions[b], answer=prompt.answer, correct=bool(graded.correct[b]),
            reward=float(graded.rewards[b]), num_tokens=lengths[b], num_steps=int(graded.rollouts.num_steps[b]),
        )  # fmt: skip


def completion_lengths(rollouts: Rollouts) -> list[int]:
    """Tokens before the first EOS, of every row."""
    eos = rollouts.canvas.eos_id
    rows = rollouts.completion.tolist()
    return [row.index(eos) if eos in row else len(row) for row in rows]


def summary(lines: Sequence[Completion]) -> dict[str, float]:
    """The numbers of `evaluate` that follow from its completions."""
    per_problem: dict[int, list[bool]] = {}
    for line in lines:
        per_problem.setdefault(line.row, []).append(line.correct)
    rates = [sum(verdicts) / len(verdicts) for verdicts in per_problem.values()]
    samples = min(map(len, per_problem.values()))
    accuracy = sum(rates) / len(rates)
    low, high = wilson(accuracy, len(rates))
    numbers = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    for k in (2**i for i in range(1, samples.bit_length())):
        found = [pass_at_k(len(v), sum(v), k) for v in per_problem.values()]
        numbers[f"pass@{k}"] = sum(found) / len(found)
    return {
        **numbers,
        "reward": sum(line.reward for line in lines) / len(lines),
        "completion_length": sum(line.num_tokens for line in lines) / len(lines),
        "num_problems": float(len(rates)),
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n completions, c of them correct, hold a correct one.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction of n trials."""
    middle = rate + Z * Z / (2 * n)
    half = Z * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


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
    """`igpo eval`: prints a table, writes evaluation.json (numbers and protocol) into output_dir, and every completion
    into predictions_file when one is named."""
    validate(cfg, need=("eval_file",))
    check(cfg)
    require_model(cfg, "eval")
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.eval_file, cfg.data, tokenizer, limit=cfg.evaluation.eval_limit)
    grade, policy = make_grader(tokenizer, cfg.reward), build_policy(cfg, tokenizer)
    lines, forwards = [], 0
    with ExitStack() as stack:
        stream = _opened(options.predictions_file, stack)
        for graded in complete(policy, tokenizer, prompts, grade, cfg):
            found = list(_lines(graded, prompts))
            lines, forwards = lines + found, forwards + graded.rollouts.num_forwards
            if stream is not None:
                stream.writelines(json.dumps(asdict(line)) + "\n" for line in found)
                stream.flush()
    metrics = {**summary(lines), "forwards": float(forwards)}
    _report(cfg, metrics)
    return metrics


def _opened(path: str | None, stack: ExitStack) -> TextIO | None:
    if path is None:
        return None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(open(path, "w", encoding="utf-8"))


def protocol(cfg: Config) -> dict[str, Any]:
    """What a reader must know to get the same number again."""
    return {
        "model_name_or_path": cfg.model.model_name_or_path,
        "eval_file": cfg.data.eval_file,
        "eval_limit": cfg.evaluation.eval_limit,
        "max_completion_length": cfg.rollout.max_completion_length,
        "block_length": cfg.rollout.block_length,
        "diffusion_steps": cfg.rollout.diffusion_steps,
        "remasking": cfg.rollout.remasking,
        "temperature": cfg.evaluation.eval_temperature,
        "num_eval_generations": cfg.evaluation.num_eval_generations,
        "seed": cfg.train.seed,
        "verification": "answer after the last ####, else the last \\boxed{}, else the last number; numbers are exact",
    }


def _report(cfg: Config, metrics: Metrics) -> None:
    table = Table("", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    output.print(table)
    path = Path(cfg.train.output_dir) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"metrics": dict(metrics), "protocol": protocol(cfg)}
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    say(f"written: {path}")
