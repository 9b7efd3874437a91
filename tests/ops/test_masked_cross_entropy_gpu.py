"""masked_cross_entropy on Triton and CUDA: what the other backends do not have."""

from __future__ import annotations

import importlib
import itertools

import gpu_rows
import pytest
import torch
from gpu import on_backend
from gpu_rows import launcher, same
from row_cases import DTYPES, IGNORED, example, leaf, peak_bytes
from torch import Tensor

from igpo.ops import BackendError, masked_cross_entropy, use_backend

REDUCTIONS = ("sum", "mean", "none")


def test_the_backward_pass_allocates_nothing_large() -> None:
    logits, targets = example(2, 2101)
    x = leaf(logits)
    with on_backend("cuda", "masked_cross_entropy"):
        if gpu_rows.DEVICE.type != "cpu":
            pytest.skip("peak_bytes sees the memory of the CPU")
        loss = masked_cross_entropy(x, targets)
        assert peak_bytes(lambda: torch.autograd.grad(loss, x)) < 1000


def test_where_the_gradient_is_computed() -> None:
    """In the forward pass: on CUDA, when there is one to compute for all rows at once, unless float16 could lose it."""
    logits, targets = example(3, 2101)
    with on_backend("cuda", "masked_cross_entropy"):
        for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
            x = leaf(logits.to(dtype))
            loss = masked_cross_entropy(x, targets, reduction=reduction)
            stored = loss.grad_fn.grad
            if dtype == torch.float16 or reduction == "none":
                assert stored is None
                continue
            before = stored.clone()
            (grad,) = torch.autograd.grad(loss, x, torch.tensor(2.0))
            assert grad.data_ptr() == stored.data_ptr()
            assert torch.equal(grad, before * 2)
            assert loss.grad_fn.grad is None
        op = torch.ops.igpo.masked_cross_entropy.default
        (*_, grad) = op(leaf(logits), targets, None, IGNORED, "sum", False)
        assert grad.shape == (0,)
        x = leaf(logits)
        loss = masked_cross_entropy(x, targets)
        stored = loss.grad_fn.grad
    with use_backend("reference"):  # the pass chooses anew; that row has nothing to scale with
        (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, stored)
    with use_backend("cpu"), pytest.raises(BackendError, match="it has no forward_with_gradient"):
        op(logits, targets, None, IGNORED, "sum", True)


def row_run(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Losses of the rows and gradient, from the pass that gives both where there is one, weights in (0.5, 1)."""
    weights = 0.5 + 0.5 / (1 + targets.abs())
    x = leaf(logits)
    loss = masked_cross_entropy(x, targets, weights=weights, reduction="sum")
    losses = masked_cross_entropy(logits, targets, weights=weights, reduction="none")
    return losses, *torch.autograd.grad(loss, [x], torch.full_like(loss, 1.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [700, 2049, 17001])
def test_rows_do_not_depend_on_their_batch(
    gpu_backend: str, dtype: torch.dtype, vocab: int
) -> None:
    gpu_rows.assert_rows_do_not_depend_on_their_batch(row_run, *example(3, vocab, dtype=dtype))


@pytest.mark.parametrize(("dtype", "vocab"), list(zip(DTYPES, (17001, 16392, 1033), strict=True)))
def test_cuda_is_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocab: int
) -> None:
    with on_backend("cuda", "masked_cross_entropy"):
        gpu_rows.assert_cuda_is_the_same_everywhere(row_run, monkeypatch, vocab, dtype)


def with_gradient(backend: str, *args: object) -> tuple[Tensor, ...]:
    """(losses, row_max, log_sum, gradient) from the launcher that the linear ops call."""
    if backend == "cuda":
        return importlib.import_module("igpo.ops.masked_cross_entropy").cuda_forward_with_gradient(
            *args
        )
    return importlib.import_module("igpo.kernels.masked_cross_entropy").forward_with_gradient(*args)


@pytest.mark.parametrize(("dtype", "vocab"), list(zip(DTYPES, (16401, 67, 1100), strict=True)))
def test_both_passes_in_one(gpu_backend: str, dtype: torch.dtype, vocab: int) -> None:
    """As forward and backward, bit for bit; into rows of another stride, and over the logits."""
    logits, targets = example(4, vocab, dtype=dtype)
    weights, divisor = torch.tensor([0.5, 1.0, 2.0, 0.0]), torch.tensor(3)
    forward, backward = (
        launcher("masked_cross_entropy", gpu_backend, phase) for phase in ("forward", "backward")
    )
    stats = forward(logits, targets, weights, IGNORED, "none")
    upstream = torch.tensor(1.0)
    args = (logits, targets, weights, *stats[1:], IGNORED, "mean")
    expected = (*stats, backward(upstream, *args))
    assert same(with_gradient(gpu_backend, logits, targets, weights, IGNORED, divisor), expected)
    wide = torch.full((4, vocab + 6), 7.0, dtype=dtype)
    told = wide[:, 3 : 3 + vocab]
    with_gradient(gpu_backend, logits, targets, weights, IGNORED, divisor, told)
    assert torch.equal(told, expected[3])
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 3 + vocab :] == 7).all()
    again = backward(upstream, *args, logits.clone())
    assert torch.equal(again, expected[3])
    over = with_gradient(gpu_backend, logits, targets, weights, IGNORED, divisor, logits)
    assert over[3] is logits
    assert same(over, expected)


def test_both_passes_in_one_from_float32_to_16_bits(gpu_backend: str) -> None:
    logits, targets = example(3, 2101)
    out = torch.full((3, 2101), torch.nan, dtype=torch.bfloat16)
    *_, grad = with_gradient(gpu_backend, logits, targets, None, IGNORED)
    with_gradient(gpu_backend, logits, targets, None, IGNORED, None, out)
    torch.testing.assert_close(out.float(), grad, rtol=2**-7, atol=1e-30)


@pytest.mark.gpu
def test_more_than_31_bits_of_elements(gpu_backend: str) -> None:
    gpu_rows.assert_more_than_31_bits_of_elements(row_run)


@pytest.mark.gpu
def test_graph(gpu_backend: str) -> None:
    gpu_rows.assert_runs_in_a_graph(row_run)


@pytest.mark.gpu
def test_another_stream(gpu_backend: str) -> None:
    gpu_rows.assert_runs_on_another_stream(row_run)


@pytest.mark.gpu
def test_a_device_that_is_not_current(gpu_backend: str) -> None:
    gpu_rows.assert_runs_on_a_device_that_is_not_current(row_run)
