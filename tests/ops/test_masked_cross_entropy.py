from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from row_cases import DTYPES, IGNORE, SIZES, gradients_of, logits_of, targets_of
from tolerances import assert_as_good_as_torch
from torch import Tensor

from igpo.ops import masked_cross_entropy, token_logprob, use_backend

REDUCTIONS = ("sum", "mean", "none")


def eager(logits: Tensor, targets: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """The definition, by torch's cross-entropy."""
    rows = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    if weights is not None:
        rows = rows * weights.to(rows.dtype)
    if reduction == "none":
        return rows
    return rows.sum() / (max(1, int((targets != IGNORE).sum())) if reduction == "mean" else 1)


def check(logits: Tensor, targets: Tensor, weights: Tensor | None, reduction: str) -> None:
    upstream = (torch.randn(targets.shape if reduction == "none" else (), dtype=torch.float64),)

    def ours(x: Tensor) -> Tensor:
        return masked_cross_entropy(x, targets, weights=weights, reduction=reduction)

    found = gradients_of(ours, (logits,), upstream)
    torchs = gradients_of(
        lambda x: eager(x, targets, weights, reduction), (logits.float(),), upstream
    )
    truth = gradients_of(
        lambda x: eager(x, targets, weights, reduction), (logits.double(),), upstream
    )
    assert found.results[0].dtype == torch.float32
    assert_as_good_as_torch(found.results[0], torchs.results[0], truth.results[0], "loss")
    gradient = found.gradients[0]
    assert gradient.dtype == logits.dtype
    assert_as_good_as_torch(
        gradient, torchs.gradients[0].to(logits.dtype), truth.gradients[0], "gradient"
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SIZES, ids=str)
def test_as_good_as_torch(backend: str, rows: int, vocab: int, dtype: torch.dtype, ran) -> None:
    logits, targets = logits_of(rows, vocab, dtype), targets_of(rows, vocab)
    for reduction in REDUCTIONS:
        check(logits, targets, None, reduction)
        check(logits, targets, torch.rand(rows) * 4, reduction)
    assert ran("masked_cross_entropy") == backend


@pytest.mark.parametrize("spread", [1e-3, 60.0, 3e4])
def test_any_scale_of_logits(isa: str, spread: float) -> None:
    check(logits_of(5, 777, spread=spread), targets_of(5, 777), torch.rand(5), "sum")


def test_is_minus_the_weighted_token_logprob(backend: str) -> None:
    logits, targets, weights = logits_of(9, 501), targets_of(9, 501), torch.rand(9)
    logprob, _ = token_logprob(logits, targets)
    rows = masked_cross_entropy(logits, targets, weights=weights, reduction="none")
    torch.testing.assert_close(rows, -logprob * weights)
    total = masked_cross_entropy(logits, targets, weights=weights)
    torch.testing.assert_close(total, rows.double().sum().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_do_not_count_are_not_read(backend: str, reduction: str) -> None:
    logits, targets, weights = logits_of(8, 333), targets_of(8, 333), torch.rand(8) + 0.5
    weights[0] = 0
    skip = (targets == IGNORE) | (weights == 0)
    clean = masked_cross_entropy(logits, targets, weights=weights, reduction=reduction)
    logits[skip] = torch.nan
    upstream = (torch.ones_like(clean),)
    found = gradients_of(
        lambda x: masked_cross_entropy(x, targets, weights=weights, reduction=reduction), (logits,), upstream
    )  # fmt: skip
    assert torch.equal(found.results[0], clean)
    assert found.gradients[0].isfinite().all()
    assert not found.gradients[0][skip].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_counts(backend: str, reduction: str) -> None:
    logits, targets = logits_of(3, 5), torch.full((3,), IGNORE)
    shape = (3,) if reduction == "none" else ()
    found = gradients_of(
        lambda x: masked_cross_entropy(x, targets, reduction=reduction), (logits,), (torch.ones(shape),)
    )  # fmt: skip
    assert torch.equal(found.results[0], torch.zeros(shape))
    assert not found.gradients[0].any()


def test_rows_without_a_distribution(backend: str) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[0.0, -inf, 1.0], [0.0, nan, 1.0], [-inf, -inf, -inf], [0.0, inf, 1.0]])
    targets = torch.tensor([1, 0, 0, 0])
    found = gradients_of(
        lambda x: masked_cross_entropy(x, targets, reduction="none"), (logits,), (torch.ones(4),)
    )
    assert found.results[0][0] == inf
    assert found.results[0][1:].isnan().all()
    torch.testing.assert_close(found.gradients[0][0], torch.tensor([0.268941, -1.0, 0.731059]))


