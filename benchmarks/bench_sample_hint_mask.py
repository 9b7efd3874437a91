"""sample_hint_mask: which chunks of a reference trace to show."""

from __future__ import annotations

import torch
from harness import Case, measure, providers
from shapes import DEVICE
from torch import Tensor

from igpo.ops import sample_hint_mask

RATIO, CHUNK = 0.4, (5, 10)


def research(trace_lengths: Tensor, length: int) -> Tensor:
    """As the released IGPO code: chunk by chunk in Python."""
    mask = torch.zeros(len(trace_lengths), length, dtype=torch.bool, device=DEVICE)
    for row, total in enumerate(trace_lengths.tolist()):
        starts = [0]
        while starts[-1] < total:
            starts.append(min(total, starts[-1] + int(torch.randint(CHUNK[0], CHUNK[1] + 1, ()))))
        chunks = len(starts) - 1
        for chunk in torch.randperm(chunks)[: int(RATIO * chunks)].tolist():
            mask[row, starts[chunk] : starts[chunk + 1]] = True
    return mask


def eager(trace_lengths: Tensor, length: int) -> Tensor:
    """The whole batch at once: cumulative chunk sizes, random keys, ranks."""
    rows, most = len(trace_lengths), -(-length // CHUNK[0])
    ends = torch.randint(CHUNK[0], CHUNK[1] + 1, (rows, most), device=DEVICE).cumsum(1)
    starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
    real = starts < trace_lengths[:, None]
    keys = torch.where(real, torch.rand(rows, most, device=DEVICE), 2.0)
    rank = keys.argsort(1).argsort(1)
    shown = rank < (real.sum(1, keepdim=True) * RATIO).floor()
    at = torch.arange(length, device=DEVICE)
    chunk = torch.searchsorted(ends, at.expand(rows, length).contiguous(), right=True)
    return shown.gather(1, chunk.clamp(max=most - 1)) & (at < trace_lengths[:, None])


def ours(trace_lengths: Tensor, length: int) -> Tensor:
    return sample_hint_mask(trace_lengths, length, ratio=RATIO, chunk_size=CHUNK, seed=1)


def bench_sample_hint_mask(benchmark, request, canvas: tuple[int, int]) -> None:
    rows, length = canvas
    trace_lengths = torch.randint(length // 2, length, (rows,), device=DEVICE)

    def gate(mask: Tensor) -> None:
        fraction = (mask.sum(1) / trace_lengths).mean()
        assert 0.3 < fraction < 0.45, f"reveals {fraction:.3f} of the traces at ratio {RATIO}"
        outside = torch.arange(length, device=DEVICE) >= trace_lengths[:, None]
        assert not (mask & outside).any()

    functions = {"igpo": ours, "eager": eager, "research": research}
    found, skipped = providers(
        "sample_hint_mask", request, functions, lambda f: f(trace_lengths, length)
    )
    measure(
        benchmark,
        Case(
            op="sample_hint_mask",
            axes={"problem": f"{rows}x{length}", "variant": ""},
            providers=found,
            gate=gate,
            bytes=rows * length,
            counted="the mask written once (1 B per position); integer work",
            skipped=skipped,
        ),
    )
