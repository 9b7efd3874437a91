"""Masked supervised fine-tuning at the canvas length of reinforcement learning (length-aligned SFT)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .canvas import masked_canvases
from .checkpoint import State
from .config import Config, ConfigError
from .config_io import validate
from .data import Batches, DataError, batches, load_prompts
from .logging import RunLog, progress, run_log, say_start
from .ops import forward_mask, linear_masked_cross_entropy
from .optim import Updater
from .policy import build_policy, load_tokenizer
from .ranks import process_group, ranks
from .types import Canvas, Metrics, Policy, Prompt, Seed, take

WEIGHTINGS = ("1/t", "L/l", "none")


@dataclass(frozen=True)
class Examples:
    """A batch of worked solutions under noise.

    canvas: its tokens hold the noisy completions.   targets: (B, L) int64, the clean ones.   masked: (B, L) bool, the
    masked tokens that are learned.
    weight: (B,) float32: the loss is the sum over masked tokens of weight times cross-entropy.
    """

    canvas: Canvas
    targets: Tensor
    masked: Tensor
    weight: Tensor


def noisy_examples(
    prompts: Sequence[Prompt],
    cfg: Config,
    tokenizer: Any,
    seed: Seed,
    device: torch.device | str = "cpu",
) -> Examples:
    """Puts each trace on a canvas of max_completion_length tokens, EOS to its end, and masks a fraction t of it.

    Everything may be masked, as in a rollout; without train_on_eos_padding only the tokens up to the first EOS are
    learned (LLaDA learns all of them: that is how it learns to stop). t = sft_epsilon + (1 - sft_epsilon) u, where the
    u of a batch are one uniform shift of B evenly spaced points in random order: each is uniform, together they cover
    [0, 1]. Weights, for B rows of n learned tokens on a canvas of L:

        1/t: each token with probability t, weight 1 / (t n B)         (arXiv:2502.09992, equation 5)
        L/l: exactly l = max(1, round(t L)) tokens, weight L / (l n B) (its equation 6, of lower variance)
        none: each token with probability t, weight 1 / (masked learned tokens of the batch)

    Raises:
        DataError: a prompt has no trace, or one longer than the canvas.
    """
    length, eos = cfg.rollout.max_completion_length, tokenizer.eos_token_id
    canvas = masked_canvases(
        prompts, num_generations=1, completion_length=length, mask_id=tokenizer.mask_token_id,
        pad_id=tokenizer.pad_token_id, eos_id=eos,
    )  # fmt: skip
    check_traces(prompts, length)
    rows = [[*p.trace_ids, *[eos] * (length - len(p.trace_ids))] for p in prompts]
    targets, learned = torch.tensor(rows), torch.ones(len(prompts), length, dtype=torch.bool)
    if not cfg.sft.train_on_eos_padding:
        learned = torch.arange(length) < torch.tensor([[len(p.trace_ids)] for p in prompts])
    t, noise = _mask_ratios(len(prompts), cfg.sft.sft_epsilon, seed), seed.named("mask")
    exact = cfg.sft.sft_weighting == "L/l"
    if exact:
        t = (length * t).round().clamp(min=1) / length
    noisy, masked = forward_mask(
        targets, torch.ones_like(learned), t, mask_id=canvas.mask_id, seed=noise.value, step=noise.step,
        row_ids=canvas.row_ids, exact=exact,
    )  # fmt: skip
    tokens = torch.cat((canvas.tokens[:, : canvas.prompt_length], noisy), 1)
    scored = masked & learned
    weight = _weights(cfg.sft.sft_weighting, t, learned.sum(1), scored)
    return _moved(Examples(replace(canvas, tokens=tokens), targets, scored, weight), device)


def check_traces(prompts: Sequence[Prompt], length: int) -> None:
    """Raises DataError unless every prompt has a trace that fits on the canvas."""
    for prompt in prompts:
        if not 0 < len(prompt.trace_ids) <= length:
            got = f"{len(prompt.trace_ids)} tokens" if prompt.trace_ids else "no trace"
            raise DataError(
                f"sft: the trace of dataset row {prompt.row_id} must have 1 to max_completion_length={length} tokens "
                f"(EOS included), got {got}. Raise max_completion_length or remove the row; traces are never cut."
            )


def _mask_ratios(rows: int, epsilon: float, seed: Seed) -> Tensor:
    rng = seed.named("ratio").generator()
    u = (torch.from_numpy(rng.permutation(rows)).double() + rng.random()) / rows
    return epsilon + (1 - epsilon) * u


def _weights(weighting: str, t: Tensor, sizes: Tensor, scored: Tensor) -> Tensor:
    if weighting == "none":
        return (torch.ones_like(t) / scored.sum().clamp(min=1)).float()
    return (1 / (t * sizes * len(t))).float()


def _moved(examples: Examples, device: torch.device | str) -> Examples:
    canvas = replace(
        examples.canvas,
        tokens=examples.canvas.tokens.to(device),
        attention_mask=examples.canvas.attention_mask.to(device),
        position_ids=examples.canvas.position_ids.to(device),
    )
    return Examples(
        canvas, *(x.to(device) for x in (examples.targets, examples.masked, examples.weight))
    )


def sft_loss(policy: Policy, examples: Examples) -> Tensor:
    """() float32: the weighted cross-entropy of the masked tokens; a sum over rows, so that the losses of parts of a
    batch add up to the loss of the batch."""
    canvas, masked = examples.canvas, examples.masked
    hidden = policy.hidden(canvas.tokens, canvas.attention_mask, canvas.position_ids)
    return linear_masked_cross_entropy(
        hidden[:, canvas.prompt_length :][masked],
        policy.head_weight,
        examples.targets[masked],
        weights=examples.weight[:, None].expand_as(masked)[masked],
        bias=policy.head_bias,
    )


def run(cfg: Config) -> Metrics:
    """`igpo sft`: max_steps updates of sft_batch_size examples each. Returns the metrics logged last."""
    with process_group():
        ready = set_up(cfg)
        with run_log(cfg, ready.state.step) as log:
            say_start("sft", ready.policy, cfg.train, ready.state.step)
            return fit(ready, log)


@dataclass(frozen=True)
class Run:
    """All that a run consists of."""

    cfg: Config
    policy: Any
    tokenizer: Any
    batches: Batches
    updater: Updater
    held_out: Sequence[Prompt]
    state: State


def set_up(cfg: Config) -> Run:
    """Raises ConfigError or ValueError before anything runs."""
    validate(cfg, need=("train_file",))
    if cfg.sft.sft_weighting not in WEIGHTINGS:
        raise ConfigError(
            f"sft_weighting must be one of {', '.join(WEIGHTINGS)}, got {cfg.sft.sft_weighting!r}."
        )
    if not 0 < cfg.sft.sft_epsilon < 1:
        raise ConfigError(f"sft_epsilon must lie in (0, 1), got {cfg.sft.sft_epsilon}.")
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    folder = checkpoint.find(cfg)
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    check_traces(prompts, cfg.rollout.max_completion_length)
    held_out: list[Prompt] = []
    if cfg.train.eval_steps:
        limit = cfg.evaluation.eval_limit
        held_out = load_prompts(cfg.data.eval_file, cfg.data, tokenizer, limit=limit)
        check_traces(held_out, cfg.rollout.max_completion_length)
    policy = build_policy(cfg, tokenizer)
    updater = Updater(policy, cfg.train, cfg.train.max_steps)
    state = checkpoint.restore(folder, policy, updater, cfg) if folder else State()
    order = batches(prompts, cfg.sft.sft_batch_size, Seed(cfg.train.seed))
    return Run(cfg, policy, tokenizer, order, updater, held_out, state)


def fit(run: Run, log: RunLog) -> Metrics:
    """The loop. Raises TrainingError when a loss or a gradient is not finite, before the update."""
    cfg, last = run.cfg, {}
    num_tokens = run.state.counters.get("num_tokens", 0.0)
    with progress(cfg.train.max_steps - run.state.step, "sft") as advance:
        for step in range(run.state.step, cfg.train.max_steps):
            began, done = time.monotonic(), step + 1
            seed = Seed(cfg.train.seed).named("sft").at(step)
            examples = noisy_examples(
                run.batches.at(step), cfg, run.tokenizer, seed, run.policy.device
            )
            metrics = update(run, examples, f"step {step}")
            num_tokens += float(examples.canvas.attention_mask.sum())
            final = done == cfg.train.max_steps
            held_out = {}
            if run.held_out and done % cfg.train.eval_steps == 0:
                held_out = {"eval_loss": held_out_loss(run)}
            if done % cfg.train.logging_steps == 0 or held_out or final:
                took = time.monotonic() - began
                last = {**metrics, "num_tokens": num_tokens, "step_time": took, **held_out}
                log.log(step, last)
            if final or (cfg.train.save_steps and done % cfg.train.save_steps == 0):
                state = State(done, {"num_tokens": num_tokens})
                checkpoint.save(run.policy, run.tokenizer, run.updater, cfg, state)
            advance(**{"loss": metrics["loss"], **held_out})
    return last


def update(run: Run, examples: Examples, where: str) -> dict[str, float]:
    """One optimizer update, per_device_train_batch_size rows at a time."""
    everything = torch.arange(len(examples.targets))
    loss = _backward(run, examples, everything)
    done = run.updater.step(loss, where, lambda: _culprits(run, examples))
    return {"loss": loss, **done}


def _backward(run: Run, examples: Examples, rows: Tensor) -> float:
    total = 0.0
    for part in ranks().parts(rows, run.cfg.train.per_device_train_batch_size):
        loss = sft_loss(run.policy, take(examples, part.to(examples.targets.device)))
        loss.backward()
        total += float(loss.detach())
    return ranks().added({"loss": total})["loss"]


def _culprits(run: Run, examples: Examples) -> list[int]:
    """Dataset rows whose loss or gradient is not finite by itself; all when only their sum is not."""

    def fails(row: Tensor) -> bool:
        run.updater.zero_grad()
        loss = _backward(run, examples, row)
        return not torch.isfinite(torch.tensor([loss, run.updater.gradient_norm()])).all()

    everything = torch.arange(len(examples.targets))
    rows = [row for row in everything if fails(row[None])] or list(everything)
    return [int(examples.canvas.row_ids[row]) >> 20 for row in rows]


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """The loss on the held-out problems, always under the same noise."""
    size, total = run.cfg.sft.sft_batch_size, 0.0
    seed = Seed(run.cfg.train.seed).named("held out")
    for number, start in enumerate(range(0, len(run.held_out), size)):
        some = run.held_out[start : start + size]
        examples = noisy_examples(some, run.cfg, run.tokenizer, seed.at(number), run.policy.device)
        total += float(sft_loss(run.policy, examples)) * len(some)
    return total / len(run.held_out)