def test_leading_dimensions_and_strides(backend: str) -> None:
    base, targets = logits_of(24, 200).view(4, 6, 200), targets_of(24, 150).view(4, 6)
    weights = torch.rand(6, 4).t()
    for view in (
        base[:, :, 25:175],
        base[:, :, :150].transpose(0, 1).transpose(0, 1),
        base[:1, :, 50:].expand(4, 6, 150),
    ):
        plain = masked_cross_entropy(
            view.contiguous(), targets.contiguous(), weights=weights.contiguous()
        )
        assert torch.equal(masked_cross_entropy(view, targets, weights=weights), plain)
    view = base[:, :, 25:175]
    found = gradients_of(lambda x: masked_cross_entropy(x[:, :, 25:175], targets, weights=weights), (base,),
                         (torch.ones(()),))  # fmt: skip
    dense = gradients_of(
        lambda x: masked_cross_entropy(x, targets, weights=weights), (view,), (torch.ones(()),)
    )
    assert torch.equal(found.gradients[0][:, :, 25:175], dense.gradients[0])
    assert not found.gradients[0][:, :, :25].any()


def test_results_do_not_depend_on_threads(isa: str, threads: int) -> None:
    logits, targets, weights = (
        logits_of(9, 20011, torch.bfloat16),
        targets_of(9, 20011),
        torch.rand(9),
    )
    found = gradients_of(
        lambda x: masked_cross_entropy(x, targets, weights=weights), (logits,), (torch.ones(()),)
    )
    torch.set_num_threads(1)
    again = gradients_of(
        lambda x: masked_cross_entropy(x, targets, weights=weights), (logits,), (torch.ones(()),)
    )
    assert torch.equal(found.results[0], again.results[0])
    assert torch.equal(found.gradients[0], again.gradients[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_compile(backend: str, reduction: str) -> None:
    targets, weights = targets_of(4, 6), torch.rand(4)
    with use_backend("reference"):
        exact = logits_of(4, 6).double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: masked_cross_entropy(
                x, targets, weights=weights.double(), reduction=reduction
            ),
            exact,
        )
    logits = logits_of(4, 6).requires_grad_()
    arguments = (logits, targets, weights, IGNORE, reduction)
    torch.library.opcheck(torch.ops.igpo.masked_cross_entropy.default, arguments)

    def loss(x: Tensor) -> Tensor:
        return masked_cross_entropy(x, targets, weights=weights, reduction=reduction).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logits), logits)
    (found,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(4, 3).t()},
            r"masked_cross_entropy: logits must have a contiguous last dimension",
        ),
        ({"targets": torch.zeros(2).long()}, r"targets must have shape \(3,\), got shape \(2,\)"),
        (
            {"targets": torch.tensor([0, 4, 1])},
            r"targets must be in \[0, 4\) or ignore_index=-100, got 4",
        ),
        ({"weights": torch.ones(2)}, r"weights must have shape \(3,\), got shape \(2,\)"),
        ({"weights": torch.ones(3).double()}, r"weights must be float32, got .*float64"),
        (
            {"weights": torch.ones(3, requires_grad=True)},
            r"weights must not require grad .*Call .detach\(\) first",
        ),
        ({"reduction": "avg"}, "reduction must be one of none, sum, mean, got 'avg'"),
    ],
)
def test_rejects_bad_input(change: dict, message: str) -> None:
    good = {"logits": torch.zeros(3, 4), "targets": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        masked_cross_entropy(**(good | change))
