"""Grading on several processes: every completion is judged once, each process judging whole groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from igpo.ranks import ranks
from igpo.types import Graded, Prompt, Rollouts, take

Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]


def over_processes(grade: Grade) -> Grade:
    """`grade`, of which a process is asked for the groups of its share; every process gets all the answers. Reward
    functions need not be deterministic, so no two processes may ask for the same completion. Metrics are added up."""

    def graded(rollouts: Rollouts, prompts: Sequence[Prompt]) -> Graded:
        here, groups = ranks(), rollouts.canvas.group_ids
        if here.size == 1:
            return grade(rollouts, prompts)
        own = (groups % here.size == here.rank).nonzero()[:, 0]
        answer = None
        if own.numel():
            mine = grade(take(rollouts, own), prompts)
            parts = {name: part.cpu() for name, part in mine.parts.items()}
            answer = (
                own.cpu(),
                mine.rewards.cpu(),
                mine.correct.cpu(),
                mine.completions,
                mine.failures,
                parts,
                mine.metrics,
            )
        return _joined(rollouts, [found for found in here.all(answer) if found is not None])

    return graded


def _joined(rollouts: Rollouts, answers: Sequence[tuple]) -> Graded:
    rows, rewards, correct, texts, failures, parts, metrics = zip(*answers, strict=True)
    order = torch.cat(rows).argsort()
    device = rollouts.tokens.device

    def whole(pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(pieces))[order].to(device)

    def in_order(pieces: Sequence[tuple]) -> tuple:
        every = [value for some in pieces for value in some]
        return tuple(every[row] for row in order.tolist())

    total: dict[str, float] = {}
    for some in metrics:
        for name, value in some.items():
            total[name] = total.get(name, 0.0) + value
    return Graded(
        rollouts=rollouts,
        rewards=whole(rewards),
        correct=whole(correct),
        rescued=torch.zeros(len(order), dtype=torch.bool, device=device),
        completions=in_order(texts),
        failures=None if None in failures else in_order(failures),
        parts={name: whole([some[name] for some in parts]) for name in parts[0]},
        metrics=total,
    )
