from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from row_cases import DTYPES, IGNORE, gradients_of, head_of, targets_of
from tolerances import assert_as_good_as_torch
from torch import Tensor

from igpo.ops import linear_logprob, token_logprob, use_backend
from igpo.ops._linear import default_chunk_rows

SIZES = [(0, 8, 5), (1, 1, 1), (3, 5, 7), (70, 16, 997), (150, 64, 4099)]  # rows, width, vocabulary


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, temperature: float):
    """The definition, in the dtype of its inputs."""
    logp = torch.log_softmax(F.linear(hidden, weight, bias) / temperature, -1)
    skip = targets == IGNORE
    chosen = logp.gather(-1, targets.masked_fill(skip, 0)[..., None])[..., 0]
    return chosen.masked_fill(skip, 0), -(logp.exp() * logp).sum(-1).masked_fill(skip, 0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "width", "vocab"), SIZES, ids=str)
def test_as_good_as_torch(
    backend: str, rows: int, width: int, vocab: int, dtype: torch.dtype, ran
) -> None:
    leaves, targets = head_of(rows, width, vocab, dtype), targets_of(rows, vocab)
    upstream = torch.randn(2, rows, dtype=torch.float64).unbind()

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, targets, bias=bias, temperature=0.9)

    found = gradients_of(ours, leaves, upstream)
    wide = tuple(x.float() for x in leaves), tuple(x.double() for x in leaves)
    torchs, truth = (gradients_of(lambda *x: eager(*x, targets, 0.9), w, upstream) for w in wide)
    for name, a, b, c in zip(
        ("logprob", "entropy"), found.results, torchs.results, truth.results, strict=True
    ):
        assert a.dtype == torch.float32
        assert_as_good_as_torch(a, b, c, name)
    names = ("hidden", "weight", "bias")
    for name, a, b, c in zip(
        names, found.gradients, torchs.gradients, truth.gradients, strict=True
    ):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b.to(dtype), c, f"gradient of {name}")
    assert ran("linear_logprob") == backend


def test_is_token_logprob_of_the_float32_logits(backend: str) -> None:
    hidden, weight, bias = head_of(40, 32, 501, torch.bfloat16)
    targets = targets_of(40, 501)
    logits = F.linear(hidden.float(), weight.float(), bias.float())
    for ours, theirs in zip(
        linear_logprob(hidden, weight, targets, bias=bias),
        token_logprob(logits, targets),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_size_of_chunks_changes_rounding_at_most(backend: str) -> None:
    hidden, weight, _ = head_of(90, 16, 301)
    targets, upstream = targets_of(90, 301), (torch.randn(90), torch.randn(90))
    whole, *others = (
        gradients_of(
            lambda h, w, n=n: linear_logprob(h, w, targets, chunk_rows=n),
            (hidden, weight),
            upstream,
        )
        for n in (1000, 1, 7, None)
    )
    for other in others:
        for a, b in zip(
            (*other.results, *other.gradients), (*whole.results, *whole.gradients), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "vocab", "chunk"),
    [(4096, 126464, 512), (100, 126464, 64), (8192, 151936, 441), (5, 7, 64), (0, 7, 64)],
)
def test_a_chunk_is_an_eighth_of_the_rows_within_bounds(rows: int, vocab: int, chunk: int) -> None:
    assert default_chunk_rows(rows, vocab) == chunk


def test_skipped_rows_cost_nothing(backend: str) -> None:
    hidden, weight, _ = head_of(30, 16, 101)
    targets = targets_of(30, 101)
    skip = targets == IGNORE
    clean = linear_logprob(hidden, weight, targets)
    hidden[skip] = torch.nan
    found = gradients_of(
        lambda h, w: linear_logprob(h, w, targets),
        (hidden, weight),
        (torch.ones(30), torch.ones(30)),
    )
    for a, b in zip(found.results, clean, strict=True):
        torch.testing.assert_close(a, b)
    assert all(g.isfinite().all() for g in found.gradients)
    assert not found.gradients[0][skip].any()


def test_leading_dimensions_and_strides(backend: str) -> None:
    hidden, weight, bias = head_of(24, 32, 60)
    targets = targets_of(24, 60).view(4, 6)
    wide = torch.randn(4, 6, 50)
    wide[..., 9:41] = hidden.view(4, 6, 32)
    found = linear_logprob(wide[..., 9:41], weight.t().contiguous().t(), targets, bias=bias)
    flat = linear_logprob(hidden, weight, targets.reshape(-1), bias=bias)
    for a, b in zip(found, flat, strict=True):
        assert a.shape == (4, 6)
        torch.testing.assert_close(a.reshape(-1), b)


def test_gradients_nobody_asks_for_are_not_made(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias = head_of(9, 8, 31)
    made: list[tuple[bool, ...]] = []
    from igpo.ops import _linear

    before = _linear.HeadGradient.__init__

    def spy(self, head, *needs: bool) -> None:
        made.append(needs)
        before(self, head, *needs)

    monkeypatch.setattr(_linear.HeadGradient, "__init__", spy)
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        leaves = [
            x.clone().requires_grad_(w) for x, w in zip((hidden, weight, bias), wanted, strict=True)
        ]
        logprob, _ = linear_logprob(leaves[0], leaves[1], targets_of(9, 31), bias=leaves[2])
        logprob.sum().backward()
        assert [x.grad is not None for x in leaves] == wanted
    assert [list(needs) for needs in made] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def test_results_do_not_depend_on_threads(isa: str, threads: int) -> None:
    hidden, weight, _ = head_of(21, 64, 3001, torch.bfloat16)
    targets = targets_of(21, 3001)
    found = linear_logprob(hidden, weight, targets)
    torch.set_num_threads(1)
    for a, b in zip(found, linear_logprob(hidden, weight, targets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the products are torch's


def test_gradcheck_and_compile(backend: str) -> None:
    targets = targets_of(5, 7)
    with use_backend("reference"):
        exact = tuple(x.double().requires_grad_() for x in head_of(5, 4, 7))
        assert torch.autograd.gradcheck(
            lambda h, w, b: linear_logprob(h, w, targets, bias=b, temperature=0.7, chunk_rows=2),
            exact,
        )
    leaves = tuple(x.requires_grad_() for x in head_of(5, 4, 7))
    hidden, weight, bias = leaves
    torch.library.opcheck(
        torch.ops.igpo.linear_logprob.default, (hidden, weight, targets, bias, 0.7, IGNORE, 2)
    )

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logprob, entropy = linear_logprob(h, w, targets, bias=b)
        return logprob.sum() - 0.1 * entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(7, 5)},
            r"linear_logprob: weight must have shape \(V, 4\) with V > 0, got shape",
        ),
        ({"weight": torch.zeros(7, 4).bfloat16()}, r"weight must be float32, got .*bfloat16"),
        ({"bias": torch.zeros(6)}, r"bias must have shape \(7,\), got shape \(6,\)"),
        ({"hidden": torch.zeros(4, 3).t()}, r"hidden must have a contiguous last dimension"),
        (
            {"targets": torch.tensor([0, 7, 1])},
            r"targets must be in \[0, 7\) or ignore_index=-100, got 7",
        ),
        ({"targets": torch.zeros(2).long()}, r"targets must have shape \(3,\), got shape \(2,\)"),
        ({"temperature": -1.0}, "temperature must be > 0 and finite, got -1.0"),
        ({"chunk_rows": 0}, "chunk_rows must be None or > 0, got 0"),
    ],
)
def test_rejects_bad_input(change: dict, message: str) -> None:
    good = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3).long(),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(good | change))
