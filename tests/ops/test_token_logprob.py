from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import DTYPES, IGNORE, SIZES, gradients_of, logits_of, targets_of
from tolerances import assert_as_good_as_torch
from torch import Tensor

from igpo.ops import token_logprob, use_backend


def eager(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The definition, in the statistics' dtype of torch."""
    skip = targets == IGNORE
    logp = torch.log_softmax(logits / temperature, -1)
    chosen = logp.gather(-1, targets.masked_fill(skip, 0)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return chosen.masked_fill(skip, 0), entropy.masked_fill(skip, 0)


def check(logits: Tensor, targets: Tensor, temperature: float) -> None:
    """Results and gradients at least as near to float64 as torch's in float32."""
    upstream = torch.randn(2, *targets.shape, dtype=torch.float64).unbind()
    ours = gradients_of(
        lambda x: token_logprob(x, targets, temperature=temperature), (logits,), upstream
    )
    torchs = gradients_of(lambda x: eager(x, targets, temperature), (logits.float(),), upstream)
    truth = gradients_of(lambda x: eager(x, targets, temperature), (logits.double(),), upstream)
    for name, a, b, c in zip(
        ("logprob", "entropy"), ours.results, torchs.results, truth.results, strict=True
    ):
        assert a.dtype == torch.float32
        assert_as_good_as_torch(a, b, c, name)
    (gradient,) = ours.gradients
    assert gradient.dtype == logits.dtype
    assert_as_good_as_torch(
        gradient, torchs.gradients[0].to(logits.dtype), truth.gradients[0], "gradient"
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SIZES, ids=str)
def test_as_good_as_torch(backend: str, rows: int, vocab: int, dtype: torch.dtype, ran) -> None:
    check(logits_of(rows, vocab, dtype), targets_of(rows, vocab), 1.0)
    assert ran("token_logprob") == backend


@pytest.mark.parametrize("temperature", [0.05, 0.8, 1.7])
def test_temperature(backend: str, temperature: float) -> None:
    check(logits_of(5, 1003), targets_of(5, 1003), temperature)


@pytest.mark.parametrize("spread", [1e-3, 60.0, 3e4])
def test_any_scale_of_logits(isa: str, spread: float) -> None:
    check(logits_of(5, 777, spread=spread), targets_of(5, 777), 1.0)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 300),
    st.integers(0, 2**31),
    st.sampled_from(["cpu", "reference"]),
)
def test_properties(rows: int, vocab: int, seed: int, name: str) -> None:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    every = torch.arange(vocab)
    with use_backend(name):
        logprob, entropy = token_logprob(
            logits[:, None].expand(-1, vocab, -1), every.expand(rows, -1)
        )
        shifted, _ = token_logprob(logits + 2.5, every[:1].expand(rows))
    torch.testing.assert_close(logprob.exp().sum(1), torch.ones(rows), rtol=1e-5, atol=0)
    assert (entropy >= 0).all()
    assert (entropy <= torch.tensor(float(vocab)).log() + 1e-5).all()
    assert torch.equal(entropy, entropy[:, :1].expand_as(entropy))
    torch.testing.assert_close(shifted, logprob[:, 0], rtol=1e-5, atol=1e-5)


def test_skipped_rows_are_not_read(backend: str) -> None:
    logits, targets = logits_of(6, 333), targets_of(6, 333)
    skip = targets == IGNORE
    logits[skip] = torch.nan
    upstream = (torch.randn(6), torch.randn(6))
    found = gradients_of(lambda x: token_logprob(x, targets), (logits,), upstream)
    for result in found.results:
        assert result.isfinite().all()
        assert not result[skip].any()
    assert found.gradients[0].isfinite().all()
    assert not found.gradients[0][skip].any()
    other = token_logprob(logits, targets.masked_fill(skip, 7), ignore_index=7)
    assert torch.equal(other[0], found.results[0])


def test_rows_without_a_distribution(backend: str) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[0.0, -inf, 1.0], [0.0, nan, 1.0], [-inf, -inf, -inf], [0.0, inf, 1.0]] * 2
    )
    targets = torch.tensor([1, 0, 0, 0, 2, 2, 2, 2])
    found = gradients_of(
        lambda x: token_logprob(x, targets), (logits,), (torch.ones(8), torch.zeros(8))
    )
    logprob, entropy = found.results
    assert logprob[0] == -inf  # a token of probability 0 ...
    assert logprob[4] == pytest.approx(-0.31326, abs=1e-5)  # ... beside ones that have some
    assert entropy[0] == pytest.approx(0.58220, abs=1e-5)
    assert logprob[[1, 2, 3, 5, 6, 7]].isnan().all()
    assert entropy[[1, 2, 3, 5, 6, 7]].isnan().all()
    assert found.gradients[0][[0, 4]].isfinite().all()
    torch.testing.assert_close(found.gradients[0][0], torch.tensor([-0.268941, 1.0, -0.731059]))


