from __future__ import annotations

import itertools

import gpu_rows
import pytest
import torch
from gpu_rows import emulated, same
from row_cases import DTYPES, IGNORED, example, gradients, leaf, loss_formula
from tolerances import assert_as_good_as_torch
from torch import Tensor

from igpo.ops import BackendError, masked_cross_entropy, use_backend

REDUCTIONS = ("sum", "mean", "none")
# row shapes and vocabularies: none, one, primes, around vectors (16, 32, 64), tiles (2048) and slices (16384)
SHAPES = [(0, 5), (1, 1), (7, 1), (3, 5, 2), (13, 31), (0, 3, 9), (5, 67), (3, 2049), (2, 16385)]


def elbo_weights(targets: Tensor) -> Tensor:
    """1/t; the last row has weight 0."""
    weights = 1 / torch.linspace(0.1, 1.0, targets.numel()).view(targets.shape)
    weights.view(-1)[-1:] = 0
    return weights


def run(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, reduction: str = "sum"
) -> tuple[Tensor, Tensor]:
    """(loss, gradient of logits)."""
    x = leaf(logits)
    loss = masked_cross_entropy(x, targets, weights=weights, reduction=reduction)
    return loss.detach(), *gradients((loss,), [x])


def run_formula(
    logits: Tensor, targets: Tensor, weights: Tensor | None, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As run, by torch in `dtype`; the gradient arrives in the dtype of logits."""
    x = leaf(logits)
    loss = loss_formula(x.to(dtype), targets, weights, reduction)
    return loss.detach(), *gradients((loss,), [x])


def assert_good(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, reduction: str = "sum"
) -> None:
    ours = run(logits, targets, weights, reduction)
    torchs = run_formula(logits, targets, weights, reduction, torch.float32)
    exact = run_formula(logits.double(), targets, weights, reduction, torch.float64)
    for name, a, b, c in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        assert a.dtype == b.dtype
        assert_as_good_as_torch(a, b, c, name)


def reductions(backend: str) -> tuple[str, ...]:
    """All, or the one that every kernel takes part in, where kernels are slow."""
    return REDUCTIONS[1:2] if emulated(backend) else REDUCTIONS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...], ran) -> None:
    logits, targets = example(*shape, dtype=dtype)
    for reduction in reductions(backend):
        assert_good(logits, targets, elbo_weights(targets), reduction)
    assert ran("masked_cross_entropy") == backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 15, 65, 2047, 16401])
def test_every_instruction_set(isa: str, dtype: torch.dtype, vocab: int) -> None:
    logits, targets = example(4, vocab, dtype=dtype)
    logits[0, :: 3 if vocab > 1 else 2] = -torch.inf
    targets[0] = min(1, vocab - 1)
    assert_good(logits, targets)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 60.0])
def test_ranges(backend: str, shift: float, spread: float) -> None:
    logits, targets = example(5, 3001)
    assert_good(logits * spread + shift, targets, reduction="none")


def test_is_torchs_cross_entropy(backend: str) -> None:
    """Without weights, torch.nn.functional.cross_entropy: "mean" divides by the rows that are not ignored."""
    logits, targets = example(7, 19)
    for reduction in REDUCTIONS:
        theirs = torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)
        ours = masked_cross_entropy(logits, targets, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_mean_divides_by_rows_not_by_weights(backend: str) -> None:
    logits = torch.zeros(4, 2)
    targets = torch.tensor([0, 1, IGNORED, 0])
    weights = torch.tensor([3.0, 0.0, 9.0, 1.5])
    loss = masked_cross_entropy(logits, targets, weights=weights, reduction="mean")
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() * 4.5 / 3, rel=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_gradient_scales(backend: str, reduction: str) -> None:
    logits, targets = example(4, 9)
    x = leaf(logits)
    loss = masked_cross_entropy(x, targets, reduction=reduction).sum()
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, x, torch.tensor(-0.5))
    assert torch.equal(scaled, once * -0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_retained_graph_gives_its_gradient_again(
    backend: str, dtype: torch.dtype, reduction: str
) -> None:
    """Whatever the upstream gradient was before: what a pass returned is the caller's, and is not written again."""
    logits, targets = example(3, 33, dtype=dtype)
    weights = torch.tensor([0.5, 1.0, 2.0])
    x, exact = leaf(logits), leaf(logits.double())
    loss = masked_cross_entropy(x, targets, weights=weights, reduction=reduction).sum()
    truth = loss_formula(exact, targets, weights, reduction).sum()
    (expected,) = torch.autograd.grad(truth, exact)
    factors = (1.0, -3.0, 1.0)
    grads = [torch.autograd.grad(loss, x, torch.tensor(f), retain_graph=True)[0] for f in factors]
    for factor, grad in zip(factors, grads, strict=True):
        tolerance = torch.finfo(dtype).eps * 2
        torch.testing.assert_close(grad.double(), expected * factor, rtol=tolerance, atol=1e-6)
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_rows_that_do_not_count_have_no_gradient_of_any_loss(backend: str, upstream: float) -> None:
    logits, targets = example(4, 9)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    x = leaf(logits)
    loss = masked_cross_entropy(x, targets, weights=weights)
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(upstream))
    assert not grad[1:3].any()
    assert not grad[0].isfinite().any()
    assert not grad[3].isfinite().any()


