"""forward_mask: noising a batch of answers with per-row mask ratios."""

from __future__ import annotations

import torch
from harness import Case, measure, providers
from shapes import DEVICE
from torch import Tensor

from igpo.ops import forward_mask

MASK = 126336


def eager(tokens: Tensor, maskable: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    masked = (torch.rand(tokens.shape, device=t.device) < t[:, None]) & maskable
    return torch.where(masked, MASK, tokens), masked


def ours(tokens: Tensor, maskable: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return forward_mask(tokens, maskable, t, mask_id=MASK, seed=1)


def research(tokens: Tensor, maskable: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence at a time."""
    rows = [eager(tokens[i : i + 1], maskable[i : i + 1], t[i : i + 1]) for i in range(len(t))]
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])


def bench_forward_mask(benchmark, request, canvas: tuple[int, int]) -> None:
    tokens = torch.randint(0, MASK, canvas, device=DEVICE)
    maskable, t = torch.rand(canvas, device=DEVICE) < 0.9, torch.rand(canvas[0], device=DEVICE)

    def gate(result: tuple[Tensor, Tensor]) -> None:
        noisy, masked = result
        assert not (masked & ~maskable).any()
        assert torch.equal(noisy, torch.where(masked, MASK, tokens))
        rate = masked.sum() / (maskable * t[:, None]).sum()
        assert 0.9 < rate < 1.1, f"masked {rate:.3f} of the expected number"

    functions = {"igpo": ours, "eager": eager, "research": research}
    found, skipped = providers("forward_mask", request, functions, lambda f: f(tokens, maskable, t))
    measure(
        benchmark,
        Case(
            op="forward_mask",
            axes={"problem": f"{canvas[0]}x{canvas[1]}", "variant": ""},
            providers=found,
            gate=gate,
            bytes=canvas[0] * canvas[1] * (2 * 8 + 2),
            counted="tokens read and written (8 B each), two masks (1 B each) per position; integer work",
            skipped=skipped,
        ),
    )
