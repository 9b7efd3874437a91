"""merge_hints at a training batch of canvases."""

from __future__ import annotations

import pytest
import torch
from harness import Case, close, compiled, measure

from igpo.ops import merge_hints, use_backend

MASK = 126336


def eager(tokens: torch.Tensor, hints: torch.Tensor, hint_mask: torch.Tensor) -> tuple:
    merged = torch.where(hint_mask, hints, tokens)
    return merged, merged == MASK


def research(tokens: torch.Tensor, hints: torch.Tensor, hint_mask: torch.Tensor) -> tuple:
    merged = tokens.clone()
    for row in range(
        tokens.shape[0]
    ):  # one sequence at a time, as trainers with one prompt per device do
        merged[row][hint_mask[row]] = hints[row][hint_mask[row]]
    return merged, merged == MASK


@pytest.mark.parametrize("provider", ["igpo", "eager", "compile", "research"])
@pytest.mark.parametrize("shape", [(64, 256), (512, 1024)], ids=str)
def bench_merge_hints(benchmark, request, shape: tuple[int, int], provider: str) -> None:
    args = torch.full(shape, MASK), torch.randint(0, MASK, shape), torch.rand(shape) < 0.3
    with use_backend("reference"):
        truth = merge_hints(*args, mask_id=MASK)
    fused = compiled(eager, request) if provider == "compile" else eager
    case = Case(
        name=f"merge_hints {shape[0]}x{shape[1]}",
        providers={
            "igpo": lambda: merge_hints(*args, mask_id=MASK),
            "eager": lambda: eager(*args),
            "compile": lambda: fused(*args),
            "research": lambda: research(*args),
        },
        gate=lambda result: close(result, truth, rtol=0, atol=0),
        bytes=shape[0] * shape[1] * (3 * 8 + 2),
        counted="8 B tokens + 8 B hints + 8 B merged + 1 B hint mask + 1 B generate mask per position",
    )
    measure(benchmark, case, provider)
