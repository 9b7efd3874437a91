"""masked_cross_entropy with 1/t weights, half of the rows masked (scored), forward and backward, 128 rows."""

from __future__ import annotations

import pytest
import torch
from harness import Case, close, compiled, measure
from torch import Tensor

from igpo.ops import masked_cross_entropy, use_backend

ROWS = 128


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


@pytest.mark.parametrize("provider", ["igpo", "eager", "compile", "research"])
def bench_masked_cross_entropy(benchmark, request, vocabulary, dtype, provider: str) -> None:
    logits = (torch.randn(ROWS, vocabulary) * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (ROWS,))
    targets[::2] = -100
    weights = torch.rand(ROWS) + 0.5
    functions = {"igpo": ours, "eager": eager, "research": research, "compile": eager}
    if provider == "compile":
        functions["compile"] = compiled(eager, request)

    def call(name: str) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = functions[name](leaf, targets, weights)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    with use_backend("reference"):
        truth = call("igpo")
    size = logits.element_size()
    case = Case(
        name=f"masked_cross_entropy fwd+bwd {ROWS}x{vocabulary} {dtype}".replace("torch.", ""),
        providers={name: lambda name=name: call(name) for name in functions},
        gate=lambda result: close(
            result, truth, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3
        ),
        bytes=logits.numel() * size * 3 // 2,
        counted="scored half of the logits read once, the gradient of every row written once",
    )
    measure(benchmark, case, provider)
