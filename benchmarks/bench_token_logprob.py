"""token_logprob (log-probability and entropy of one token per row): forward, backward, and both."""

from __future__ import annotations

import pytest
import torch
from harness import Case, axes, close, measure, near, providers
from shapes import DEVICE, Rows
from torch import Tensor

from igpo.ops import token_logprob, use_backend

CPU_ROWS = 64
# how often N V values are read or written
PASSES = {"forward": 1, "backward": 2, "forward+backward": 3}
# per logit. forward: maximum 1, (x - m) / T 2, exp 1, its sum 1, the entropy's 2; backward: log p 2, exp 1, + H 1,
# g + h · 2, the product 1
FLOPS = {"forward": 7, "backward": 7, "forward+backward": 14}


def eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def research(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As IGPO's and d1's trainers: cross-entropy for the log-probability, a float64 softmax for the entropy."""
    p = torch.softmax(logits.double(), -1)
    entropy = -(p * torch.log(p + 1e-8)).sum(-1)
    return -torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none"), entropy


def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprob(logits, targets)


@pytest.mark.parametrize("phase", list(PASSES))
def bench_token_logprob(benchmark, request, rows: Rows, phase: str) -> None:
    logits = (torch.randn(rows.rows, rows.vocabulary, device=DEVICE) * 3).to(rows.dtype)
    targets = torch.randint(0, rows.vocabulary, (rows.rows,), device=DEVICE)
    upstream = [torch.randn(rows.rows, device=DEVICE) for _ in range(2)]

    def forward(function) -> tuple[tuple[Tensor, ...], Tensor]:
        leaf = logits.detach().requires_grad_()
        return function(leaf, targets), leaf

    def call(function, made=None):
        if phase == "forward":
            with torch.no_grad():
                return function(logits, targets)
        outputs, leaf = made or forward(function)
        return torch.autograd.grad([x.float() for x in outputs], leaf, upstream)[0]

    with use_backend("reference"):
        truth = call(ours)

    def gate(result) -> None:
        if phase == "forward":  # a rival may leave out the entropy
            close(result, truth[: len(result)], rtol=1e-4, atol=1e-3)
        else:
            near(result, truth, error=1e-2 if rows.dtype == torch.bfloat16 else 1e-4)

    found, skipped = providers(
        "token_logprob", request, {"igpo": ours, "eager": eager, "research": research}, call,
        kind="token_logprob", rows=rows.rows, prepare=forward if phase == "backward" else None,
    )  # fmt: skip
    if phase != "forward" and found.pop("liger", None):
        skipped["liger"] = "its fused_selective_log_softmax has no gradient"
    measure(
        benchmark,
        Case(
            op="token_logprob",
            axes=axes(rows, phase),
            providers=found,
            gate=gate,
            bytes=logits.numel() * logits.element_size() * PASSES[phase],
            flops=logits.numel() * FLOPS[phase],
            counted="N V s per pass: forward reads the logits, backward too and writes the gradient; 7 FLOP each way",
            skipped=skipped,
        ),
    )
