"""token_logprob (log-probability and entropy of one token per row), forward and forward + backward, 64 rows."""

from __future__ import annotations

import pytest
import torch
from harness import Case, close, compiled, measure
from torch import Tensor

from igpo.ops import token_logprob, use_backend

ROWS = 64


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


def forward_backward(
    function, logits: Tensor, targets: Tensor, grads: tuple[Tensor, Tensor]
) -> Tensor:
    leaf = logits.detach().requires_grad_()
    outputs = [x.float() for x in function(leaf, targets)]
    return torch.autograd.grad(outputs, leaf, grads)[0]


@pytest.mark.parametrize("provider", ["igpo", "eager", "compile", "research"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_token_logprob(
    benchmark, request, vocabulary, dtype, backward: bool, provider: str
) -> None:
    logits = (torch.randn(ROWS, vocabulary) * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (ROWS,))
    grads = torch.randn(ROWS), torch.randn(ROWS)
    functions = {"igpo": ours, "eager": eager, "research": research, "compile": eager}
    if provider == "compile":
        functions["compile"] = compiled(eager, request)

    def call(name: str):
        if backward:
            return forward_backward(functions[name], logits, targets, grads)
        with torch.no_grad():
            return functions[name](logits, targets)

    with use_backend("reference"):
        truth = call("igpo")
    tolerance = 2e-2 if dtype == torch.bfloat16 and backward else 1e-4
    size = logits.element_size()
    case = Case(
        name=f"token_logprob {'fwd+bwd' if backward else 'fwd'} {ROWS}x{vocabulary} {dtype}".replace(
            "torch.", ""
        ),
        providers={name: lambda name=name: call(name) for name in functions},
        gate=lambda result: close(result, truth, rtol=tolerance, atol=1e-3),
        bytes=logits.numel() * size * (3 if backward else 1),
        counted="logits read once forward; backward reads them once more and writes the gradient",
    )
    measure(benchmark, case, provider)
