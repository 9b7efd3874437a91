"""The linear ops at the size of a model, on a GPU: accuracy, memory, waits, streams, graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from gpu import DEVICE, on_backend
from row_cases import IGNORED, leaf
from torch import Tensor

from igpo.ops import linear_logprob, linear_masked_cross_entropy

pytestmark = pytest.mark.gpu

V, D = 126464, 4096
EXTRA = 1.2e9  # bytes that linear_masked_cross_entropy may hold at 4096 rows besides gradients


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    if DEVICE.type != "cuda" or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and IGPO_TEST_DEVICE=cuda")
    with on_backend(request.param, "linear_logprob"):
        yield request.param


@cache
def weight() -> Tensor:
    return (torch.randn(V, D, device="cuda") / 64).bfloat16()


def example(rows: int, ignored: bool = False) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, V, (rows,), device="cuda")
    if ignored:
        targets[1::2] = IGNORED
    return torch.randn(rows, D, device="cuda").bfloat16(), targets


def peak(run: Callable[[], object]) -> int:
    """Bytes held at once beyond what was allocated before, after a first call (cuBLAS allocates its workspace)."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def waits(run: Callable[[], object]) -> int:
    """How often the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in found)


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_accuracy_at_the_size_of_a_model() -> None:
    """Against float64 for some of the rows: log-probabilities as torch's in float32, gradients as of 16-bit factors."""
    hidden, targets = example(1300, ignored=True)
    some = torch.arange(0, 1300, 130, device="cuda")
    x, w = leaf(hidden), leaf(weight())
    logprob, entropy = linear_logprob(x, w, targets)
    of_hidden, of_weight = torch.autograd.grad(logprob.sum() - 0.1 * entropy.sum(), (x, w))
    exact, plain = (
        torch.log_softmax(hidden[some].to(dtype) @ weight().to(dtype).t(), -1)
        for dtype in (torch.float64, torch.float32)
    )
    truth, torchs = (y.gather(-1, targets[some][:, None])[:, 0] for y in (exact, plain))
    error = (logprob[some].double() - truth).abs().max()
    assert error <= 1.5 * (torchs.double() - truth).abs().max() + 1e-5
    p = exact.exp()
    h = -(p * exact).sum(-1)
    torch.testing.assert_close(entropy[some].double(), h, rtol=1e-5, atol=1e-5)
    grad = 0.1 * p * (exact + h[:, None]) - p
    grad[torch.arange(len(some)), targets[some]] += 1
    assert relative(of_hidden[some], grad @ weight().double()) < 4e-3
    tokens = targets[targets != IGNORED][
        :16
    ]  # the gradient of a token's row is mostly its own rows'
    loss = linear_masked_cross_entropy(x, w, targets)
    (also,) = torch.autograd.grad(loss, w)
    kept = targets != IGNORED
    scores = hidden[kept].double() @ weight().double().t()
    share = torch.softmax(scores, -1)[:, tokens] - (targets[kept][:, None] == tokens).double()
    assert relative(also[tokens], share.t() @ hidden[kept].double()) < 4e-3
    assert of_weight.isfinite().all()
    torch.testing.assert_close(loss.double(), -logprob.double().sum(), rtol=1e-6, atol=1e-3)


def test_peak_memory_with_a_frozen_head() -> None:
    """Half of the (N, V) logits alone would be twice as much, and a weight gradient 2.1 GB."""
    hidden, targets = example(4096)
    x = leaf(hidden)

    def loss() -> None:
        linear_masked_cross_entropy(x, weight(), targets).backward()
        x.grad = None

    def logprob() -> None:
        found, entropy = linear_logprob(x, weight(), targets)
        torch.autograd.grad((found - entropy).sum(), x)

    assert peak(loss) <= EXTRA
    assert peak(logprob) <= EXTRA
    with torch.no_grad():
        assert peak(lambda: linear_masked_cross_entropy(x, leaf(weight()), targets)) <= EXTRA


def test_peak_memory_with_a_trained_head() -> None:
    """The weight's gradient in float32, then in its own dtype too, and no third of that size."""
    hidden, targets = example(4096)
    x, w = leaf(hidden), leaf(weight())
    assert peak(lambda: linear_masked_cross_entropy(x, w, targets)) <= EXTRA + 4 * V * D
    both = peak(lambda: torch.autograd.grad(linear_masked_cross_entropy(x, w, targets), (x, w)))
    assert both <= max(EXTRA, 2 * V * D + 1e8) + 4 * V * D


def test_the_host_waits_for_the_number_of_rows_only() -> None:
    hidden, targets = example(64, ignored=True)
    x = leaf(hidden)
    losses, logprobs = [], []
    assert waits(lambda: losses.append(linear_masked_cross_entropy(x, weight(), targets))) == 1
    assert waits(losses[0].backward) == 0
    assert waits(lambda: logprobs.append(linear_logprob(x, weight(), targets)[0].sum())) == 1
    assert waits(logprobs[0].backward) == 1


def step(x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    logprob, entropy = linear_logprob(x, weight(), targets)
    loss = linear_masked_cross_entropy(x, weight(), targets, reduction="mean")
    (grad,) = torch.autograd.grad(loss + (logprob - entropy).sum(), x)
    return logprob.detach(), entropy.detach(), loss.detach(), grad


def test_compiled_code_does_not_wait() -> None:
    x, (_, targets) = leaf(example(64)[0]), example(64, ignored=True)
    compiled = torch.compile(
        lambda x: linear_masked_cross_entropy(x, weight(), targets), fullgraph=True
    )
    compiled(x).backward()
    assert waits(lambda: compiled(x).backward()) == 0
    torch.testing.assert_close(compiled(x), linear_masked_cross_entropy(x, weight(), targets))


def test_in_a_graph() -> None:
    """Captured with some rows ignored, replayed with others."""
    x, (_, targets) = leaf(example(64)[0]), example(64, ignored=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, targets)
    _, others = example(64)
    others[::3] = IGNORED
    with torch.no_grad():
        targets.copy_(others)
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(x, others), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert not captured[3][others == IGNORED].any()


def test_on_another_stream_and_device() -> None:
    x, (_, targets) = leaf(example(64)[0]), example(64, ignored=True)
    here = step(x, targets)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = step(x, targets)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    if torch.cuda.device_count() > 1:
        y, w = leaf(x.detach().to("cuda:1")), weight().to("cuda:1")
        found = linear_masked_cross_entropy(y, w, targets.to("cuda:1"), reduction="mean")
        torch.testing.assert_close(found.cpu(), here[2].cpu())


def test_rows_that_do_not_count_cost_nothing() -> None:
    """Half of the rows ignored: half of the chunk, so half of the memory."""
    hidden, targets = example(1024)
    few = targets.clone()
    few[1::2] = IGNORED
    x = leaf(hidden)
    whole, half = (
        peak(lambda t=t: linear_masked_cross_entropy(x, weight(), t).backward())
        for t in (targets, few)
    )
    assert half <= 0.6 * whole
