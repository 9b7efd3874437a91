from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from row_cases import DTYPES, IGNORE, gradients_of, head_of, targets_of
from tolerances import assert_as_good_as_torch
from torch import Tensor

from igpo.ops import linear_masked_cross_entropy, masked_cross_entropy, use_backend

REDUCTIONS = ("sum", "mean", "none")
SIZES = [(0, 8, 5), (1, 1, 1), (3, 5, 7), (70, 16, 997), (150, 64, 4099)]  # rows, width, vocabulary


def eager(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, reduction: str
) -> Tensor:
    """The definition, by torch's cross-entropy, in the dtype of its inputs."""
    logits = F.linear(hidden, weight, bias)
    rows = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none") * weights.to(
        logits.dtype
    )
    if reduction == "none":
        return rows
    return rows.sum() / (max(1, int((targets != IGNORE).sum())) if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "width", "vocab"), SIZES, ids=str)
def test_as_good_as_torch(
    backend: str, rows: int, width: int, vocab: int, dtype: torch.dtype, reduction: str, ran
) -> None:
    leaves, targets, weights = (
        head_of(rows, width, vocab, dtype),
        targets_of(rows, vocab),
        torch.rand(rows) * 3,
    )
    upstream = (torch.randn(rows if reduction == "none" else (), dtype=torch.float64),)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_masked_cross_entropy(
            hidden, weight, targets, weights=weights, bias=bias, reduction=reduction
        )

    found = gradients_of(ours, leaves, upstream)
    wide = tuple(x.float() for x in leaves), tuple(x.double() for x in leaves)
    torchs, truth = (
        gradients_of(lambda *x: eager(*x, targets, weights, reduction), w, upstream) for w in wide
    )
    assert found.results[0].dtype == torch.float32
    assert_as_good_as_torch(found.results[0], torchs.results[0], truth.results[0], "loss")
    names = ("hidden", "weight", "bias")
    for name, a, b, c in zip(
        names, found.gradients, torchs.gradients, truth.gradients, strict=True
    ):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b.to(dtype), c, f"gradient of {name}")
    assert (
        ran("linear_logprob" if reduction == "none" else "linear_masked_cross_entropy") == backend
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_is_masked_cross_entropy_of_the_float32_logits(backend: str, reduction: str) -> None:
    hidden, weight, bias = head_of(40, 32, 501, torch.bfloat16)
    targets, weights = targets_of(40, 501), torch.rand(40)
    logits = F.linear(hidden.float(), weight.float(), bias.float())
    ours = linear_masked_cross_entropy(
        hidden, weight, targets, weights=weights, bias=bias, reduction=reduction
    )
    theirs = masked_cross_entropy(logits, targets, weights=weights, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_size_of_chunks_changes_rounding_at_most(backend: str) -> None:
    hidden, weight, _ = head_of(90, 16, 301)
    targets = targets_of(90, 301)
    whole, *others = (
        gradients_of(
            lambda h, w, n=n: linear_masked_cross_entropy(h, w, targets, reduction="mean", chunk_rows=n),
            (hidden, weight), (torch.tensor(1.5),),
        )
        for n in (1000, 1, 7, None)
    )  # fmt: skip
    for other in others:
        for a, b in zip(
            (*other.results, *other.gradients), (*whole.results, *whole.gradients), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_do_not_count_cost_nothing(backend: str, reduction: str) -> None:
    hidden, weight, _ = head_of(30, 16, 101)
    targets, weights = targets_of(30, 101), torch.rand(30) + 0.1
    weights[0] = 0
    skip = (targets == IGNORE) | (weights == 0)
    options = {"weights": weights, "reduction": reduction}
    clean = linear_masked_cross_entropy(hidden, weight, targets, **options)
    hidden[skip] = torch.nan
    found = gradients_of(
        lambda h, w: linear_masked_cross_entropy(h, w, targets, **options),
        (hidden, weight),
        (torch.ones_like(clean),),
    )
    torch.testing.assert_close(found.results[0], clean)
    assert all(g.isfinite().all() for g in found.gradients)
    assert not found.gradients[0][skip].any()


def test_gradients_nobody_asks_for_are_not_made(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias = head_of(9, 8, 31)
    targets, made = targets_of(9, 31), []
    from igpo.ops import _linear

    before = _linear.HeadGradient.__init__

    def spy(self, head, *needs: bool) -> None:
        made.append(list(needs))
        before(self, head, *needs)

    monkeypatch.setattr(_linear.HeadGradient, "__init__", spy)
    for wanted in ([True, False, False], [False, True, False], [True, True, True]):
        leaves = [
            x.clone().requires_grad_(w) for x, w in zip((hidden, weight, bias), wanted, strict=True)
        ]
        linear_masked_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2]).backward()
        assert [x.grad is not None for x in leaves] == wanted
        assert made.pop() == wanted
    with torch.no_grad():
        linear_masked_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2])
    assert made == [[False, False, False]]


def test_the_upstream_gradient_scales_what_was_stored(backend: str) -> None:
    leaves, targets = head_of(20, 8, 31)[:2], targets_of(20, 31)
    one, many = (
        gradients_of(
            lambda h, w: linear_masked_cross_entropy(h, w, targets), leaves, (torch.tensor(scale),)
        )
        for scale in (1.0, 64.0)
    )
    for a, b in zip(one.gradients, many.gradients, strict=True):
        assert torch.equal(a * 64, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_compile(backend: str, reduction: str) -> None:
    targets, weights = targets_of(5, 7), torch.rand(5)
    with use_backend("reference"):
        exact = tuple(x.double().requires_grad_() for x in head_of(5, 4, 7))
        assert torch.autograd.gradcheck(
            lambda h, w, b: linear_masked_cross_entropy(
                h, w, targets, weights=weights.double(), bias=b, reduction=reduction, chunk_rows=2
            ),
            exact,
        )
    leaves = tuple(x.requires_grad_() for x in head_of(5, 4, 7))
    arguments = (*leaves[:2], targets, weights, leaves[2], IGNORE, "mean", 2, [True, True, True])
    torch.library.opcheck(torch.ops.igpo.linear_masked_cross_entropy.default, arguments)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_masked_cross_entropy(
            h, w, targets, weights=weights, bias=b, reduction=reduction
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(7, 5)},
            r"linear_masked_cross_entropy: weight must have shape \(V, 4\) with V > 0",
        ),
        ({"bias": torch.zeros(7).bfloat16()}, r"bias must be float32, got .*bfloat16"),
        (
            {"targets": torch.tensor([0, -3, 1])},
            r"targets must be in \[0, 7\) or ignore_index=-100, got -3",
        ),
        ({"weights": torch.zeros(4)}, r"weights must have shape \(3,\), got shape \(4,\)"),
        ({"weights": torch.zeros(3, requires_grad=True)}, r"weights must not require grad"),
        ({"reduction": "avg"}, "reduction must be one of none, sum, mean, got 'avg'"),
        ({"chunk_rows": -1}, "chunk_rows must be None or > 0, got -1"),
    ],
)
def test_rejects_bad_input(change: dict, message: str) -> None:
    good = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3).long(),
    }
    with pytest.raises(ValueError, match=message):
        linear_masked_cross_entropy(**(good | change))
