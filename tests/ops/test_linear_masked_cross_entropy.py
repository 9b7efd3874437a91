from __future__ import annotations

import pytest
import torch
from gpu import is_slow
from row_cases import DTYPES, IGNORED, gradients, leaf, loss_formula, memory_sizes, peak_bytes
from tolerances import assert_as_good_as_torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from igpo.ops import BackendError, linear_masked_cross_entropy, masked_cross_entropy, use_backend

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
NAME = "linear_masked_cross_entropy"
REDUCTIONS = ("sum", "mean", "none")

# row shape, D, V: none, one, primes, more than the default chunk of 64 rows
SHAPES = [
    ((0,), 3, 5),
    ((1,), 1, 1),
    ((3, 5), 7, 31),
    ((0, 2), 4, 3),
    ((131,), 17, 257),
    ((), 8, 9),
]


def quick(shape: tuple, backend: str) -> tuple:
    """shape, with fewer rows where each takes milliseconds."""
    rows, width, vocab = shape
    return (tuple(min(n, 13) for n in rows) if is_slow(backend) else rows), width, vocab


def example(rows: tuple[int, ...], width: int, vocab: int, dtype=torch.float32) -> Inputs:
    """hidden, weight, bias, targets, weights: every third row is ignored, every fifth has weight 0."""
    hidden = torch.randn(*rows, width).to(dtype)
    weight = torch.randn(vocab, width).to(dtype)
    targets = torch.randint(0, vocab, rows)
    targets.reshape(-1)[1::3] = IGNORED
    weights = torch.rand(rows) + 0.5
    weights.view(-1)[4::5] = 0
    return hidden, weight, torch.randn(vocab).to(dtype), targets, weights


def skipped(inputs: Inputs) -> Tensor:
    return (inputs[3] == IGNORED) | (inputs[4] == 0)


def widened(inputs: Inputs) -> Inputs:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)  # type: ignore[return-value]


def run(inputs: Inputs, reduction: str = "sum", **options) -> list[Tensor]:
    """[loss, gradient of hidden, of weight, of bias]."""
    hidden, weight, bias = (leaf(x) for x in inputs[:3])
    loss = linear_masked_cross_entropy(
        hidden, weight, inputs[3], weights=inputs[4], bias=bias, reduction=reduction, **options
    )
    return [loss.detach(), *gradients((loss,), [hidden, weight, bias])]


def run_formula(inputs: Inputs, reduction: str, dtype: torch.dtype) -> list[Tensor]:
    """As run, by torch in `dtype`, with all logits at once."""
    leaves = [leaf(x) for x in inputs[:3]]
    hidden = leaves[0].to(dtype).masked_fill(skipped(inputs)[..., None], 0.0)
    logits = hidden @ leaves[1].to(dtype).t() + leaves[2].to(dtype)
    loss = loss_formula(logits, inputs[3], inputs[4], reduction)
    return [loss.detach(), *gradients((loss,), leaves)]


