"""policy_loss (clipped surrogate with k3 KL), forward and backward: on log-probabilities, and from logits on."""

from __future__ import annotations

import pytest
import torch
from harness import Case, axes, close, measure, near, providers
from shapes import DEVICE, Rows
from torch import Tensor

from igpo.ops import policy_loss, token_logprob, use_backend

CPU_ROWS = 256
EPSILON, BETA = 0.2, 0.01
ROWS_PER_SEQUENCE = 32


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


def around(logp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """old, ref, advantages, mask for log-probabilities (B, L)."""
    old, ref = (logp + torch.randn_like(logp) * 0.1 for _ in range(2))
    advantages = torch.randn(len(logp), device=DEVICE)
    return old, ref, advantages, torch.rand_like(logp) < 0.8


def bench_policy_loss(benchmark, request, canvas: tuple[int, int]) -> None:
    logp = -torch.rand(canvas, device=DEVICE) * 3
    others = around(logp)

    def call(function) -> tuple[Tensor, Tensor]:
        leaf = logp.detach().requires_grad_()
        loss = function(leaf, *others)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    with use_backend("reference"):
        truth = call(ours)
    found, skipped = providers("policy_loss", request, {"igpo": ours, "eager": eager}, call)
    measure(
        benchmark,
        Case(
            op="policy_loss",
            axes={"problem": f"{canvas[0]}x{canvas[1]}", "variant": "forward+backward"},
            providers=found,
            gate=lambda result: close(result, truth, rtol=1e-4, atol=1e-7),
            bytes=logp.numel() * (3 * 4 + 1 + 4),
            # ratio 2, surrogate 5, KL 4, sums 4, gradient 6
            flops=logp.numel() * 21,
            counted="three log-probs (4 B) and the mask (1 B) read, the gradient (4 B) written per token; 21 FLOP",
            skipped=skipped,
        ),
    )


def logits_eager(
    logits: Tensor, targets: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor,
    epsilon: float, beta: float,
) -> Tensor:  # fmt: skip
    logp = torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]
    return eager(logp, old, ref, advantages, mask)


def logits_ours(
    logits: Tensor, targets: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor,
    epsilon: float, beta: float,
) -> Tensor:  # fmt: skip
    logp, _ = token_logprob(logits, targets.masked_fill(~mask, -100))
    return ours(logp, old, ref, advantages, mask)


@pytest.mark.parametrize("variant", ["from-logits"])
def bench_policy_loss_from_logits(benchmark, request, rows: Rows, variant: str) -> None:
    """token_logprob, then policy_loss: what Liger's GRPO loss computes in one function."""
    batch = rows.rows // ROWS_PER_SEQUENCE
    shape = (batch, ROWS_PER_SEQUENCE, rows.vocabulary)
    logits = (torch.randn(shape, device=DEVICE) * 3).to(rows.dtype)
    targets = torch.randint(0, rows.vocabulary, shape[:2], device=DEVICE)
    with torch.no_grad():
        others = around(token_logprob(logits, targets)[0])

    def call(function) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = function(leaf, targets, *others, EPSILON, BETA)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    with use_backend("reference"):
        truth = call(logits_ours)
    found, skipped = providers(
        "policy_loss", request, {"igpo": logits_ours, "eager": logits_eager}, call,
        kind="grpo_on_logits", rows=rows.rows,
    )  # fmt: skip
    scored = float(others[-1].float().mean())
    error = 1e-2 if rows.dtype == torch.bfloat16 else 1e-4
    measure(
        benchmark,
        Case(
            op="policy_loss",
            axes=axes(rows, variant),
            providers=found,
            gate=lambda result: near(result, truth, error=error),
            bytes=int(logits.numel() * logits.element_size() * (2 * scored + 1)),
            flops=int(logits.numel() * scored) * 14,
            counted="the logits of scored rows read twice, the gradient of every row written: (2 k + N) V s; "
            "14 FLOP per scored logit",
            skipped=skipped,
        ),
    )
