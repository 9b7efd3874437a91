"""Training: Algorithm 1 of IGPO (arXiv:2509.10396), and of every other composition in igpo/rl/algorithms.py.

`train` is the algorithm; what it needs is made by `set_up` below it. Under torchrun every process runs it on one device
(ranks.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from . import checkpoint, metrics
from .canvas import GENERATIONS_PER_PROMPT, masked_canvases
from .checkpoint import State
from .config import Config
from .config_io import validate
from .critic import Critic, build_critic
from .data import batches, load_prompts
from .evaluate import check, evaluate
from .logging import RunLog, completions_table, console, progress, run_log, say_start
from .optim import TrainingError, Updater, failing_rows
from .policy import Reference, as_scored, build_policy, canvas_ids, load_tokenizer, reference_of
from .ranks import process_group, ranks
from .rewards import make_grader
from .rewards.shared import over_processes
from .rl.algorithms import Algorithm, Grade, build_algorithm
from .rl.critique import Lesson
from .rl.explorer import SECOND_ATTEMPT
from .rl.gradient import accumulate
from .rl.pairs import check_pairs, graded_pairs, has_pairs
from .rollout import denoise
from .types import Canvas, Graded, Metrics, PolicyBatch, Prompt, Rollouts, Seed

SHOWN = ("reward", "loss", "grad_norm")  # beside the progress bar


class Batches(Protocol):
    def at(self, step: int) -> Sequence[Prompt]:
        """The prompts of a step: a function of the step alone, so that a run can be resumed."""
        ...


@dataclass(frozen=True)
class Run:
    """All that a training run consists of."""

    cfg: Config
    policy: Any  # a Policy that is also a torch module
    tokenizer: Any
    batches: Batches
    grade: Grade
    algorithm: Algorithm
    reference: Reference | None
    updater: Updater
    evaluate: Callable[[], Metrics] | None = None  # on held-out problems, every eval_steps
    state: State = field(default_factory=State)  # where a resumed run goes on
    observe: Callable[[int, Graded, Metrics], None] | None = (
        None  # after each step: what was learned from
    )
    critic: Critic | None = None  # build_critic(cfg, policy, algorithm)

    def __post_init__(self) -> None:
        if self.algorithm.critique is not None and self.critic is None:
            raise ValueError(
                f"Run: critic must be given for algorithm {self.cfg.rl.algorithm!r}, got None. "
                "Pass critic=igpo.critic.build_critic(cfg, policy, algorithm)."
            )


def train(run: Run, log: RunLog) -> Metrics:
    """max_steps steps of the algorithm, from run.state on. Returns the metrics logged last.

    Raises:
        TrainingError: a loss, a gradient or logits are not finite; the weights are those before the update.
    """
    cfg, policy, algorithm = run.cfg, run.policy, run.algorithm
    with _Book(run, log) as book:
        for step in range(run.state.step, cfg.train.max_steps):
            seed = Seed(cfg.train.seed).at(step)
            prompts = run.batches.at(step)

            # sample G completions of every prompt from the policy, and grade them
            graded = collect(run, prompts, seed)

            # IGPO: a group with no correct completion gets some that are generated around hints from the trace
            rescued = algorithm.explorer(policy, prompts, graded, seed)
            advantages = algorithm.advantage(rescued)

            # score the completions under the old policy and the reference; a critic, if any, judges their steps
            batch = algorithm.likelihood.prepare(
                as_scored(policy, cfg), rescued, seed, run.reference
            )
            credit, lessons, judged = judge(run, prompts, rescued, batch, advantages, seed)

            # then update the policy mu times, and the critic with it
            updates = []
            for inner in range(cfg.rl.num_iterations):
                where = f"step {step}, inner update {inner}"
                weights = algorithm.reweigh(rescued, batch, credit, inner)
                done = update(run, batch, weights, inner, where)
                updates.append({**judged, **done, **teach(run, lessons, where)})
            book.end(step, prompts, graded, rescued, advantages, updates)
    return book.last


def collect(run: Run, prompts: Sequence[Prompt], seed: Seed) -> Graded:
    """The completions to learn from, graded: the policy's own, or the pairs of a preference dataset."""
    options = _canvas_options(run)
    if has_pairs(prompts):
        canvas = masked_canvases(prompts, **{**options, "num_generations": 2})
        return graded_pairs(prompts, canvas, run.cfg.rollout)
    rollouts = sample(run, masked_canvases(prompts, **options), seed)
    return run.grade(rollouts, prompts)


