"""unmask_step at 8 x 32 positions: one denoising commit of an active block, all of it masked, or half."""

from __future__ import annotations

import pytest
import torch
from harness import Case, compiled, measure
from torch import Tensor

from igpo.ops import unmask_step, use_backend

BATCH, BLOCK, COMMIT = 8, 32, 2


def eager(
    logits: Tensor, tokens: Tensor, mask_id: int, temperature: float
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
    top = torch.where(masked, score, -1.0).topk(COMMIT, -1).indices
    committed = torch.zeros_like(masked).scatter(1, top, True) & masked
    return torch.where(committed, candidate, tokens), committed


def research(
    logits: Tensor, tokens: Tensor, mask_id: int, temperature: float
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
        _, index = torch.topk(score[row], k=COMMIT)
        committed[row, index] = True
    committed &= masked
    return torch.where(committed, candidate, tokens), committed


def ours(logits: Tensor, tokens: Tensor, mask_id: int, temperature: float) -> tuple[Tensor, Tensor]:
    step = unmask_step(
        logits, tokens, mask_id=mask_id, num_unmask=COMMIT, temperature=temperature, seed=1
    )
    return step.tokens, step.committed


@pytest.mark.parametrize("provider", ["igpo", "eager", "compile", "research"])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("masked", [1.0, 0.5])
def bench_unmask_step(
    benchmark, request, vocabulary, dtype, masked: float, temperature: float, provider: str
) -> None:
    mask_id = vocabulary - 1
    logits = (torch.randn(BATCH, BLOCK, vocabulary) * 3).to(dtype)
    logits[..., mask_id] = -30.0  # a trained model never predicts [MASK]
    tokens = torch.full((BATCH, BLOCK), mask_id)
    tokens[:, int(BLOCK * masked) :] = 5
    args = logits, tokens, mask_id, temperature
    with use_backend("reference"):
        truth = ours(*args)

    def gate(result: tuple[Tensor, Tensor]) -> None:
        new, committed = result
        assert (committed.sum(-1) == COMMIT).all()
        assert torch.equal(new != tokens, committed)
        if temperature == 0:  # rivals may break near-ties of bfloat16 logits otherwise
            agree = (new == truth[0]).float().mean()
            assert agree > 0.9, f"only {agree:.3f} of the positions agree with the reference"

    fused = compiled(eager, request) if provider == "compile" else eager
    case = Case(
        name=f"unmask_step {BATCH}x{BLOCK}x{vocabulary} {dtype} T={temperature} masked={masked:.0%}".replace(
            "torch.", ""
        ),
        providers={
            "igpo": lambda: ours(*args),
            "eager": lambda: eager(*args),
            "compile": lambda: fused(*args),
            "research": lambda: research(*args),
        },
        gate=gate,
        bytes=int(logits.numel() * logits.element_size() * masked),
        counted="the logits of every masked position, read once",
    )
    with torch.no_grad():
        measure(benchmark, case, provider)