def test_leading_dimensions_and_strides(backend: str) -> None:
    base = logits_of(24, 200).view(4, 6, 200)
    targets = targets_of(24, 150).view(4, 6)
    views = [
        base[:, :, 25:175],
        base.transpose(0, 1)[:, :, :150].transpose(0, 1),
        base[:1, :, :150].expand(4, 6, 150),
    ]
    upstream = (torch.randn(4, 6), torch.randn(4, 6))
    for view in views:
        strided = gradients_of(lambda x, v=view: token_logprob(x.as_strided(v.shape, v.stride(), v.storage_offset()),
                                                               targets), (base,), upstream)  # fmt: skip
        plain = token_logprob(view.contiguous(), targets)
        assert torch.equal(strided.results[0], plain[0])
        assert torch.equal(strided.results[1], plain[1])
        dense = gradients_of(lambda x: token_logprob(x, targets), (view.contiguous(),), upstream)
        scattered = gradients_of(lambda x, v=view: (x.as_strided(v.shape, v.stride(), v.storage_offset()) * 1.0,),
                                 (base,), (dense.gradients[0],))  # fmt: skip
        torch.testing.assert_close(strided.gradients[0], scattered.gradients[0])


def test_results_do_not_depend_on_threads_or_company(isa: str, threads: int) -> None:
    logits, targets = logits_of(9, 20011, torch.bfloat16), targets_of(9, 20011)
    upstream = (torch.randn(9), torch.randn(9))
    found = gradients_of(lambda x: token_logprob(x, targets), (logits,), upstream)
    torch.set_num_threads(1)
    for row in range(9):
        one = slice(row, row + 1)
        alone = gradients_of(lambda x, one=one: token_logprob(x, targets[one]), (logits[one],),
                             tuple(u[one] for u in upstream))  # fmt: skip
        assert torch.equal(alone.results[0], found.results[0][one])
        assert torch.equal(alone.results[1], found.results[1][one])
        assert torch.equal(alone.gradients[0], found.gradients[0][one])


def test_gradcheck_and_compile(backend: str) -> None:
    targets = targets_of(4, 6)
    with use_backend("reference"):
        exact = logits_of(4, 6).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: token_logprob(x, targets, temperature=0.7), exact)
    logits = logits_of(4, 6).requires_grad_()
    torch.library.opcheck(torch.ops.igpo.token_logprob.default, (logits, targets, 0.7, IGNORE))

    def loss(x: Tensor) -> Tensor:
        logprob, entropy = token_logprob(x, targets, temperature=0.7)
        return logprob.sum() - 0.1 * entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logits), logits)
    (found,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "token_logprob: logits must be a tensor, got list"),
        (
            {"logits": torch.zeros(3, 4).long()},
            ValueError,
            "logits must be float32 | bfloat16 .*, got shape .* int64",
        ),
        ({"logits": torch.zeros(3, 0)}, ValueError, "logits must have a non-empty last dimension"),
        (
            {"logits": torch.zeros(4, 3).t()},
            ValueError,
            r"contiguous last dimension, .*Call .contiguous\(\) first",
        ),
        (
            {"targets": torch.zeros(2).long()},
            ValueError,
            r"targets must have shape \(3,\), got shape \(2,\)",
        ),
        ({"targets": torch.zeros(3)}, ValueError, "targets must be int64, got .*float32"),
        (
            {"targets": torch.tensor([0, 4, 1])},
            ValueError,
            r"targets must be in \[0, 4\) or ignore_index=-100, got 4",
        ),
        (
            {"targets": torch.tensor([0, -1, 1])},
            ValueError,
            "got -1. Set ignore_index where a row is not to count",
        ),
        (
            {"temperature": 0.0},
            ValueError,
            "temperature must be > 0 and finite, got 0.0. For greedy decoding",
        ),
        ({"temperature": float("nan")}, ValueError, "temperature must be > 0 and finite, got nan"),
    ],
)
def test_rejects_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {"logits": torch.zeros(3, 4), "targets": torch.zeros(3).long()}
    with pytest.raises(error, match=message):
        token_logprob(**(good | change))
