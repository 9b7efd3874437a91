"""sample_hint_mask: which chunks of a reference trace to show."""

from __future__ import annotations

import pytest
import torch
from harness import Case, measure
from torch import Tensor

from igpo.ops import sample_hint_mask

RATIO, CHUNK = 0.4, (5, 10)


def research(trace_lengths: Tensor, length: int) -> Tensor:
    """As the released IGPO code: chunk by chunk in Python."""
    mask = torch.zeros(len(trace_lengths), length, dtype=torch.bool)
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
    ends = torch.randint(CHUNK[0], CHUNK[1] + 1, (rows, most)).cumsum(1)
    starts = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), ends[:, :-1]], 1)
    real = starts < trace_lengths[:, None]
    keys = torch.where(real, torch.rand(rows, most), 2.0)
    rank = keys.argsort(1).argsort(1)
    shown = rank < (real.sum(1, keepdim=True) * RATIO).floor()
    chunk = torch.searchsorted(
        ends, torch.arange(length).expand(rows, length).contiguous(), right=True
    )
    return shown.gather(1, chunk.clamp(max=most - 1)) & (
        torch.arange(length) < trace_lengths[:, None]
    )


@pytest.mark.parametrize("provider", ["igpo", "eager", "research"])
@pytest.mark.parametrize("shape", [(64, 256), (512, 1024)], ids=str)
def bench_sample_hint_mask(benchmark, shape: tuple[int, int], provider: str) -> None:
    rows, length = shape
    trace_lengths = torch.randint(length // 2, length, (rows,))

    def gate(mask: Tensor) -> None:
        fraction = (mask.sum(1) / trace_lengths).mean()
        assert 0.3 < fraction < 0.45, f"reveals {fraction:.3f} of the traces at ratio {RATIO}"
        assert not (mask & (torch.arange(length) >= trace_lengths[:, None])).any()

    case = Case(
        name=f"sample_hint_mask {rows}x{length}",
        providers={
            "igpo": lambda: sample_hint_mask(
                trace_lengths, length, ratio=RATIO, chunk_size=CHUNK, seed=1
            ),
            "eager": lambda: eager(trace_lengths, length),
            "research": lambda: research(trace_lengths, length),
        },
        gate=gate,
        bytes=rows * length,
        counted="the mask written once (1 B per position)",
    )
    measure(benchmark, case, provider)
