"""Masked supervised fine-tuning at the canvas length of reinforcement learning (length-aligned SFT)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from . import checkpoint
from .canvas import masked_canvases
from .checkpoint import State
from .config import Config, ConfigError
from .config_io import validate
from .data import Batches, DataError, batches, load_prompts
from .logging import RunLog, progress, run_log, say_start
from .models import Absorbing
from .models.packing import first_fit_decreasing
from .ops import linear_masked_cross_entropy
from .optim import Updater
from .policy import as_scored, build_policy, load_tokenizer
from .ranks import process_group, ranks
from .types import BlockPolicy, Canvas, Metrics, Policy, Prompt, Seed, take

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
    block_length: int | None = None,
) -> Examples:
    """Puts each trace on a canvas of max_completion_length tokens, EOS to its end, and masks a fraction t of it.

    Everything may be masked, as in a rollout; without train_on_eos_padding only the tokens up to the first EOS are
    learned (LLaDA learns all of them: that is how it learns to stop). With drop_eos_padding what follows that EOS (its
    block, of a policy with blocks of block_length) is not on the canvas: it becomes padding, and L what is left.
    t = sft_epsilon + (1 - sft_epsilon) u, where the u of a batch are one uniform shift of B evenly spaced points in
    random order: each is uniform, together they cover [0, 1]. Weights, for B rows of n learned tokens on a canvas of L:

        1/t: each token with probability t, weight 1 / (t n B)         (arXiv:2502.09992, equation 5)
        L/l: exactly l = max(1, round(t L)) tokens, weight L / (l n B) (its equation 6, of lower variance)
        none: each token with probability t, weight 1 / (masked learned tokens of the batch)

    Raises:
        DataError: a prompt has no trace, or one longer than the canvas.
    """
    check_traces(prompts, cfg.rollout.max_completion_length)
    lengths = torch.tensor([completion_length(p, cfg, block_length) for p in prompts])
    width, eos = int(lengths.max()), tokenizer.eos_token_id
    canvas = masked_canvases(
        prompts, num_generations=1, completion_length=width, mask_id=tokenizer.mask_token_id,
        pad_id=tokenizer.pad_token_id, eos_id=eos,
    )  # fmt: skip
    targets = torch.tensor([[*p.trace_ids, *[eos] * (width - len(p.trace_ids))] for p in prompts])
    present = torch.arange(width) < lengths[:, None]
    learned = present
    if not cfg.sft.train_on_eos_padding:
        learned = torch.arange(width) < torch.tensor([[len(p.trace_ids)] for p in prompts])
    t, noise = _mask_ratios(len(prompts), cfg.sft.sft_epsilon, seed), seed.named("mask")
    exact = cfg.sft.sft_weighting == "L/l"
    if exact:
        t = (lengths * t).round().clamp(min=1) / lengths
    noisy, masked = Absorbing(canvas.mask_id).corrupt(
        targets, present, t, seed=noise.value, step=noise.step, row_ids=canvas.row_ids, exact=exact
    )
    prompt = canvas.prompt_length
    canvas = replace(
        canvas,
        tokens=torch.cat((canvas.tokens[:, :prompt], noisy), 1),
        attention_mask=torch.cat((canvas.attention_mask[:, :prompt], present), 1),
    )
    scored = masked & learned
    weight = _weights(cfg.sft.sft_weighting, t, learned.sum(1), scored)
    return _moved(Examples(canvas, targets, scored, weight), device)


def completion_length(prompt: Prompt, cfg: Config, block_length: int | None) -> int:
    """Tokens of its completion that are on the canvas."""
    longest = cfg.rollout.max_completion_length
    if not cfg.sft.drop_eos_padding:
        return longest
    before, own, block = len(prompt.ids), len(prompt.trace_ids), block_length or 1
    return min(longest, -(-(before + own) // block) * block - before)


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


def sft_loss(policy: Policy, examples: Examples, *, beside_clean: bool = False) -> Tensor:
    """() float32: the weighted cross-entropy of the masked tokens; a sum over rows, so that the losses of parts of a
    batch add up to the loss of the batch.

    beside_clean: of a block-causal policy, every block is read behind the clean blocks before it (arXiv:2503.09573).
    All weightings keep their expectation: t and l cover each block as they cover the whole.
    """
    canvas, masked = examples.canvas, examples.masked
    place = canvas.attention_mask, canvas.position_ids
    if beside_clean:
        clean = torch.cat((canvas.tokens[:, : canvas.prompt_length], examples.targets), 1)
        hidden = cast(BlockPolicy, policy).hidden_of_blocks(canvas.tokens, clean, *place)
    else:
        hidden = policy.hidden(canvas.tokens, *place)
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

    def noisy(self, prompts: Sequence[Prompt], seed: Seed) -> Examples:
        policy = self.policy
        return noisy_examples(
            prompts, self.cfg, self.tokenizer, seed, policy.device, policy.block_length
        )


def set_up(cfg: Config) -> Run:
    """Raises ConfigError or ValueError before anything runs."""
    validate(cfg, need=("train_file",))
    _check(cfg)
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    folder = checkpoint.find(cfg)
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    held_out: list[Prompt] = []
    if cfg.train.eval_steps:
        limit = cfg.evaluation.eval_limit
        held_out = load_prompts(cfg.data.eval_file, cfg.data, tokenizer, limit=limit)
    for some in (prompts, held_out):
        check_traces(some, cfg.rollout.max_completion_length)
    policy = build_policy(cfg, tokenizer)
    _check_packing([*prompts, *held_out], cfg, policy.block_length)
    updater = Updater(policy, cfg.train, cfg.train.max_steps)
    state = checkpoint.restore(folder, policy, updater, cfg) if folder else State()
    order = batches(prompts, cfg.sft.sft_batch_size, Seed(cfg.train.seed))
    return Run(cfg, policy, tokenizer, order, updater, held_out, state)


def _check(cfg: Config) -> None:
    if cfg.sft.sft_weighting not in WEIGHTINGS:
        raise ConfigError(
            f"sft_weighting must be one of {', '.join(WEIGHTINGS)}, got {cfg.sft.sft_weighting!r}."
        )
    if not 0 < cfg.sft.sft_epsilon < 1:
        raise ConfigError(f"sft_epsilon must lie in (0, 1), got {cfg.sft.sft_epsilon}.")
    if cfg.sft.drop_eos_padding and cfg.sft.train_on_eos_padding:
        raise ConfigError(
            "train_on_eos_padding must be false when drop_eos_padding is true, got True: there is none left to learn."
        )


def _check_packing(prompts: Sequence[Prompt], cfg: Config, block_length: int | None) -> None:
    if not cfg.train.packing:
        return
    lengths = [len(p.ids) + completion_length(p, cfg, block_length) for p in prompts]
    capacity = max_packed_length(cfg)
    if max(lengths) > capacity:
        raise ConfigError(
            f"max_packed_length must hold the longest sequence, {max(lengths)} tokens, got {capacity}. "
            "Sequences are never cut."
        )


def fit(run: Run, log: RunLog) -> Metrics:
    """The loop. Raises TrainingError when a loss or a gradient is not finite, before the update."""
    cfg, last = run.cfg, {}
    num_tokens = run.state.counters.get("num_tokens", 0.0)
    with progress(cfg.train.max_steps - run.state.step, "sft") as advance:
        for step in range(run.state.step, cfg.train.max_steps):
            began, done = time.monotonic(), step + 1
            seed = Seed(cfg.train.seed).named("sft").at(step)
            examples = run.noisy(run.batches.at(step), seed)
            metrics = update(run, examples, f"step {step}")
            real = examples.canvas.attention_mask
            metrics["frac_padding"] = 1 - float(real.float().mean())
            num_tokens += float(real.sum())
            final = done == cfg.train.max_steps
            held_out = {}
            if run.held_out and done % cfg.train.eval_steps == 0:
                held_out = {"eval_loss": held_out_loss(run)}
            if done % cfg.train.logging_steps == 0 or held_out or final:
                took = time.monotonic() - began
                counts = {"num_tokens": num_tokens, "epoch": done / run.batches.steps_per_epoch}
                last = {**metrics, **counts, "step_time": took, **held_out}
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


def losses(run: Run, examples: Examples, rows: Tensor) -> Iterator[Tensor]:
    """The loss of one forward after the other; those of all processes add up to that of `rows`."""
    policy = as_scored(run.policy, run.cfg)
    parts = ranks().parts(rows, run.cfg.train.per_device_train_batch_size)
    if run.cfg.train.packing:
        own = ranks().own(rows)
        lengths = examples.canvas.attention_mask.sum(1)[own.to(run.policy.device)].tolist()
        capacity = max_packed_length(run.cfg)
        parts = [own[packed] for packed in first_fit_decreasing(lengths, capacity)]
    beside_clean = run.cfg.sft.beside_clean and run.policy.block_length is not None
    for part in parts:
        some = take(examples, part.to(examples.targets.device))
        yield sft_loss(policy, some, beside_clean=beside_clean)


def max_packed_length(cfg: Config) -> int:
    """The longest row of packed sequences, in tokens."""
    canvas = cfg.data.max_prompt_length + cfg.rollout.max_completion_length
    longest = cfg.train.per_device_train_batch_size * canvas
    return longest if cfg.sft.max_packed_length is None else cfg.sft.max_packed_length


def _backward(run: Run, examples: Examples, rows: Tensor) -> float:
    total = 0.0
    for loss in losses(run, examples, rows):
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
        examples = run.noisy(some, seed.at(number))
        parts = losses(run, examples, torch.arange(len(some)))
        total += sum(float(loss) for loss in parts) * len(some)
    return ranks().added({"loss": total})["loss"] / len(run.held_out)
