"""What the tests of the row ops ask of GPU backends; `run(logits, targets)`: the op's results and its gradient."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu import DEVICE
from row_cases import IGNORED
from torch import Tensor

from igpo.ops import OPS

Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
VOCAB = 126_464  # LLaDA's


def emulated(backend: str) -> bool:
    """Whether a test should keep its shapes small: Triton interpreted, CUDA on the emulator."""
    return backend in ("triton", "cuda") and DEVICE.type == "cpu"


def launcher(op: str, backend: str, phase: str) -> Callable:
    """The function of a row, which takes `out` after the op's own arguments."""
    return next(row.run[phase] for row in OPS[op].backends if row.name == backend)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0))
        for x, y in zip(a, b, strict=True)
    )


def odd_rows(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ordinary rows and one each of: NaN, +inf, all -inf, some -inf, skipped and full of NaN."""
    logits = (torch.randn(7, vocab) * 3).to(dtype)
    targets = torch.randint(0, vocab, (7,))
    logits[1, vocab - 1] = torch.nan
    logits[2, vocab // 2] = torch.inf
    logits[3] = -torch.inf
    logits[4, : vocab // 2] = -torch.inf  # whole parts of the row
    logits[5], targets[5] = torch.nan, IGNORED
    return logits, targets


def assert_rows_do_not_depend_on_their_batch(run: Run, logits: Tensor, targets: Tensor) -> None:
    together = run(logits, targets)
    for row in range(len(targets)):
        alone = run(logits[row : row + 1], targets[row : row + 1])
        assert same(alone, tuple(x[row : row + 1] for x in together)), f"row {row}"


def assert_cuda_is_the_same_everywhere(
    run: Run, monkeypatch: pytest.MonkeyPatch, vocab: int, dtype: torch.dtype
) -> None:
    """With clusters and without, threads in either order, from an aligned address or not. On the emulator."""
    if DEVICE.type != "cpu":
        pytest.skip("the order of threads and the capability are the emulator's to choose")
    logits, targets = odd_rows(vocab, dtype)
    shifted = torch.empty(logits.numel() + 1, dtype=dtype)[1:].view_as(logits).copy_(logits)
    expected = run(logits, targets)
    for capability, order, x in (
        ("90", "reverse", logits),
        ("80", "forward", shifted),
        ("80", "reverse", logits),
    ):
        monkeypatch.setenv("IGPO_EMULATE_CAPABILITY", capability)
        monkeypatch.setenv("IGPO_EMULATE_ORDER", order)
        assert same(run(x, targets), expected), (capability, order)


@contextmanager
def unreadable_row(rows: int, vocab: int, row: int) -> Iterator[Tensor]:
    """(rows, vocab) float32 of which one row lies in memory that may not be read."""
    size = 4 * vocab
    assert size % mmap.PAGESIZE == 0
    memory = mmap.mmap(-1, rows * size)
    logits = torch.frombuffer(memory, dtype=torch.float32).view(rows, vocab)
    logits.normal_()
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    address = ctypes.c_void_p(logits[row].data_ptr())
    assert protect(address, ctypes.c_size_t(size), 0) == 0
    yield logits
    assert protect(address, ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE) == 0


def needs_gpu(count: int = 1, gigabytes: float = 0) -> None:
    """Skips where the test's machine or its backends do not run on (that many) GPUs."""
    if DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device and IGPO_TEST_DEVICE=cuda")
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices")
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def assert_more_than_31_bits_of_elements(run: Run) -> None:
    needs_gpu(gigabytes=14)
    rows = 2**31 // VOCAB + 20
    logits = torch.zeros(rows, VOCAB, dtype=torch.bfloat16)
    logits[-1].normal_()
    targets = torch.full((rows,), IGNORED)
    targets[-1] = 5
    results = run(logits, targets)
    assert same(tuple(x[-1:] for x in results), run(logits[-1:], targets[-1:]))
    assert not any(x[:-1].any() for x in results)


def assert_runs_in_a_graph(run: Run) -> None:
    """Captured once, replayed on other logits."""
    needs_gpu()
    logits = torch.randn(9, VOCAB, dtype=torch.bfloat16)
    targets = torch.randint(0, VOCAB, (9,))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(logits, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(logits, targets)
    for _ in range(2):
        logits.normal_()
        targets.random_(0, VOCAB)
        graph.replay()
        assert same(results, run(logits, targets))


def assert_runs_on_another_stream(run: Run) -> None:
    """What comes before it on that stream is waited for, what is on the default stream is not."""
    needs_gpu()
    source, targets = torch.randn(9, VOCAB), torch.randint(0, VOCAB, (9,))
    expected = run(source * 2, targets)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        results = run(source * 2, targets)
    stream.synchronize()
    assert same(results, expected)


def assert_runs_on_a_device_that_is_not_current(run: Run) -> None:
    needs_gpu(count=2)
    logits, targets = torch.randn(9, 20_000), torch.randint(0, 20_000, (9,))
    expected = run(logits, targets)
    results = run(logits.to("cuda:1"), targets.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in results)
    assert same(tuple(x.to(DEVICE) for x in results), expected)
