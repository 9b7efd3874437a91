"""Which problems are timed: on a GPU those of 8B models with their rows varied, on a CPU what a core can hold.

Sizes: "full"; "quick" (a few problems of each op, minutes in all); "tiny" (gates only, timings mean nothing).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

# IGPO_BENCH_DEVICE=cpu: the CPU of a machine with a GPU
DEVICE = os.environ.get("IGPO_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
LLADA, DREAM, SMALL, TINY = 126464, 151936, 4099, 517
GPU_ROWS = (32, 64, 128, 256, 512, 1024, 4096)
GPU_VOCABULARIES = (SMALL, 32000, DREAM, 262144)
COMPILED_ROWS = (32, 256, 4096)  # elsewhere torch.compile is left out: every shape costs it seconds
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Rows:
    """rows x vocabulary logits."""

    rows: int
    vocabulary: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocabulary} {short(self.dtype)}"


@dataclass(frozen=True)
class Head:
    """rows x width hidden states, a head of vocabulary x width; of the rows, `ignored` do not count."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    trained: bool
    ignored: float = 0.0

    def __str__(self) -> str:
        head = "trained" if self.trained else "frozen"
        some = f" ignored={self.ignored:.0%}" if self.ignored else ""
        return f"{self.rows}x{self.width}x{self.vocabulary} {short(self.dtype)} {head}{some}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(cpu_rows: int, size: str, device: str = DEVICE) -> list[Rows]:
    """cpu_rows: how many rows of logits the op is timed with on a CPU."""
    if size == "tiny":
        return [Rows(cpu_rows, TINY, F32), Rows(cpu_rows, TINY, BF16)]
    if device == "cpu":
        both = [Rows(cpu_rows, LLADA, BF16), Rows(cpu_rows, SMALL, F32)]
        every = [Rows(cpu_rows, v, t) for v in (LLADA, DREAM, SMALL) for t in (F32, BF16)]
        return both if size == "quick" else every
    if size == "quick":
        return [Rows(n, LLADA, BF16) for n in (32, 256, 4096)]
    over_rows = [Rows(n, LLADA, BF16) for n in GPU_ROWS]
    over_vocabularies = [Rows(256, v, BF16) for v in GPU_VOCABULARIES]
    return [*over_rows, *over_vocabularies, Rows(256, LLADA, F32)]


def heads(size: str, device: str = DEVICE) -> list[Head]:
    both = (False, True)
    if size == "tiny":
        tiny = [Head(48, 64, TINY, t, trained) for t in (F32, BF16) for trained in both]
        return [*tiny, Head(48, 64, TINY, F32, True, 0.5)]
    if device == "cpu":
        dtypes, vocabularies = (
            ((F32, BF16), (LLADA, SMALL)) if size == "full" else ((F32,), (SMALL,))
        )
        return [Head(512, 256, v, t, x) for v in vocabularies for t in dtypes for x in both]
    largest = [Head(4096, 4096, LLADA, BF16, x) for x in both]
    half = Head(4096, 4096, LLADA, BF16, True, 0.5)
    if size == "quick":
        return [*largest, half]
    smaller = [Head(n, 4096, LLADA, BF16, x) for n in (256, 1024) for x in both]
    others = [Head(1024, 4096, v, BF16, True) for v in (32000, DREAM)]
    return [*largest, half, *smaller, *others]


def canvases(size: str) -> list[tuple[int, int]]:
    """(B, L) of the ops on tokens."""
    return [(64, 256)] if size != "full" else [(64, 256), (512, 1024)]