def assert_good(inputs: Inputs, reduction: str = "sum", **options) -> None:
    ours = run(inputs, reduction, **options)
    torchs = run_formula(inputs, reduction, torch.float32)
    exact = run_formula(widened(inputs), reduction, torch.float64)
    names = ("loss", "hidden.grad", "weight.grad", "bias.grad")
    for name, a, b, c in zip(names, ours, torchs, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_as_good_as_torch(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_matches_float64(
    backend: str, dtype: torch.dtype, shape: tuple, reduction: str, ran
) -> None:
    assert_good(example(*quick(shape, backend), dtype=dtype), reduction)
    assert (
        ran("linear_logprob" if reduction == "none" else "linear_masked_cross_entropy") == backend
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    assert_good(example((37,), 19, 2053, dtype=dtype))


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000])
def test_any_chunk(backend: str, chunk_rows: int) -> None:
    assert_good(example(*quick(((67,), 12, 101), backend)), "mean", chunk_rows=chunk_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_matmul_then_masked_cross_entropy(backend: str, dtype: torch.dtype) -> None:
    inputs = example((33,), 24, 513, dtype=dtype)
    hidden, weight, _, targets, weights = inputs
    logits = hidden.float() @ weight.float().t()
    for reduction in REDUCTIONS:
        options = {"weights": weights, "reduction": reduction}
        ours = linear_masked_cross_entropy(hidden, weight, targets, **options)
        whole = masked_cross_entropy(logits, targets, **options)
        torch.testing.assert_close(ours, whole, rtol=2e-6, atol=2e-6)


def test_mean_divides_by_rows_not_by_weights(backend: str) -> None:
    hidden, weight = torch.zeros(4, 3), torch.randn(2, 3)
    targets, weights = torch.tensor([0, 1, IGNORED, 0]), torch.tensor([3.0, 0.0, 9.0, 1.5])
    loss = linear_masked_cross_entropy(hidden, weight, targets, weights=weights, reduction="mean")
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() * 4.5 / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_upstream_gradient_scales_before_rounding(backend: str, dtype: torch.dtype) -> None:
    """A loss scale of 2^-20 and back: in float16 the gradients would vanish if they were rounded before scaling."""
    hidden, weight, _, targets, _ = example((4,), 6, 9, dtype=dtype)
    x = leaf(hidden)
    loss = linear_masked_cross_entropy(x, weight, targets) * 2.0**-20
    (once,) = torch.autograd.grad(loss, x, torch.tensor(2.0**20), retain_graph=True)
    (twice,) = torch.autograd.grad(loss, x, torch.tensor(2.0**21))  # the graph may be used again
    (plain,) = torch.autograd.grad(linear_masked_cross_entropy(x, weight, targets), x)
    assert torch.equal(once, plain)
    torch.testing.assert_close(twice, plain * 2)


def test_threads(threads: int) -> None:
    """The products are torch's, which may differ in the last bits with the number of threads."""
    inputs = example((70,), 33, 1031)
    together = run(inputs)
    torch.set_num_threads(1)
    for a, b in zip(together, run(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_skipped_rows_are_zero_whatever_they_hold(backend: str, reduction: str) -> None:
    """Ignored rows and rows of weight 0."""
    inputs = example((5, 4), 6, 29)
    clean = run(inputs, reduction)
    skip = skipped(inputs)
    inputs[0][skip] = torch.nan
    poisoned = run(inputs, reduction)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert not poisoned[1][skip].any()
    assert poisoned[1][~skip].any(-1).all()
    nothing = run((*inputs[:3], torch.full_like(inputs[3], IGNORED), inputs[4]), reduction)
    assert not any(x.any() for x in nothing)


def test_suppressed_tokens_and_nan_rows(backend: str) -> None:
    """A bias of -inf suppresses a token (as a target it costs inf); NaN in a row of hidden stays in its gradient."""
    hidden, weight, bias, _, _ = example((4,), 5, 11)
    bias[3] = -torch.inf
    targets, ones = torch.tensor([1, 3, 0, 2]), torch.ones(4)
    assert_good((hidden, weight, bias, targets, ones), "none")
    assert run((hidden, weight, bias, targets, ones))[0] == torch.inf
    hidden[2] = torch.nan
    loss, of_hidden, *_ = run((hidden, weight, bias, targets, ones))
    assert loss.isnan()
    assert of_hidden.isnan().any(-1).tolist() == [False, False, True, False]


def test_strides_and_views(backend: str) -> None:
    """hidden with gaps between rows and permuted, weight transposed, everything expanded."""
    hidden, weight, bias, targets, weights = example((4, 6), 10, 23)
    wide = torch.randn(4, 6, 13)
    wide[..., :10] = hidden
    views: list[Inputs] = [
        (wide[..., :10], weight.t().contiguous().t(), bias, targets, weights),
        (hidden.transpose(0, 1), weight, bias, targets.t(), weights.t()),
        (hidden[:1].expand(4, 6, 10), weight, bias[:1].expand(23), targets, weights),
    ]
    for inputs in views:
        before = [x.clone() for x in inputs]
        dense = run(tuple(x.contiguous() for x in inputs))  # type: ignore[arg-type]
        for a, b in zip(run(inputs), dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_the_gradients_needed(backend: str, needs: tuple[int, int, int]) -> None:
    inputs = example((9,), 6, 21)
    whole = run(inputs)[1:]
    tensors = [x.clone().requires_grad_(bool(n)) for x, n in zip(inputs[:3], needs, strict=True)]
    loss = linear_masked_cross_entropy(
        tensors[0], tensors[1], inputs[3], bias=tensors[2], weights=inputs[4]
    )
    some = gradients((loss,), [x for x in tensors if x.requires_grad])
    wanted = [g for g, n in zip(whole, needs, strict=True) if n]
    assert all(torch.equal(a, b) for a, b in zip(some, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_left_in_change_nothing(backend: str, dtype: torch.dtype) -> None:
    """The form for CUDA graphs computes the rows that do not count and drops them."""
    hidden, weight, bias, targets, weights = example(*quick(((67,), 8, 101), backend), dtype=dtype)
    skip = (targets == IGNORED) | (weights == 0)
    hidden[skip], weights[targets == IGNORED] = torch.nan, torch.inf
    found = []
    for compact in (True, False):
        leaves = [leaf(hidden), leaf(weight), leaf(bias)]
        options = (leaves[2], IGNORED, "mean", 5, compact, [True] * 3)
        loss = torch.ops.igpo.linear_masked_cross_entropy(*leaves[:2], targets, weights, *options)[
            0
        ]
        found.append([loss.detach(), *gradients((loss,), leaves)])
    assert not found[1][1][skip].any()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(backend: str, reentrant: bool) -> None:
    inputs = example((9,), 6, 21)
    tensors = [leaf(x) for x in inputs[:3]]

    def forward(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_masked_cross_entropy(hidden, weight, inputs[3], bias=bias)

    plain = torch.autograd.grad(forward(*tensors), tensors)
    checkpoint(forward, *tensors, use_reentrant=reentrant).backward()  # type: ignore[union-attr]
    assert all(torch.equal(a, x.grad) for a, x in zip(plain, tensors, strict=True))


def test_no_gradient_no_work(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients to compute, the gradient of the logits is not computed either."""

    def fail(*_: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr("igpo.ops._linear.RowOp.loss_gradient", fail)
    hidden, weight, _, targets, _ = example((5,), 4, 9)
    linear_masked_cross_entropy(hidden, weight, targets)
    with torch.no_grad():
        linear_masked_cross_entropy(leaf(hidden), leaf(weight), targets)
    with pytest.raises(AssertionError, match="a gradient was computed"):
        linear_masked_cross_entropy(leaf(hidden), weight, targets)


def test_small_gradients_survive_float16(backend: str) -> None:
    """A mean over many rows, each flat over 20000 tokens: all but the targets' gradients are below 1e-8."""
    hidden, weight = torch.randn(4, 4).half() / 64, torch.randn(20011, 4).half()
    targets, weights = torch.tensor([5, 6, 7, 8]), torch.full((4,), 1e-3)

    def gradient(x: Tensor) -> Tensor:
        w = weights.to(torch.promote_types(x.dtype, torch.float32))
        loss = linear_masked_cross_entropy(
            x, weight.to(x.dtype), targets, weights=w, reduction="mean", chunk_rows=2
        )
        return torch.autograd.grad(loss, x)[0]

    with use_backend("reference"):
        exact = gradient(leaf(hidden.double()))
    torch.testing.assert_close(gradient(leaf(hidden)).double(), exact, rtol=1e-3, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory(backend: str, dtype: torch.dtype) -> None:
    """A frozen head: an eighth of the float32 logits (the reference makes temporaries of a chunk, Triton's
    interpreter copies of its arguments), no weight gradient;
    without gradients no more than that either."""
    width, (rows, vocab, chunk_rows) = 16, memory_sizes(backend)
    hidden, weight, _, _, _ = example((rows,), width, vocab, dtype=dtype)
    targets, x = torch.randint(0, vocab, (rows,)), leaf(hidden)
    eighth = rows * vocab * 4 / 8
    eighth *= 6 if backend == "reference" else 2 if backend == "triton" else 1

    def loss(w: Tensor) -> Tensor:
        return linear_masked_cross_entropy(x, w, targets, chunk_rows=chunk_rows)

    assert peak_bytes(lambda: loss(weight).backward()) <= eighth
    with torch.no_grad():
        assert peak_bytes(lambda: loss(leaf(weight))) <= eighth


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    *tensors, targets, weights = widened(example((5,), 3, 6))
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_masked_cross_entropy(
            h, w, targets, bias=b, weights=weights, reduction=reduction, chunk_rows=2
        ),
        [leaf(x) for x in tensors],
    )


def test_second_derivatives_are_refused(backend: str) -> None:
    hidden, weight, _, targets, _ = example((2,), 3, 4)
    x = leaf(hidden)
    loss = linear_masked_cross_entropy(x, weight, targets)
    (grad,) = torch.autograd.grad(loss**2, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{NAME}: second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False]])
def test_opcheck(backend: str, needs: list[bool]) -> None:
    hidden, weight, bias, targets, weights = example((3, 2), 4, 11)
    tensors = [leaf(x) if n else x for x, n in zip((hidden, weight, bias), needs, strict=True)]
    op = torch.ops.igpo.linear_masked_cross_entropy.default
    args = (*tensors[:2], targets, weights, tensors[2], IGNORED, "mean", 2, True, needs)
    torch.library.opcheck(op, args)
    backward = torch.ops.igpo.linear_masked_cross_entropy_backward.default
    torch.library.opcheck(backward, (hidden, torch.tensor(0.5), torch.bfloat16))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles(backend: str, reduction: str) -> None:
    hidden, weight, bias, targets, weights = example((5,), 7, 37)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_masked_cross_entropy(
            h * 2, w, targets, bias=bias, weights=weights, reduction=reduction
        ).sum()

    a, b = [leaf(hidden), leaf(weight)], [leaf(hidden), leaf(weight)]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*a).backward()
    loss(*b).backward()
    for x, y in zip(a, b, strict=True):  # on a GPU compiled code computes all rows
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_narrow(backend: str) -> None:
    inputs = example((5,), 64, 33)
    plain = run(inputs)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        under = run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_cpu_kernels_refuse_float64() -> None:
    hidden, weight = torch.zeros(1, 2).double(), torch.zeros(3, 2).double()
    with use_backend("cpu"), pytest.raises(BackendError, match="bfloat16 and float16, not float64"):
        linear_masked_cross_entropy(hidden, weight, torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType"),
        ({"hidden": torch.zeros(4, 2).t()}, ValueError, "hidden must have a contiguous last dim"),
        ({"weight": torch.zeros(3, 4).half()}, ValueError, "weight must be float32, got .*float16"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight must have shape \(V, 4\) with V > 0"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(3,\), got shape \(4,\)"),
        ({"targets": torch.zeros(2)}, ValueError, "targets must be int64, got shape .*float32"),
        (
            {"targets": torch.tensor([0, 3])},
            ValueError,
            r"targets must be in \[0, 3\) or ign.*got 3",
        ),
        (
            {"targets": torch.tensor([0, 3]), "reduction": "none"},
            ValueError,
            r"targets must be in \[0, 3\) or ign.*got 3",
        ),
        ({"weights": torch.ones(2).half()}, ValueError, "weights must be float32, got .*float16"),
        (
            {"weights": torch.ones(2, requires_grad=True)},
            ValueError,
            r"weights must not require grad .*Call \.detach\(\) first",
        ),
        ({"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean, got 'avg'"),
        ({"chunk_rows": -1}, ValueError, "chunk_rows must be None or > 0, got -1"),
    ],
)
def test_rejects_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    # without a reduction the rows are those of linear_logprob, which looks at the targets
    with pytest.raises(error, match=f"({NAME}|linear_logprob): {message}"):
        linear_masked_cross_entropy(**(good | change))
