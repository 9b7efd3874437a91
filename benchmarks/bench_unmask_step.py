"""unmask_step: one denoising commit of active blocks of 32 positions, by temperature and by how many are masked."""

from __future__ import annotations

import pytest
import torch
from harness import Case, axes, measure, providers
from shapes import DEVICE, Rows
from torch import Tensor

from igpo.ops import unmask_step, use_backend

CPU_ROWS = 256
BLOCK, COMMIT = 32, 2
# (temperature, masked share of the positions)
VARIANTS = [(0.0, 1.0), (1.2, 1.0), (0.0, 0.25 if DEVICE == "cuda" else 0.5)]


def eager(
    logits: Tensor, tokens: Tensor, mask_id: int, temperature: float, num_unmask: int
) -> tuple[Tensor, Tensor]:
    """One softmax, one draw by the exponential race, one top-k for the whole batch; float32 throughout."""
    masked = tokens == mask_id
    x = logits.float()
    p = torch.softmax(x, -1)
    if temperature:
        race = torch.empty_like(x).exponential_()
        candidate = (torch.softmax(x / temperature, -1) / race).argmax(-1)
        score = p.gather(-1, candidate[..., None])[..., 0]
    else:
        score, candidate = p.max(-1)
    top = torch.where(masked, score, -1.0).topk(num_unmask, -1).indices
    committed = torch.zeros_like(masked).scatter(1, top, True) & masked
    return torch.where(committed, candidate, tokens), committed


def research(
    logits: Tensor, tokens: Tensor, mask_id: int, temperature: float, num_unmask: int
) -> tuple[Tensor, Tensor]:
    """As LLaDA-family trainers: float64 noise and softmax over every position, top-k row by row."""
    masked = tokens == mask_id
    x = logits.double()
    if temperature:
        noise = (-torch.log(torch.rand_like(x))) ** temperature
        candidate = (x.exp() / noise).argmax(-1)
    else:
        candidate = x.argmax(-1)
    p = torch.softmax(x, -1)
    score = torch.gather(p, -1, candidate[..., None]).squeeze(-1)
    score = torch.where(masked, score, -torch.inf)
    committed = torch.zeros_like(masked)
    for row in range(tokens.shape[0]):
        _, index = torch.topk(score[row], k=num_unmask)
        committed[row, index] = True
    committed &= masked
    return torch.where(committed, candidate, tokens), committed


def ours(
    logits: Tensor, tokens: Tensor, mask_id: int, temperature: float, num_unmask: int
) -> tuple[Tensor, Tensor]:
    step = unmask_step(
        logits, tokens, mask_id=mask_id, num_unmask=num_unmask, temperature=temperature, seed=1
    )
    return step.tokens, step.committed


@pytest.mark.parametrize(("temperature", "masked"), VARIANTS)
def bench_unmask_step(benchmark, request, rows: Rows, temperature: float, masked: float) -> None:
    mask_id, batch = rows.vocabulary - 1, max(1, rows.rows // BLOCK)
    logits = (torch.randn(batch, BLOCK, rows.vocabulary, device=DEVICE) * 3).to(rows.dtype)
    logits[..., mask_id] = -30.0  # a trained model never predicts [MASK]
    tokens = torch.full((batch, BLOCK), mask_id, device=DEVICE)
    tokens[:, int(BLOCK * masked) :] = 5

    def call(function) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return function(logits, tokens, mask_id, temperature, COMMIT)

    with use_backend("reference"):
        truth = call(ours)

    def gate(result: tuple[Tensor, Tensor]) -> None:
        new, committed = result
        assert (committed.sum(-1) == COMMIT).all()
        assert torch.equal(new != tokens, committed)
        if temperature == 0:  # rivals may break near-ties of bfloat16 logits otherwise
            agree = (new == truth[0]).float().mean()
            assert agree > 0.9, f"only {agree:.3f} of the positions agree with the reference"

    found, skipped = providers(
        "unmask_step", request, {"igpo": ours, "eager": eager, "research": research}, call,
        kind="unmask_sampling" if temperature else "unmask_greedy", rows=rows.rows,
    )  # fmt: skip
    measure(
        benchmark,
        Case(
            op="unmask_step",
            axes=axes(rows, f"T={temperature:g} masked={masked:.0%}"),
            providers=found,
            gate=gate,
            bytes=int(logits.numel() * logits.element_size() * masked),
            # per logit: maximum 1, x - m 1, exp 1, its sum 1, the entropy's 2; a draw: x / T 2, exp 1, its sum 1
            flops=int(logits.numel() * masked) * (10 if temperature else 6),
            counted="the logits of every masked position, read once: k V s; 6 FLOP per logit, 10 with a draw",
            skipped=skipped,
        ),
    )
