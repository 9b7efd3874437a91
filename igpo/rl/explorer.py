"""Explorers: what happens between grading and advantages. GRPO, sample-matched GRPO and IGPO differ here alone.

An explorer is a function (policy, prompts, graded, seed) -> graded. It may put other rows in the place of rolled-out
ones; it marks them in `rescued` and adds what they cost to `num_forwards`. Its random streams hang under
seed.named("inpaint") and touch no other, so a step in which it replaces nothing is bitwise the step without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from igpo.canvas import with_hints
from igpo.config import InpaintConfig, RolloutConfig
from igpo.ops import sample_hint_mask
from igpo.rollout import denoise
from igpo.types import Canvas, Graded, Policy, Prompt, Rollouts, Seed, put, take

from .traces import fits, written

Explorer = Callable[[Policy, Sequence[Prompt], Graded, Seed], Graded]
Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]
Layout = Callable[
    [Sequence[Prompt], Canvas, Tensor, InpaintConfig, Seed], tuple[Tensor, Tensor]
]  # (prompts, canvas, ratios (B,), cfg, seed) -> hints (B, L) int64, hint_mask (B, L) bool

# a prompt owns 2**20 row ids; second attempts use the upper half, so that no two rows of a batch share one
SECOND_ATTEMPT = 1 << 19


def no_exploration(policy: Policy, prompts: Sequence[Prompt], graded: Graded, seed: Seed) -> Graded:
    """GRPO: the graded rollouts as they are; only counts the groups that IGPO would look at."""
    return _with_metrics(graded, {"inpaint/groups_all_wrong": _all_wrong_fraction(graded)})


@dataclass(frozen=True)
class InpaintingExplorer:
    """IGPO: a group without a correct row gets a second rollout around hints, and correct rows of it move in.

    Per triggered group of G rows: (1) eta_i ~ U[eta_low, eta_high] per row, hints by `layout`; (2) the hinted canvases
    of all triggered groups are denoised as one batch and graded; (3) min(#correct, floor(replace_fraction G)) wrong
    rows are replaced by correct new ones ("random": both drawn at random; "first": the group's first rows give way).
    eta_low = eta_high = 0 resamples without hints: sample-matched GRPO. A group whose prompt has no trace is left alone
    unless no hints are wanted.

    Source: arXiv:2509.10396, section 3 and algorithm 1.
    """

    cfg: InpaintConfig
    rollout: RolloutConfig
    grade: Grade
    layout: Layout

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], graded: Graded, seed: Seed
    ) -> Graded:
        before = graded.rollouts.canvas
        groups = triggered_groups(graded, self.cfg.trigger)
        tried = {g: rows for g, rows in groups.items() if self._can_try(prompts[g])}
        metrics = _metrics(graded, groups, tried)
        if not tried or all(self._cap(rows) == 0 for rows in tried.values()):
            return _with_metrics(graded, metrics | {"inpaint/attempt_rate": 0.0})
        inpaint = seed.named("inpaint")
        rows = torch.cat(list(tried.values()))
        canvas = take(before, rows)
        canvas = replace(canvas, row_ids=canvas.row_ids + SECOND_ATTEMPT)
        canvas, hint_mask = self._hinted(prompts, canvas, inpaint)
        attempt = self.grade(
            denoise(policy, canvas, self.rollout, inpaint.named("rollout")), prompts
        )
        slots, sources = self._replacements(prompts, graded, attempt, tried, inpaint)
        merged = _rescue(graded, slots, take(attempt, sources))
        spent = graded.rollouts.num_forwards + attempt.rollouts.num_forwards
        merged = replace(merged, rollouts=replace(merged.rollouts, num_forwards=spent))
        rescued = before.group_ids[slots].unique().numel()
        return _with_metrics(
            merged,
            metrics
            | {
                "inpaint/success_rate": rescued / len(tried),
                "inpaint/replaced": float(slots.numel()),
                "inpaint/hint_fraction": float(hint_mask.float().mean()),
                "inpaint/attempt_correct": float(attempt.correct.float().mean()),
            },
        )

    def _cap(self, rows: Tensor) -> int:
        return max_replaced(self.cfg.replace_fraction, rows.numel())

    def _can_try(self, prompt: Prompt) -> bool:
        return self.cfg.eta_high == 0 or trace_length(prompt, self.cfg) > 0

    def _hinted(
        self, prompts: Sequence[Prompt], canvas: Canvas, inpaint: Seed
    ) -> tuple[Canvas, Tensor]:
        if self.cfg.eta_high == 0:  # nothing to place, and prompts need no trace
            return canvas, torch.zeros_like(canvas.frozen)
        stream, low, high = inpaint.named("eta"), self.cfg.eta_low, self.cfg.eta_high
        ratios = torch.tensor(
            [stream.generator(row).uniform(low, high) for row in canvas.row_ids.tolist()],
            dtype=torch.float64,
        )
        hints, hint_mask = self.layout(prompts, canvas, ratios, self.cfg, inpaint)
        device = canvas.tokens.device
        return with_hints(canvas, hints.to(device), hint_mask.to(device)), hint_mask

    def _replacements(
        self,
        prompts: Sequence[Prompt],
        graded: Graded,
        attempt: Graded,
        tried: dict[int, Tensor],
        inpaint: Seed,
    ) -> tuple[Tensor, Tensor]:
        """Rows of the batch that give way, and the rows of the attempt that take their place."""
        slots, sources = [], []
        attempt_groups = attempt.rollouts.canvas.group_ids
        at_random = self.cfg.replace_order == "random"
        for group, rows in tried.items():
            correct = ((attempt_groups == group) & attempt.correct).nonzero()[:, 0]
            count = min(correct.numel(), self._cap(rows))
            rng = inpaint.named("replace").generator(prompts[group].row_id)
            giving_way = rng.permutation(rows.numel()) if at_random else np.arange(rows.numel())
            slots.append(rows[torch.from_numpy(giving_way[:count]).to(rows.device)])
            chosen = rng.permutation(correct.numel())[:count]
            sources.append(correct[torch.from_numpy(chosen).to(rows.device)])
        return torch.cat(slots), torch.cat(sources)


@dataclass(frozen=True)
class TraceExplorer:
    """Trace in the group: in an all-wrong group, floor(replace_fraction G) random rows become the reference trace.

    The trace is followed by EOS to the end of the canvas (pad_id where the canvas names no EOS), is graded like any
    completion, and is put in only if the verifier accepts it. Traces longer than the canvas are left out. Nothing is
    denoised: this is supervised training on the trace, weighted as an advantage, and it costs no forwards. Unless
    as_hints, the rows are no hints (`frozen` is False) and the entropy filter does not thin them. Every position can be
    scored: step_map holds a pseudo order, left to right within the transfer schedule of the rollout (pseudo_order),
    which is what the step_map likelihood replays. Nothing was drawn: commit_logprob and commit_entropy are 0, and there
    is no support.

    Source: ours, the baseline that shows what generating around hints adds to showing the trace.
    """

    cfg: InpaintConfig
    rollout: RolloutConfig
    grade: Grade
    pad_id: int
    as_hints: bool = False

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], graded: Graded, seed: Seed
    ) -> Graded:
        rollouts, length = graded.rollouts, graded.rollouts.canvas.frozen.shape[1]
        groups = triggered_groups(graded, self.cfg.trigger)
        tried = {g: rows for g, rows in groups.items() if fits(prompts[g], length)}
        metrics = _metrics(graded, groups, tried)
        picked = [graded.rewards.new_empty(0, dtype=torch.int64)]
        for group, rows in tried.items():
            rng = seed.named("inpaint").named("replace").generator(prompts[group].row_id)
            order = torch.from_numpy(rng.permutation(rows.numel())).to(rows.device)
            picked.append(rows[order[: max_replaced(self.cfg.replace_fraction, rows.numel())]])
        slots = torch.cat(picked)
        if slots.numel() == 0:
            return _with_metrics(graded, metrics | {"inpaint/attempt_rate": 0.0})
        attempt = self.grade(self._written(prompts, take(rollouts, slots)), prompts)
        accepted = attempt.correct.nonzero()[:, 0]
        merged = _rescue(graded, slots[accepted], take(attempt, accepted))
        rescued = rollouts.canvas.group_ids[slots[accepted]].unique().numel()
        return _with_metrics(
            merged,
            metrics
            | {
                "inpaint/success_rate": rescued / len(tried),
                "inpaint/replaced": float(accepted.numel()),
                "inpaint/attempt_correct": float(attempt.correct.float().mean()),
            },
        )

    def _written(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> Rollouts:
        """The rows with the trace of their prompt as the completion."""
        rows = written(prompts, rollouts, self.rollout, self.pad_id)
        canvas = rows.canvas
        frozen = torch.ones_like(canvas.frozen) if self.as_hints else canvas.frozen
        return replace(rows, canvas=replace(canvas, frozen=frozen))


def triggered_groups(graded: Graded, trigger: str) -> dict[int, Tensor]:
    """group id -> its rows, of the groups to explore: those without a correct row.

    trigger "correctness" asks for nothing more. "total_reward" asks that the group's rewards are all equal, too, so
    that its advantages are zero: a group that a format reward already tells apart is left alone.
    """
    group_ids = graded.rollouts.canvas.group_ids
    groups = {}
    for group in group_ids.unique().tolist():
        rows = (group_ids == group).nonzero()[:, 0]
        rewards = graded.rewards[rows]
        wanted = trigger == "correctness" or bool((rewards == rewards[0]).all())
        if wanted and not bool(graded.correct[rows].any()):
            groups[group] = rows
    return groups


def trace_length(prompt: Prompt, cfg: InpaintConfig) -> int:
    """How many tokens of the trace hints may come from."""
    return prompt.hint_length if cfg.exclude_answer else len(prompt.trace_ids)


def max_replaced(fraction: float, group_size: int) -> int:
    """floor(lambda G), where 0.29 * 100 means 29."""
    return math.floor(fraction * group_size + 1e-9)


def original_layout(
    prompts: Sequence[Prompt], canvas: Canvas, ratios: Tensor, cfg: InpaintConfig, seed: Seed
) -> tuple[Tensor, Tensor]:
    """Hints at the trace's own positions: floor(ratio N) of its N chunks. Source: arXiv:2509.10396, section 3."""
    length = canvas.frozen.shape[1]
    owners = [prompts[g] for g in canvas.group_ids.tolist()]
    hints = torch.zeros(len(owners), length, dtype=torch.int64)
    for row, prompt in enumerate(owners):
        visible = torch.tensor(prompt.trace_ids[:length], dtype=torch.int64)
        hints[row, : visible.numel()] = visible
    hint_mask = sample_hint_mask(
        torch.tensor([trace_length(p, cfg) for p in owners], dtype=torch.int64),
        length,
        ratio=ratios,
        chunk_size=(cfg.chunk_min, cfg.chunk_max),
        seed=seed.named("chunks").value,
        step=seed.step,
        row_ids=canvas.row_ids.cpu(),
    )
    return hints, hint_mask


def _rescue(graded: Graded, slots: Tensor, rows: Graded) -> Graded:
    return put(graded, slots, replace(rows, rescued=torch.ones_like(rows.rescued)))


def _all_wrong_fraction(graded: Graded) -> float:
    total = graded.rollouts.canvas.group_ids.unique().numel()
    return len(triggered_groups(graded, "correctness")) / max(1, total)


def _metrics(
    graded: Graded, groups: dict[int, Tensor], tried: dict[int, Tensor]
) -> dict[str, float]:
    """What is known before the second rollout; every key is always there, so that logs have the same columns."""
    total = max(1, graded.rollouts.canvas.group_ids.unique().numel())
    return {
        "inpaint/groups_all_wrong": _all_wrong_fraction(graded),
        "inpaint/groups_without_trace": float(len(groups) - len(tried)),
        "inpaint/attempt_rate": len(tried) / total,
        "inpaint/attempt_correct": 0.0,
        "inpaint/success_rate": 0.0,
        "inpaint/replaced": 0.0,
        "inpaint/hint_fraction": 0.0,
    }


def _with_metrics(graded: Graded, metrics: dict[str, float]) -> Graded:
    return replace(graded, metrics={**graded.metrics, **metrics})
