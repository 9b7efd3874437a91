"""keep_top_entropy: the entropy filter on hint tokens."""

from __future__ import annotations

import pytest
import torch
from harness import Case, close, compiled, measure
from torch import Tensor

from igpo.ops import keep_top_entropy, use_backend

FRACTION = 0.2


def eager(entropy: Tensor, candidates: Tensor) -> Tensor:
    count = candidates.sum(-1, keepdim=True)
    keep = (count * FRACTION).floor().clamp(min=1)
    order = torch.where(candidates, entropy, -torch.inf).argsort(-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(entropy.shape[1]).expand_as(order)
    )
    return candidates & (rank < keep)


def research(entropy: Tensor, candidates: Tensor) -> Tensor:
    """As the released IGPO code: a top-k per row, then one position at a time."""
    kept = torch.zeros_like(candidates)
    for row in range(entropy.shape[0]):
        positions = candidates[row].nonzero()[:, 0]
        if len(positions) == 0:
            continue
        k = max(1, int(len(positions) * FRACTION))
        for index in torch.topk(entropy[row][positions], k).indices:
            kept[row, positions[index]] = True
    return kept


@pytest.mark.parametrize("provider", ["igpo", "eager", "compile", "research"])
@pytest.mark.parametrize("shape", [(64, 256), (512, 1024)], ids=str)
def bench_keep_top_entropy(benchmark, request, shape: tuple[int, int], provider: str) -> None:
    entropy = torch.stack([torch.randperm(shape[1]).float() for _ in range(shape[0])])  # no ties
    candidates = torch.rand(shape) < 0.4
    fused = compiled(eager, request) if provider == "compile" else eager
    with use_backend("reference"):
        truth = keep_top_entropy(entropy, candidates, FRACTION)
    case = Case(
        name=f"keep_top_entropy {shape[0]}x{shape[1]}",
        providers={
            "igpo": lambda: keep_top_entropy(entropy, candidates, FRACTION),
            "eager": lambda: eager(entropy, candidates),
            "compile": lambda: fused(entropy, candidates),
            "research": lambda: research(entropy, candidates),
        },
        gate=lambda result: close(result, truth, rtol=0, atol=0),
        bytes=shape[0] * shape[1] * (4 + 2),
        counted="entropy (4 B), candidates and kept (1 B each) per position",
    )
    measure(benchmark, case, provider)
