"""merge_hints at a training batch of canvases."""

from __future__ import annotations

import torch
from harness import Case, close, measure, providers
from shapes import DEVICE

from igpo.ops import merge_hints, use_backend

MASK = 126336


def eager(tokens: torch.Tensor, hints: torch.Tensor, hint_mask: torch.Tensor) -> tuple:
    merged = torch.where(hint_mask, hints, tokens)
    return merged, merged == MASK


def ours(tokens: torch.Tensor, hints: torch.Tensor, hint_mask: torch.Tensor) -> tuple:
    return merge_hints(tokens, hints, hint_mask, mask_id=MASK)


def research(tokens: torch.Tensor, hints: torch.Tensor, hint_mask: torch.Tensor) -> tuple:
    merged = tokens.clone()
    for row in range(
        tokens.shape[0]
    ):  # one sequence at a time, as trainers with one prompt per device do
        merged[row][hint_mask[row]] = hints[row][hint_mask[row]]
    return merged, merged == MASK


def bench_merge_hints(benchmark, request, canvas: tuple[int, int]) -> None:
    args = (
        torch.full(canvas, MASK, device=DEVICE),
        torch.randint(0, MASK, canvas, device=DEVICE),
        torch.rand(canvas, device=DEVICE) < 0.3,
    )
    with use_backend("reference"):
        truth = ours(*args)
    functions = {"igpo": ours, "eager": eager, "research": research}
    found, skipped = providers("merge_hints", request, functions, lambda f: f(*args))
    measure(
        benchmark,
        Case(
            op="merge_hints",
            axes={"problem": f"{canvas[0]}x{canvas[1]}", "variant": ""},
            providers=found,
            gate=lambda result: close(result, truth, rtol=0, atol=0),
            bytes=canvas[0] * canvas[1] * (2 * 8 + 2),
            counted="8 B of tokens or of hints, 8 B merged, 1 B of each mask per position; integer work",
            skipped=skipped,
        ),
    )
