"""The chunks and products of the linear ops' GPU rows, and of the head.

mm and addmm write float32 results of 16-bit factors on CUDA alone; here the CPU gets overloads that do so too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu import on_backend
from row_cases import IGNORED, gradients, leaf
from torch import Tensor

from igpo.ops import _linear, _products, linear_logprob, linear_masked_cross_entropy, use_backend
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
    monkeypatch.setattr(_products, "WIDE_RESULTS", ["cuda", "cpu"])
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


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
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
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head_logits(hidden, weight, bias), logits)
    compiled = torch.compile(head_logits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight, bias), logits)


@pytest.fixture(params=["triton", "cuda"])
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    with on_backend(request.param, "linear_logprob"):
        yield request.param


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 4 rows of logits and 8 of their 16-bit gradient at V = 61."""
    monkeypatch.setattr(_linear, "TILE_ROWS", 4)
    monkeypatch.setattr(_linear, "WORKSPACE_BYTES", 61 * 32)


def example(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """17 rows that count: 5 chunks of 4, 4, 4, 4 and 1 rows."""
    tensors = [leaf(torch.randn(n, 6).to(dtype)) for n in (20, 61)]
    targets = torch.randint(0, 61, (20,))
    targets[[1, 5, 19]] = IGNORED
    return [*tensors, leaf(torch.randn(61).to(dtype))], targets


def losses(leaves: list[Tensor], targets: Tensor) -> tuple[Tensor, ...]:
    hidden, weight, bias = leaves
    logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias)
    loss = linear_masked_cross_entropy(hidden, weight, targets, bias=bias, reduction="mean")
    return logprob, entropy, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direct", [False, True])
def test_groups_of_chunks(
    forced: str, small_workspace, dtype: torch.dtype, direct: bool, request, monkeypatch
) -> None:
    """The weight gradient is read and written once per two chunks of a 16-bit head, and is right."""
    leaves, targets = example(dtype)
    on_cpu = leaves[0].is_cpu
    calls = request.getfixturevalue("calls") if direct else []
    groups = []
    add = _products.Products.add_weight_gradient

    def counting(self, total, grad, hidden, *, first):
        groups.append((len(hidden), first))
        add(self, total, grad, hidden, first=first)

    monkeypatch.setattr(_products.Products, "add_weight_gradient", counting)
    outputs = losses(leaves, targets)
    found = gradients(outputs, leaves)
    sizes = [4, 4, 4, 4, 1] if dtype == torch.float32 else [8, 8, 1]
    expected = [(size, i == 0) for i, size in enumerate(sizes)]
    assert groups == expected * 2
    assert bool(calls) == (on_cpu and direct and dtype != torch.float32)
    exact = [leaf(x.detach().double()) for x in leaves]
    with use_backend("reference"):
        truth = losses(exact, targets)
        wanted = gradients(truth, exact)
    for a, b in zip((*outputs, *found), (*truth, *wanted), strict=True):
        tolerance = 2e-5 if a.dtype == torch.float32 else 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_chunk_rows_bounds_the_gradient_too(forced: str, small_workspace) -> None:
    """A chunk_rows that was asked for is the number of rows of the gradient as well."""
    (hidden, weight, _), targets = example(torch.bfloat16)
    head = _linear.Head(
        _linear.CUDA, hidden, weight, None, targets, targets != IGNORED, IGNORED, 3, compact=True
    )
    assert (head.chunk_rows, head.gradient_chunks, head.count) == (3, 1, 17)
    head = _linear.Head(
        _linear.CUDA, hidden, weight, None, targets, targets != IGNORED, IGNORED, 0, compact=False
    )
    assert (head.chunk_rows, head.gradient_chunks, head.count) == (4, 2, 20)


def test_order_of_threads_and_no_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary that is cut into parts, with and without clusters, threads run backwards: the same bits."""
    hidden, weight = torch.randn(2, 4).bfloat16(), torch.randn(16411, 4).bfloat16()
    targets = torch.tensor([16410, 7])

    def run() -> list[Tensor]:
        leaves = [leaf(hidden), leaf(weight)]
        outputs = (
            *linear_logprob(*leaves, targets), linear_masked_cross_entropy(*leaves, targets)
        )  # fmt: skip
        return [x.detach() for x in outputs] + gradients(outputs, leaves)

    with on_backend("cuda", "linear_logprob"):
        plain = run()
        monkeypatch.setenv("IGPO_EMULATE_ORDER", "reverse")
        monkeypatch.setenv("IGPO_EMULATE_CAPABILITY", "80")
        assert all(torch.equal(a, b) for a, b in zip(plain, run(), strict=True))
