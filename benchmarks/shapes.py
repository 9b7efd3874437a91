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


@dataclass(frozen=True)
class Geometry:
    """The shape of a decoder."""

    layers: int
    width: int
    intermediate: int
    heads: int
    vocabulary: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.layers}x{self.width}x{self.vocabulary} {short(self.dtype)}"


LLADA_8B = Geometry(32, 4096, 12288, 32, LLADA, BF16)
SIXTEENTH = Geometry(
    32, 256, 768, 2, LLADA, F32
)  # of its width and heads; depth and vocabulary are the same
TOY = Geometry(2, 64, 128, 2, TINY, F32)


def geometry(size: str, device: str = DEVICE) -> Geometry:
    """Of the programs' model: LLaDA-8B's on a GPU, a sixteenth of its width on a CPU."""
    if size == "tiny":
        return TOY
    return LLADA_8B if device == "cuda" else SIXTEENTH


@dataclass(frozen=True)
class Generation:
    """Rollouts of `batch` canvases of prompt + completion tokens; the clock runs in block `first` and after."""

    model: Geometry
    batch: int
    prompt: int = 200
    completion: int = 256
    block: int = 32
    steps: int = 128
    first: int = 3
    group: int = 8  # rows of a prompt, which the research form denoises at once

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def steps_per_block(self) -> int:
        return self.steps * self.block // self.completion

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt}+{self.completion} {self.model}"


def generations(size: str, device: str = DEVICE) -> list[Generation]:
    model = geometry(size, device)
    if size == "tiny":
        return [Generation(model, 2, 20, 32, 8, 16, 1, 2)]
    if device == "cpu":  # a group of one: eight rows of float64 logits are 18 GB at once
        return [Generation(model, 8, group=1)]
    return [Generation(model, batch) for batch in ((8,) if size == "quick" else (8, 16, 32, 64))]


@dataclass(frozen=True)
class Batch:
    """The training of one rollout batch: `sequences` canvases, `inner` updates, `micro` sequences at a time."""

    model: Geometry
    sequences: int
    prompt: int = 200
    completion: int = 256
    inner: int = 4
    micro: int = (
        4  # chosen: activations of 4 sequences and the weights are about 30 GiB at 8B, not measured
    )
    lora: int = 128

    def __str__(self) -> str:
        return f"{self.sequences}x{self.prompt}+{self.completion} {self.model}"


def training(size: str, device: str = DEVICE) -> list[Batch]:
    model = geometry(size, device)
    if size == "tiny":
        return [Batch(model, 3, 20, 16, 2, 2, 4)]
    if device == "cpu":  # of 64 sequences
        return [Batch(model, 1, micro=1, lora=8)]
    return [Batch(model, 16 if size == "quick" else 64)]
