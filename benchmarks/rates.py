"""What this machine can do at best, measured in the run it judges: bytes copied per second, matmul FLOP per second."""

from __future__ import annotations

from functools import cache

import torch
from timing import Run, event_seconds, wall

COPIED = {"cuda": 2**31, "cpu": 2**28}  # bytes; several times any cache
SIDE = {"cuda": 8192, "cpu": 2048}


def _median(call, device: str, rounds: int = 9) -> float:
    def once() -> float:
        if device == "cuda":
            return event_seconds(call)
        return wall(Run(call), device)

    for _ in range(2):
        once()
    return sorted(once() for _ in range(rounds))[rounds // 2]


@cache
def copy_rate(device: str) -> float:
    """Bytes per second, those read plus those written, of copying a tensor within the device's memory."""
    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED[device] / _median(lambda: target.copy_(source), device)


@cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a square product of random matrices."""
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _median(lambda: a @ b, device, rounds=5)
