"""masked_cross_entropy, forward and backward, with 1/t weights: every row scored, or half of them."""

from __future__ import annotations

import pytest
import torch
from harness import Case, axes, measure, near, providers
from shapes import DEVICE, Rows
from torch import Tensor

from igpo.ops import masked_cross_entropy, use_backend

CPU_ROWS = 128


def eager(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    loss = torch.nn.functional.cross_entropy(
        logits.float(), targets, reduction="none", ignore_index=-100
    )
    return (loss * weights).sum()


def research(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """As masked-diffusion SFT scripts: the loss of every position, multiplied by the mask afterwards."""
    masked = targets != -100
    loss = torch.nn.functional.cross_entropy(logits.float(), targets.clamp(min=0), reduction="none")
    return (loss * masked * weights).sum()


def ours(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return masked_cross_entropy(logits, targets, weights=weights)


@pytest.mark.parametrize("scored", [1.0, 0.5], ids=["scored=all", "scored=half"])
def bench_masked_cross_entropy(benchmark, request, rows: Rows, scored: float) -> None:
    logits = (torch.randn(rows.rows, rows.vocabulary, device=DEVICE) * 3).to(rows.dtype)
    targets = torch.randint(0, rows.vocabulary, (rows.rows,), device=DEVICE)
    if scored < 1:
        targets[::2] = -100
    weights = torch.rand(rows.rows, device=DEVICE) + 0.5

    def call(function, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        leaf = (logits if own is None else own).detach().requires_grad_()
        loss = function(leaf, targets, weights)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    with use_backend("reference"):
        truth = call(ours)
    error = 1e-2 if rows.dtype == torch.bfloat16 else 1e-4
    found, skipped = providers(
        "masked_cross_entropy", request, {"igpo": ours, "eager": eager, "research": research}, call,
        kind="masked_cross_entropy", rows=rows.rows, copy=logits.clone,
    )  # fmt: skip
    measure(
        benchmark,
        Case(
            op="masked_cross_entropy",
            axes=axes(rows, f"scored={scored:.0%}"),
            providers=found,
            gate=lambda result: near(result, truth, error=error),
            bytes=int(logits.numel() * logits.element_size() * (scored + 1)),
            # per logit of a scored row: maximum 1, x - m 1, exp 1, its sum 1; the gradient p 1, times weight 1
            flops=int(logits.numel() * scored) * 6,
            counted="the logits of scored rows read once, the gradient of every row written once: (k + N) V s; "
            "6 FLOP per scored logit",
            skipped=skipped,
        ),
    )
