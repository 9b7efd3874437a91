"""forward_mask: noising a batch of answers with per-row mask ratios."""

from __future__ import annotations

import pytest
import torch
from harness import Case, compiled, measure
from torch import Tensor

from igpo.ops import forward_mask

MASK = 126336


def eager(tokens: Tensor, maskable: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    masked = (torch.rand(tokens.shape) < t[:, None]) & maskable
    return torch.where(masked, MASK, tokens), masked


def research(tokens: Tensor, maskable: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence at a time."""
    rows = [eager(tokens[i : i + 1], maskable[i : i + 1], t[i : i + 1]) for i in range(len(t))]
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])


@pytest.mark.parametrize("provider", ["igpo", "eager", "compile", "research"])
@pytest.mark.parametrize("shape", [(64, 256), (512, 1024)], ids=str)
def bench_forward_mask(benchmark, request, shape: tuple[int, int], provider: str) -> None:
    tokens = torch.randint(0, MASK, shape)
    maskable, t = torch.rand(shape) < 0.9, torch.rand(shape[0])
    fused = compiled(eager, request) if provider == "compile" else eager

    def gate(result: tuple[Tensor, Tensor]) -> None:
        noisy, masked = result
        assert not (masked & ~maskable).any()
        assert torch.equal(noisy, torch.where(masked, MASK, tokens))
        rate = masked.sum() / (maskable * t[:, None]).sum()
        assert 0.9 < rate < 1.1, f"masked {rate:.3f} of the expected number"

    case = Case(
        name=f"forward_mask {shape[0]}x{shape[1]}",
        providers={
            "igpo": lambda: forward_mask(tokens, maskable, t, mask_id=MASK, seed=1),
            "eager": lambda: eager(tokens, maskable, t),
            "compile": lambda: fused(tokens, maskable, t),
            "research": lambda: research(tokens, maskable, t),
        },
        gate=gate,
        bytes=shape[0] * shape[1] * (2 * 8 + 2),
        counted="tokens read and written (8 B each), two masks (1 B each) per position",
    )
    measure(benchmark, case, provider)
