"""Products of 16-bit factors with float32 results: what the linear ops and the head do where mm writes float32 (CUDA),
here with an mm that does so on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from row_cases import gradients, leaf
from torch import Tensor

from igpo.ops import _linear, _products
from igpo.ops._head import head_logits

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Gives the CPU the float32-result overloads of mm and addmm; the names of those called."""
    found: list[str] = []

    def mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        found.append("mm")
        assert a.dtype == b.dtype != dtype
        return a.to(dtype) @ b.to(dtype)

    def mm_out(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(mm(a, b, dtype))

    def addmm_out(total, a, b, dtype, *, beta=1, alpha=1, out) -> Tensor:
        found.append("addmm")
        assert out is total or out.data_ptr() == total.data_ptr()
        assert beta == alpha == 1
        return out.add_(a.to(dtype) @ b.to(dtype))

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", mm, "CPU")
    library.impl("mm.dtype_out", mm_out, "CPU")
    library.impl("addmm.dtype_out", addmm_out, "CPU")
    monkeypatch.setattr(_products, "WIDE_RESULTS", ["cpu"])
    yield found
    library._destroy()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [False, True])
def test_direct_products_are_those_of_blocks(calls: list[str], monkeypatch, dtype, biased) -> None:
    weight, hidden = torch.randn(53, 7).to(dtype), torch.randn(11, 7).to(dtype)
    grad, bias = torch.randn(11, 53).to(dtype), torch.randn(53) if biased else None
    results = []
    for direct in (True, False):
        monkeypatch.setattr(_products, "WIDE_RESULTS", ["cpu"] if direct else [])
        products = _products.Products(weight, 4 * 8 * 4 * 7)  # blocks of 4 rows of the weight
        states = products.factor(hidden)
        logits = torch.full((11, 53), torch.nan)
        products.logits(states, bias, logits)
        total = torch.full((53, 7), torch.nan)
        products.add_weight_gradient(total, grad[:6], states[:6], first=True)
        products.add_weight_gradient(total, grad[6:], states[6:], first=False)
        results.append((logits, products.hidden_gradient(grad), total))
        assert calls == ["mm", "mm", "addmm", "mm"]
        assert states.dtype == (dtype if direct else torch.float32)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_adds_without_the_overload(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.9 refuses a float32 first argument of addmm."""
    monkeypatch.setattr(_products, "ADDS_TO_WIDE", False)
    a, b, total = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16(), torch.ones(3, 5)
    _products.add_mm(total, a, b, first=False)
    torch.testing.assert_close(total, 1 + a.float() @ b.float())
    assert calls == ["mm"]


def test_half_scale() -> None:
    bound = torch.tensor([0.0, 3e-9, 2e-7])
    assert _products.half_scale(torch.bfloat16, bound) is None
    for value in (bound, bound * 1e9, torch.zeros(3), torch.zeros(0), bound / 0):
        scale = _products.half_scale(torch.float16, value)
        assert scale is not None
        assert scale.log2() == scale.log2().round()
        if value.isfinite().all() and value.any():
            assert 2.0**13 <= scale * value.max() <= 2.0**14
        else:
            assert scale == 1


def test_chunks_on_a_gpu() -> None:
    """Whole tiles of about equal size within the workspace, the more rows the smaller the vocabulary."""
    sizes = {(4096, 126464): 1024, (2049, 126464): 768, (4096, 151936): 768, (100, 126464): 128,
             (4096, 32000): 4096, (10000, 256): 3456, (0, 126464): 128, (4096, 10**7): 128}  # fmt: skip
    assert {key: _linear.gpu_rows(*key) for key in sizes} == sizes


@pytest.mark.parametrize("dtype", HALVES)
def test_head_logits_without_a_widened_weight(calls: list[str], dtype: torch.dtype) -> None:
    hidden, weight = leaf(torch.randn(2, 3, 8).to(dtype)), leaf(torch.randn(19, 8).to(dtype))
    bias = leaf(torch.randn(19).to(dtype))
    exact = [leaf(x.detach().float()) for x in (hidden, weight, bias)]
    logits, truth = head_logits(hidden, weight, bias), head_logits(*exact)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, truth, rtol=1e-6, atol=1e-5)
    found, wanted = (
        gradients((x,), list(leaves))
        for x, leaves in ((logits, (hidden, weight, bias)), (truth, exact))
    )
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)
    assert calls == ["mm"] * 3
    (alone,) = torch.autograd.grad(head_logits(hidden, weight.detach()).sum(), hidden)
    torch.testing.assert_close(alone.float(), exact[1].sum(0).expand(2, 3, 8), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(head_logits(hidden, weight, bias), logits)
