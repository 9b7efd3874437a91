"""Draw functions along the trajectory: canvases the rollout really passed through, rebuilt from its step map.

Masking step_map >= t gives the canvas before denoise step t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpo.types import GIVEN, Draw, Rollouts, Seed

from .draws import InnerUpdate, on_canvas


def step_map(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    num_slices: int,
    hint_mode: str = "score",
    hint_order: Tensor | None = None,
) -> list[InnerUpdate]:
    """log p(o^k | the canvas at the start of the slice of denoise steps that committed o^k).

    Each row's steps are cut into num_slices runs of consecutive steps, the cuts drawn anew for every inner update; a
    run's canvas is rebuilt by masking step_map >= its first step. One slice is mean-field on the generated tokens; as
    many slices as steps is the trajectory's own log-likelihood. EOS filled in by the early stop is masked and not
    scored.

    Hints have no step. hint_mode "score" reads them from one more canvas, fully masked; "condition" leaves them visible
    without gradient; "replay" gives every token of a row with hints the step hint_order says ((L,) int64, e.g.
    rollout.pseudo_order: left to right), as if the policy had written the row in that order.

    Source: arXiv:2509.06949 (TraceRL, slices of equal length; random cuts are ours).
    """
    canvas, order, num_steps = rollouts.canvas, rollouts.step_map, rollouts.num_steps
    filled = (order != GIVEN) & (order >= num_steps[:, None])
    if hint_mode == "replay":
        assert hint_order is not None, "replay needs an order"
        hinted = (order == GIVEN).any(1)
        steps = hint_order.to(order.device)
        order = torch.where(hinted[:, None], steps, order)
        num_steps = torch.where(hinted, steps.max() + 1, num_steps)
    generated = (order != GIVEN) & ~filled
    hints = order == GIVEN if hint_mode == "score" else torch.zeros_like(generated)
    extra = (Draw(on_canvas(rollouts, torch.ones_like(hints)), hints),) if hints.any() else ()
    updates = []
    for inner in range(num_iterations):
        stream = seed.named(f"slices/{inner}")
        edges = torch.tensor(
            [
                _slice_edges(int(count), num_slices, stream.generator(int(row)))
                for row, count in zip(canvas.row_ids, num_steps, strict=True)
            ],
            device=order.device,
        )  # (B, num_slices + 1)
        draws = []
        for low, high in zip(edges.T[:-1, :, None], edges.T[1:, :, None], strict=True):
            read = generated & (order >= low) & (order < high)
            draws.append(Draw(on_canvas(rollouts, order >= low), read, step=low[:, 0]))
        updates.append(InnerUpdate((*draws, *extra), generated | hints))
    return updates


def _slice_edges(num_steps: int, num_slices: int, rng) -> list[int]:
    """0 = e_0 < e_1 < … = num_steps; edges repeat at the end (empty slices) when there are more slices than steps."""
    cuts = min(num_slices - 1, max(0, num_steps - 1))
    inside = sorted((1 + rng.permutation(max(0, num_steps - 1))[:cuts]).tolist())
    return [0, *inside, *[num_steps] * (num_slices - cuts)]
