"""policy_loss (clipped surrogate with k3 KL), forward and backward, at two batch shapes."""

from __future__ import annotations

import pytest
import torch
from harness import Case, close, compiled, measure
from torch import Tensor

from igpo.ops import policy_loss, use_backend

EPSILON, BETA = 0.2, 0.01


def eager(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(logp - old)
    a = advantages[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a)
    delta = logp - ref
    kl = torch.exp(-delta) - 1 + delta
    return ((BETA * kl - surrogate) * mask).sum() / mask.sum()


def ours(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return policy_loss(
        logp, old, advantages, mask, clip=(EPSILON, EPSILON), ref_logprob=ref, kl_coef=BETA
    ).loss


@pytest.mark.parametrize("provider", ["igpo", "eager", "compile"])
@pytest.mark.parametrize("shape", [(64, 256), (512, 1024)], ids=str)
def bench_policy_loss(benchmark, request, shape: tuple[int, int], provider: str) -> None:
    old = -torch.rand(shape) * 3
    logp, ref = old + torch.randn(shape) * 0.1, old + torch.randn(shape) * 0.1
    advantages, mask = torch.randn(shape[0]), torch.rand(shape) < 0.8
    fused = compiled(eager, request) if provider == "compile" else eager
    functions = {"igpo": ours, "eager": eager, "compile": fused}

    def call(name: str) -> tuple[Tensor, Tensor]:
        leaf = logp.detach().requires_grad_()
        loss = functions[name](leaf, old, ref, advantages, mask)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    with use_backend("reference"):
        truth = call("igpo")
    case = Case(
        name=f"policy_loss fwd+bwd {shape[0]}x{shape[1]}",
        providers={name: lambda name=name: call(name) for name in functions},
        gate=lambda result: close(result, truth, rtol=1e-4, atol=1e-7),
        bytes=shape[0] * shape[1] * (3 * 4 + 1 + 4),
        counted="three log-probs (4 B) and the mask (1 B) read, the gradient (4 B) written per token",
    )
    measure(benchmark, case, provider)
