"""The yardstick: error against float64 truth is at most torch's error in the same dtype, plus a little slack."""

from __future__ import annotations

import torch
from torch import Tensor

# a few float32 ulps of values of order one, for results that torch happens to round exactly (chosen, not tuned)
SLACK = {torch.float32: 2e-6, torch.float64: 1e-12}


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, truth: Tensor, name: str) -> None:
    """ours, torchs: results in the op's dtype from torch's own formula; truth: float64. Worst element against worst."""
    both_finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(ours.double()), both_finite), (
        f"{name}: finite where truth is not, or not"
    )
    exact = truth[both_finite]
    if exact.numel() == 0:
        return
    error = (ours.double()[both_finite] - exact).abs().max().item()
    theirs = (torchs.double()[both_finite] - exact).abs().max().item()
    scale = max(1.0, exact.abs().max().item())
    slack = SLACK.get(ours.dtype, torch.finfo(ours.dtype).eps) * scale
    assert error <= 1.5 * theirs + slack, (
        f"{name}: error {error:.3g}, torch's {theirs:.3g}, slack {slack:.3g}"
    )
