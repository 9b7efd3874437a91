"""keep_top_entropy: the entropy filter on hint tokens."""

from __future__ import annotations

import torch
from harness import Case, close, measure, providers
from shapes import DEVICE
from torch import Tensor

from igpo.ops import keep_top_entropy, use_backend

FRACTION = 0.2


def eager(entropy: Tensor, candidates: Tensor) -> Tensor:
    count = candidates.sum(-1, keepdim=True)
    keep = (count.double() * FRACTION).floor().clamp(min=1)
    score = torch.where(candidates, entropy, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(entropy.shape[1], device=entropy.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return candidates & (rank < keep)


def ours(entropy: Tensor, candidates: Tensor) -> Tensor:
    return keep_top_entropy(entropy, candidates, FRACTION)


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


def bench_keep_top_entropy(benchmark, request, canvas: tuple[int, int]) -> None:
    rows, length = canvas
    entropy = torch.stack([torch.randperm(length) for _ in range(rows)]).float()  # no ties
    args = entropy.to(DEVICE), torch.rand(canvas, device=DEVICE) < 0.4
    with use_backend("reference"):
        truth = ours(*args)
    functions = {"igpo": ours, "eager": eager, "research": research}
    found, skipped = providers("keep_top_entropy", request, functions, lambda f: f(*args))
    measure(
        benchmark,
        Case(
            op="keep_top_entropy",
            axes={"problem": f"{rows}x{length}", "variant": ""},
            providers=found,
            gate=lambda result: close(result, truth, rtol=0, atol=0),
            bytes=rows * length * (4 + 2),
            counted="entropy (4 B), candidates and kept (1 B each) per position; integer work",
            skipped=skipped,
        ),
    )