def test_negative_weights(backend: str) -> None:
    """Advantages may be negative."""
    logits, targets = example(6, 40)
    assert_good(logits, targets, torch.linspace(-2, 2, 6))


def test_special_rows(backend: str) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [0.0, -inf, 1.0, -inf, 2.0],  # the target is finite
            [0.0, -inf, 1.0, -inf, 2.0],  # the target is -inf
            [-inf, -inf, 5.0, -inf, -inf],  # all on one token
            [0.0, nan, 1.0, 2.0, 3.0],
            [0.0, inf, 1.0, 2.0, 3.0],
            [-inf] * 5,
            [-inf, -inf, -inf, nan, -inf],
        ]
    )
    targets = torch.tensor([2, 3, 2, 0, 0, 0, 0])
    loss, grad = run(logits, targets, reduction="none")
    exact, exact_grad = run_formula(logits.double(), targets, None, "none", torch.float64)
    torch.testing.assert_close(loss[:3].double(), exact[:3], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[:3].double(), exact_grad[:3], rtol=1e-6, atol=1e-6)
    assert loss[1] == inf
    assert grad[:3].isfinite().all()
    assert loss[3:].isnan().all()
    assert grad[3:].isnan().all()
    assert masked_cross_entropy(logits[:3], targets[:3]) == inf
    assert masked_cross_entropy(logits, targets).isnan()


@pytest.mark.parametrize(("dtype", "vocab"), list(zip(DTYPES, (17000, 67, 11), strict=True)))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_skipped_rows_are_zero_whatever_they_hold(
    backend: str, dtype: torch.dtype, vocab: int, reduction: str
) -> None:
    """Ignored rows and rows of weight 0."""
    logits, targets = example(6, vocab, dtype=dtype)
    weights = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.5, 1.0])
    skipped = (targets == IGNORED) | (weights == 0)
    clean = run(logits, targets, weights, reduction)
    logits[skipped] = torch.nan
    poisoned = run(logits, targets, weights, reduction)
    assert same(clean, poisoned)
    assert not poisoned[1][skipped].any()
    assert poisoned[1][~skipped].any(-1).all()
    nothing = run(torch.full_like(logits, torch.nan), torch.full((6,), IGNORED), None, reduction)
    assert not any(x.any() for x in nothing)


def test_ignore_index_may_be_a_token(backend: str) -> None:
    logits, _ = example(3, 8)
    loss = masked_cross_entropy(logits, torch.tensor([2, 0, 1]), ignore_index=0, reduction="none")
    assert [x == 0 for x in loss.tolist()] == [False, True, False]


@pytest.mark.parametrize("vocab", [1, 2101])
def test_any_strides_of_the_rows(backend: str, vocab: int) -> None:
    wide, targets = example(3, 4, vocab + 5)
    targets = targets.clamp(max=vocab - 1)
    weights = elbo_weights(targets)
    views = [
        (wide[..., 2 : 2 + vocab], targets, weights),
        (wide[::2, 1:, :vocab], targets[::2, 1:], weights[::2, 1:]),
        (wide.transpose(0, 1)[..., :vocab], targets.t(), weights.t()),
        (wide[:1, :, :vocab].expand(3, 4, vocab), targets, weights[:1].expand(3, 4)),
        (wide[0, 0, :vocab], torch.tensor(0), torch.tensor(0.5)),
    ]
    for (logits, chosen, factors), reduction in itertools.product(views, reductions(backend)):
        before = logits.clone()
        ours = run(logits, chosen, factors, reduction)
        dense = (logits.contiguous(), chosen.contiguous(), factors.contiguous())
        assert same(ours, run(*dense, reduction))
        assert torch.equal(logits, before)


def test_gradient_flows_through_views(backend: str) -> None:
    one = leaf(torch.randn(1, 33))
    targets = torch.arange(6).view(2, 3)
    (grad,) = gradients((masked_cross_entropy(one.expand(6, 33).view(2, 3, 33), targets),), [one])
    exact = leaf(one.double())
    loss = loss_formula(exact.expand(6, 33).view(2, 3, 33), targets, None, "sum")
    torch.testing.assert_close(grad.double(), gradients((loss,), [exact])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "vocab"), [(2, 40001), (301, 53), (17, 20011)])