def sample(run: Run, canvas: Canvas, seed: Seed) -> Rollouts:
    """Completions of the policy; a critic may choose among several on the way."""
    cfg, critique = run.cfg.rollout, run.algorithm.critique
    if run.critic is None or critique is None:
        return denoise(run.policy, canvas, cfg, seed)
    return critique.roll_out(run.critic.network, run.policy, canvas, cfg, seed)


def judge(
    run: Run, prompts: Sequence[Prompt], graded: Graded, batch: PolicyBatch, advantages: Tensor, seed: Seed
) -> tuple[Tensor, tuple[Lesson, ...], Metrics]:  # fmt: skip
    """The advantages as the critic sees them, and what it is to learn from; without one the advantages as they are."""
    critique = run.algorithm.critique
    if run.critic is None or critique is None:
        return advantages, (), {}
    network, policy = run.critic.network, as_scored(run.policy, run.cfg)
    return critique.judge(network, policy, prompts, graded, batch, advantages, seed)


def teach(run: Run, lessons: Sequence[Lesson], where: str) -> Metrics:
    """One optimizer update of the critic, where there is one."""
    critique = run.algorithm.critique
    if run.critic is None or critique is None:
        return {}
    return run.critic.update(critique, lessons, where, _row_name)


def update(run: Run, batch: PolicyBatch, advantages: Tensor, inner: int, where: str) -> Metrics:
    """One optimizer update from the loss of inner update `inner` over the whole batch."""
    rows = run.algorithm.objective.rows(advantages)
    loss, found = backward(run, batch, advantages, inner, rows)
    done = run.updater.step(loss, where, lambda: culprits(run, batch, advantages, inner))
    return {"loss": loss, **found, **done}


def backward(
    run: Run, batch: PolicyBatch, advantages: Tensor, inner: int, rows: Tensor
) -> tuple[float, Metrics]:
    """Adds the gradient of the batch's loss that comes from `rows`, per_device_train_batch_size rows at a time.

    The loss is a sum over rows by a divisor of the whole batch, so the size of the micro-batches only sets the memory
    needed.
    """
    total = {"loss": 0.0}
    size, policy = run.cfg.train.per_device_train_batch_size, as_scored(run.policy, run.cfg)
    for loss, found in accumulate(run.algorithm, policy, batch, advantages, inner, rows, size):
        metrics.add(total, {"loss": loss, **found})
    total = ranks().added(total)
    return total.pop("loss"), total


def culprits(run: Run, batch: PolicyBatch, advantages: Tensor, inner: int) -> list[str]:
    """The rows whose loss or gradient is not finite by itself; all rows when only their sum is not."""

    def fails(rows: Tensor) -> bool:
        run.updater.zero_grad()
        loss, _ = backward(run, batch, advantages, inner, rows)
        return not torch.isfinite(torch.tensor([loss, run.updater.gradient_norm()])).all()

    rows = torch.arange(len(advantages), device=batch.canvas.row_ids.device)
    found = failing_rows(fails, rows, run.cfg.train.per_device_train_batch_size)
    return [_row_name(row_id) for row_id in batch.canvas.row_ids[found].tolist()]


def _row_name(row_id: int) -> str:
    problem, place = divmod(row_id, GENERATIONS_PER_PROMPT)
    attempt, completion = divmod(place, SECOND_ATTEMPT)
    return f"{'hinted ' if attempt else ''}completion {completion} of dataset row {problem}"


def run(cfg: Config) -> Metrics:
    """`igpo train`: everything from the configuration. Returns the metrics of the last step."""
    with process_group():
        ready = set_up(cfg)
        with run_log(cfg, ready.state.step) as log:
            say_start(cfg.rl.algorithm, ready.policy, cfg.train, ready.state.step)
            return train(ready, log)


