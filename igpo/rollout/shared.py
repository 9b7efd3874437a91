"""Denoising on several processes: each takes a share of the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from igpo.ranks import ranks
from igpo.types import Canvas, Rollouts, take

RECORDS = ("tokens", "step_map", "commit_logprob", "commit_entropy", "num_steps", "support")


def over_processes(denoised: Callable[[Canvas], Rollouts], canvas: Canvas) -> Rollouts:
    """denoised(canvas), of which a process does its share of the rows; every process gets all of them. A row's tokens
    do not depend on the other rows, so this changes nothing."""
    here, rows = ranks(), torch.arange(len(canvas.tokens), device=canvas.tokens.device)
    if here.size == 1:
        return denoised(canvas)
    own = denoised(take(canvas, here.own(rows)))
    names = [name for name in RECORDS if getattr(own, name) is not None]
    whole = here.together([getattr(own, name) for name in names], len(rows))
    spent = here.added({"forwards": own.num_forwards})["forwards"]
    return replace(
        own, canvas=canvas, num_forwards=int(spent), **dict(zip(names, whole, strict=True))
    )