def test_threads_do_not_change_a_bit(isa: str, threads: int, rows: int, vocab: int) -> None:
    logits, targets = example(rows, vocab)
    weights = elbo_weights(targets)
    together = {r: run(logits, targets, weights, r) for r in REDUCTIONS}
    torch.set_num_threads(1)
    assert all(same(x, run(logits, targets, weights, r)) for r, x in together.items())
    torch.set_num_threads(threads)
    alone = masked_cross_entropy(logits[0], targets[0], weights=weights[0], reduction="none")
    assert torch.equal(together["none"][0][0], alone)


def test_the_sum_over_many_rows_is_exact(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """100000 losses of about 0.69 lose nothing to a float32 running sum."""
    rows = {"triton": 40, "cuda": 1500}[backend] if emulated(backend) else 100_000
    if emulated(backend) and backend == "triton":  # the interpreter takes 10 ms a row
        monkeypatch.setattr("igpo.kernels.masked_cross_entropy.SUM_BLOCK", 16)
    logits = torch.randn(rows, 2) * 1e-3
    targets = torch.zeros(rows, dtype=torch.int64)
    exact = loss_formula(logits.double(), targets, None, "sum").item()
    assert masked_cross_entropy(logits, targets).item() == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("vocab", [1024, 20480])
def test_skipped_rows_are_not_read(backend: str, vocab: int) -> None:
    if not emulated(backend) and backend != "cpu":
        pytest.skip("the reference reads all rows; a GPU does not tell")
    targets, weights = torch.tensor([3, 7, 5]), torch.tensor([1.0, 0.0, 2.0])
    with gpu_rows.unreadable_row(3, vocab, 1) as logits:
        loss, grad = run(logits, targets, weights)
        assert torch.equal(
            loss, run(logits, targets.index_fill(0, torch.tensor(1), IGNORED), weights)[0]
        )
    assert not grad[1].any()
    assert grad[0].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, IGNORED, 2])
    weights = torch.tensor([0.5, 0.0, 1.0, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: masked_cross_entropy(x, targets, weights=weights, reduction=reduction), logits
    )


def test_second_derivatives_are_refused(backend: str) -> None:
    x = leaf(torch.randn(2, 3))
    loss = masked_cross_entropy(x, torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_cross_entropy: second derivatives are not imp"):
        grad.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(backend: str, reduction: str, transposed: bool) -> None:
    logits, targets = example(3, 2, 11)
    weights = elbo_weights(targets)
    if transposed:
        logits, targets, weights = logits.transpose(0, 1), targets.t(), weights.t()
    x, op = leaf(logits), torch.ops.igpo.masked_cross_entropy.default
    torch.library.opcheck(op, (x, targets, weights, IGNORED, reduction, False))
    loss, *stats, _ = op(logits, targets, weights, IGNORED, reduction, False)
    args = (torch.ones_like(loss), logits, targets, weights, *stats, IGNORED, reduction)
    torch.library.opcheck(torch.ops.igpo.masked_cross_entropy_backward.default, args)
    if backend == "cuda" and reduction == "mean":
        torch.library.opcheck(op, (x, targets, weights, IGNORED, reduction, True))


def test_compiles(backend: str) -> None:
    logits, targets = example(5, 37)
    weights = elbo_weights(targets)

    def loss(x: Tensor) -> Tensor:
        return masked_cross_entropy(x * 2, targets, weights=weights, reduction="mean")

    x, y = leaf(logits), leaf(logits)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_cpu_kernels_refuse_float64() -> None:
    with use_backend("cpu"), pytest.raises(BackendError, match="bfloat16 and float16, not float64"):
        masked_cross_entropy(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "masked_cross_entropy: logits must be a tensor, got list"),
        ({"logits": torch.zeros(2, 3).int()}, ValueError, r"logits must be float32 \| bfloat16"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must have a non-empty last dimension"),
        ({"logits": torch.zeros(3, 2).t()}, ValueError, "logits must have a contiguous last .*ous"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"targets must have shape \(2,\), got sh"),
        ({"targets": torch.zeros(2)}, ValueError, "targets must be int64, got shape .*float32"),
        (
            {"targets": torch.tensor([0, 3])},
            ValueError,
            r"be in \[0, 3\) or ignore_.*, got 3\. Set",
        ),
        ({"targets": torch.tensor([-1, 0])}, ValueError, r"in \[0, 3\) or .*=-100, got -1"),
        ({"weights": 2.0}, TypeError, "weights must be a tensor, got float"),
        (
            {"weights": torch.ones(2).bfloat16()},
            ValueError,
            "weights must be float32, got .*bfloat",
        ),
        ({"weights": torch.ones(2, 1)}, ValueError, r"weights must have shape \(2,\), got shape"),
        (
            {"weights": torch.ones(2, requires_grad=True)},
            ValueError,
            r"weights must not require grad .*Call \.detach\(\) first",
        ),
        ({"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean, got 'avg'"),
    ],
)
def test_rejects_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        masked_cross_entropy(**(good | change))