def set_up(cfg: Config) -> Run:
    """The parts of a run, resumed where cfg says so. Raises ConfigError or ValueError before anything runs."""
    validate(cfg, need=("train_file",))
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    folder = checkpoint.find(cfg)
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    grade = over_processes(make_grader(tokenizer, cfg.reward))
    algorithm = build_algorithm(cfg.rl, cfg.rollout, grade, pad_id=tokenizer.pad_token_id)
    if has_pairs(prompts):
        check_pairs(prompts, algorithm, cfg.rollout.max_completion_length, tokenizer.eos_token_id)
    policy = build_policy(cfg, tokenizer)
    algorithm.likelihood.check(policy)
    # before a checkpoint's weights are loaded
    critic = build_critic(cfg, policy, algorithm)
    reference = reference_of(policy, cfg) if algorithm.likelihood.needs_reference else None
    updater = Updater(policy, cfg.train, cfg.train.max_steps * cfg.rl.num_iterations)
    state = checkpoint.restore(folder, policy, updater, cfg, critic) if folder else State()
    order = batches(prompts, cfg.train.prompts_per_step, Seed(cfg.train.seed))
    held_out = _evaluation(cfg, policy, tokenizer, grade) if cfg.train.eval_steps else None
    return Run(
        cfg, policy, tokenizer, order, grade, algorithm, reference, updater, held_out, state, critic=critic
    )  # fmt: skip


def _evaluation(cfg: Config, policy: Any, tokenizer: Any, grade: Grade) -> Callable[[], Metrics]:
    check(cfg)
    limit = cfg.evaluation.eval_limit
    held_out = load_prompts(cfg.data.eval_file, cfg.data, tokenizer, limit=limit)
    return partial(evaluate, policy, tokenizer, held_out, grade, cfg)


def _canvas_options(run: Run) -> dict[str, Any]:
    tokenizer, cfg = run.tokenizer, run.cfg
    return {
        "num_generations": cfg.rl.num_generations,
        "completion_length": cfg.rollout.max_completion_length,
        "device": run.policy.device,
        **canvas_ids(tokenizer),
    }


class _Book:
    """What surrounds the algorithm: progress, metrics, evaluation, log, checkpoints, the step in error messages."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self.run, self.log = run, log
        self.num_tokens = run.state.counters.get("num_tokens", 0.0)
        self.recent: list[Metrics] = []  # of the steps since the last line of the log
        self.last: Metrics = {}
        self.step, self.began = run.state.step, time.monotonic()
        self.progress = progress(run.cfg.train.max_steps - run.state.step, "train")

    def __enter__(self) -> _Book:
        self.advance = self.progress.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.progress.__exit__(kind, error, traceback)
        if isinstance(error, FloatingPointError):
            raise TrainingError(f"step {self.step}: {error}") from error

    def end(
        self, step: int, prompts: Sequence[Prompt], graded: Graded, rescued: Graded, advantages: Tensor,
        updates: Sequence[Metrics],
    ) -> None:  # fmt: skip
        """Writes what is due after `step`."""
        cfg, done = self.run.cfg.train, step + 1
        self.num_tokens += float(graded.rollouts.canvas.attention_mask.sum())
        self.recent.append(self._of_step(graded, rescued, updates))
        if self.run.observe:
            self.run.observe(step, rescued, self.recent[-1])
        last = done == cfg.max_steps
        held_out: Metrics = {}
        if self.run.evaluate and _due(done, cfg.eval_steps):
            held_out = {f"eval_{key}": value for key, value in self.run.evaluate().items()}
        if _due(done, cfg.logging_steps) or held_out or last:
            totals = {"num_tokens": self.num_tokens, "learning_rate": updates[-1]["learning_rate"]}
            self.last = {**metrics.mean(self.recent), **totals, **held_out}
            self.log.log(step, self.last)
            self.recent = []
            if cfg.log_completions:
                console.print(completions_table(rescued, prompts, advantages))
        if _due(done, cfg.save_steps) or last:
            state = State(done, {"num_tokens": self.num_tokens})
            run = self.run
            checkpoint.save(run.policy, run.tokenizer, run.updater, run.cfg, state, run.critic)
        self.advance(**{key: self.last[key] for key in SHOWN if key in self.last})
        self.step, self.began = done, time.monotonic()

    def _of_step(self, graded: Graded, rescued: Graded, updates: Sequence[Metrics]) -> Metrics:
        return {
            **metrics.of_rewards(graded),
            **metrics.of_rollouts(graded.rollouts),
            **rescued.metrics,
            **metrics.mean(updates),
            "rollout/forwards": float(rescued.rollouts.num_forwards),
            **metrics.peak_memory(self.run.policy.device),
            "step_time": time.monotonic() - self.began,
        }


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
