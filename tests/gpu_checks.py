"""Where an op must give the same on a GPU: on another stream, in a CUDA graph, on a device not current."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def needs_gpu(gib: float = 0) -> None:
    """Skips without a CUDA device of so much memory."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_device_properties(0).total_memory < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


def check_everywhere(
    run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], new: Sequence[Tensor]
) -> None:
    """run(*inputs) bit for bit in each place; a graph captured with inputs and replayed with `new` gives run(*new)."""
    needs_gpu()
    inputs, new = [x.cuda() for x in inputs], [x.cuda() for x in new]
    eager, expected = run(*inputs), run(*new)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, beside, eager))

    held = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*held)
    for values, wanted in ((new, expected), (inputs, eager)):
        for x, value in zip(held, values, strict=True):
            x.copy_(value)
        graph.replay()
        assert all(map(torch.equal, captured, wanted))

    if torch.cuda.device_count() > 1:
        away = run(*(x.to("cuda:1") for x in inputs))
        assert all(torch.equal(x.to("cuda:0"), y) for x, y in zip(away, eager, strict=True))
