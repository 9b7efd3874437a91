"""One arm of the demo: a training run of igpo.train from the warm start, and the hint lift before it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from igpo.canvas import masked_canvases, with_hints
from igpo.config import Config
from igpo.evaluate import evaluate
from igpo.logging import RunLog
from igpo.models import MaskedDecoder
from igpo.rl.explorer import InpaintingExplorer, original_layout, triggered_groups
from igpo.rollout import denoise
from igpo.train import Run, train
from igpo.types import Canvas, Graded, Metrics, Prompt, Seed

from .recipe import CHAIN, NUM_EVAL
from .results import ArmResult, Frame, Point
from .task import Observer, grader, training_run

HELD_OUT_SEED = Seed(2)
LIFT_PROBLEMS, LIFT_SAMPLES = 128, 4
GROUPS = 64  # held-out groups behind the all-wrong fractions


@dataclass(frozen=True)
class Held:
    """Held-out accuracy at temperature 0, and the fraction of groups without a correct completion at the training
    temperature."""

    accuracy: float
    all_wrong: float


@dataclass(frozen=True)
class Lift:
    """P(correct) without hints and with IGPO's hints, at the training temperature."""

    plain: float
    hinted: float

    @property
    def ratio(self) -> float | None:
        return self.hinted / self.plain if self.plain else None


@dataclass
class Watcher:
    """Collects the course of a run; calls `then` after each step."""

    then: Observer | None = None
    steps: list[tuple[int, Graded, Metrics]] = field(default_factory=list)

    def __call__(self, step: int, graded: Graded, metrics: Metrics) -> None:
        self.steps.append((step, graded, metrics))
        if self.then is not None:
            self.then(step, graded, metrics)


def measure(policy: MaskedDecoder, cfg: Config, num_problems: int = NUM_EVAL) -> Held:
    """On held-out problems, the same at every call."""
    tokenizer, grade = CHAIN.tokenizer(), grader(CHAIN)
    problems = CHAIN.problems(num_problems, HELD_OUT_SEED, "held-out")
    greedy = evaluate(policy, tokenizer, problems, grade, cfg)
    groups = replace(
        cfg.evaluation, eval_temperature=cfg.rollout.temperature, num_eval_generations=cfg.rl.num_generations
    )  # fmt: skip
    sampled = evaluate(policy, tokenizer, problems[:GROUPS], grade, replace(cfg, evaluation=groups))
    return Held(greedy["accuracy"], 1.0 - sampled[f"pass@{cfg.rl.num_generations}"])


def hint_lift(policy: MaskedDecoder, cfg: Config, num_problems: int = LIFT_PROBLEMS) -> Lift:
    """What hints of IGPO's kind do for the policy on held-out problems."""
    problems, seed = CHAIN.problems(num_problems, Seed(3), "held-out"), Seed(4)
    plain = canvases(problems, LIFT_SAMPLES, cfg)
    inpaint = cfg.rl.inpaint
    ratios = [
        seed.generator(row).uniform(inpaint.eta_low, inpaint.eta_high)
        for row in plain.row_ids.tolist()
    ]
    layout = original_layout(
        problems, plain, torch.tensor(ratios, dtype=torch.float64), inpaint, seed
    )
    rates = [
        float(
            grader(CHAIN)(denoise(policy, canvas, cfg.rollout, seed), problems)
            .correct.float()
            .mean()
        )
        for canvas in (plain, with_hints(plain, *layout))
    ]
    return Lift(*rates)


def canvases(problems: Sequence[Prompt], num_generations: int, cfg: Config) -> Canvas:
    tokenizer = CHAIN.tokenizer()
    return masked_canvases(
        problems, num_generations=num_generations, completion_length=cfg.rollout.max_completion_length,
        mask_id=tokenizer.mask_token_id, pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id,
    )  # fmt: skip


