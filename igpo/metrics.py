"""Numbers of a training step under TRL's names, computed from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .types import GIVEN, Graded, Metrics, Rollouts


def of_rewards(graded: Graded) -> Metrics:
    """reward, reward_std (within a group), frac_reward_zero_std, and rewards/<function>/mean and std.

    Of the policy's own completions: call it before an explorer puts others in their place.
    """
    groups = _groups(graded.rollouts.canvas.group_ids)
    rewards = graded.rewards.double()
    stds = torch.stack([rewards[rows].std(correction=0) for rows in groups])
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(stds.mean()),
        "frac_reward_zero_std": float((stds == 0).double().mean()),
        "correct": float(graded.correct.double().mean()),
    }
    for name, part in graded.parts.items():
        present = part[~part.isnan()].double()
        metrics[f"rewards/{name}/mean"] = float(present.mean()) if len(present) else float("nan")
        metrics[f"rewards/{name}/std"] = (
            float(present.std(correction=0)) if len(present) else float("nan")
        )
    return metrics


def of_rollouts(rollouts: Rollouts) -> Metrics:
    """completions/*: lengths up to and including the token that ends them; entropy of the draws in nats;
    rollout/nfe_mean.

    completions/clipped_ratio is the fraction without such a token; the terminated lengths are of the others, absent
    when there are none.
    """
    completion = rollouts.completion
    is_end = rollouts.canvas.is_end(completion)
    ended = is_end.any(1)
    first = is_end.byte().argmax(1) + 1
    lengths = torch.where(ended, first, completion.shape[1]).double()
    drawn = (rollouts.step_map != GIVEN) & (rollouts.step_map < rollouts.num_steps[:, None])
    metrics = {
        "completions/clipped_ratio": float((~ended).double().mean()),
        "entropy": float(rollouts.commit_entropy[drawn].double().mean()) if drawn.any() else 0.0,
        "rollout/nfe_mean": float(rollouts.num_steps.double().mean()),
    }
    kinds = {"length": lengths, "terminated_length": lengths[ended]}
    for name, values in kinds.items():
        if len(values):
            metrics[f"completions/mean_{name}"] = float(values.mean())
            metrics[f"completions/min_{name}"] = float(values.min())
            metrics[f"completions/max_{name}"] = float(values.max())
    return metrics


def mean(parts: Sequence[Metrics]) -> Metrics:
    """Key by key, over the parts that have the key."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: _mean([part[key] for part in parts if key in part]) for key in keys}


def add(total: dict[str, float], part: Mapping[str, float]) -> None:
    """total += part; losses and metrics of row micro-batches add up to those of the batch."""
    for key, value in part.items():
        total[key] = total.get(key, 0.0) + value


def peak_memory(device: torch.device) -> Metrics:
    """mem/peak_gib since the last call, on a GPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return {"mem/peak_gib": peak}


def _groups(group_ids: Tensor) -> list[Tensor]:
    return [(group_ids == group).nonzero()[:, 0] for group in group_ids.unique()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