def run_arm(
    arm: str, cfg: Config, start: MaskedDecoder, before: Held, out: Path, observe: Observer | None = None,
    num_problems: int = NUM_EVAL,
) -> ArmResult:  # fmt: skip
    """Trains a copy of `start` in out/<arm>, which gets metrics.jsonl and the last checkpoint."""
    transformers_logging.disable_progress_bar()  # of files written in milliseconds, in the middle of our lines
    cfg = replace(cfg, train=replace(cfg.train, output_dir=str(out / arm)))
    policy = copy.deepcopy(start).eval()
    held_out = CHAIN.problems(num_problems, HELD_OUT_SEED, "held-out")
    watcher = Watcher(observe)
    run = training_run(cfg, CHAIN, policy, held_out=held_out, observe=watcher)
    began = time.monotonic()
    with RunLog(cfg) as log:
        train(run, log)
    seconds = time.monotonic() - began
    after = measure(policy, cfg, num_problems)
    return ArmResult(
        name=arm,
        before=before.accuracy,
        after=after.accuracy,
        all_wrong_before=before.all_wrong,
        all_wrong_after=after.all_wrong,
        hint_success=_hint_success(watcher.steps) if _denoises_again(run) else None,
        hint_lift=hint_lift(policy, cfg, min(LIFT_PROBLEMS, num_problems)).ratio,
        points=_points(run, watcher.steps, before, seconds),
        frames=_frames(watcher.steps[-1][1]),
    )


def _denoises_again(run: Run) -> bool:
    return isinstance(run.algorithm.explorer, InpaintingExplorer)


def _hint_success(steps: Sequence[tuple[int, Graded, Metrics]]) -> float | None:
    """Of all second attempts: the fraction that verified correct."""
    tried = [
        (m["inpaint/attempt_rate"], m["inpaint/attempt_correct"])
        for _, _, m in steps
        if m.get("inpaint/attempt_rate")
    ]
    return (
        sum(rate * correct for rate, correct in tried) / sum(rate for rate, _ in tried)
        if tried
        else None
    )


def _points(
    run: Run, steps: Sequence[tuple[int, Graded, Metrics]], before: Held, seconds: float
) -> tuple[Point, ...]:
    lines = (
        (Path(run.cfg.train.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    logged = {line["step"]: line.get("eval_accuracy") for line in map(json.loads, lines)}
    second = _denoises_again(run)
    rollouts = forwards = 0
    found = []
    for step, graded, metrics in steps:
        size, groups = len(graded.rewards), graded.rollouts.canvas.group_ids.unique().numel()
        rollouts += size + round(size * metrics.get("inpaint/attempt_rate", 0.0) if second else 0)
        forwards += round(metrics["rollout/forwards"])
        found.append(
            Point(
                step=step + 1, rollouts=rollouts, forwards=forwards, seconds=seconds * (step + 1) / len(steps),
                reward=metrics["reward"], all_wrong=metrics["inpaint/groups_all_wrong"],
                unrescued=len(triggered_groups(graded, "correctness")) / groups, accuracy=logged[step],
            )
        )  # fmt: skip
    start = Point(
        0, 0, 0, 0.0, found[0].reward, found[0].all_wrong, found[0].unrescued, before.accuracy
    )
    return (start, *found)


def _frames(graded: Graded) -> tuple[Frame, ...]:
    """A rescued completion, one of the policy's own that is right, and one that is wrong, where there are such."""
    kinds = {
        "written around hints, or given": graded.rescued,
        "the policy's own, right": graded.correct & ~graded.rescued,
        "the policy's own, wrong": ~graded.correct,
    }
    rows = {title: found.nonzero()[0, 0] for title, found in kinds.items() if found.any()}
    return tuple(frame(graded, int(row), title) for title, row in rows.items())


def frame(graded: Graded, row: int, title: str) -> Frame:
    """How completion `row` was written; hints have step -1."""
    rollouts, words = graded.rollouts, CHAIN.words
    canvas = rollouts.canvas
    prompt = canvas.tokens[row, : canvas.prompt_length][
        canvas.attention_mask[row, : canvas.prompt_length]
    ]
    order = rollouts.step_map[row].masked_fill(canvas.frozen[row], -1)
    return Frame(
        prompt=" ".join(words[i] for i in prompt.tolist()),
        tokens=tuple(words[i] for i in rollouts.completion[row].tolist()),
        step_map=tuple(order.tolist()),
        correct=bool(graded.correct[row]),
        title=title,
    )
