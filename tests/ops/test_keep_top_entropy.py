from __future__ import annotations

import math

import pytest
import torch
from gpu import on_cpu_tensors
from gpu_checks import check_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo.ops import keep_top_entropy, use_backend


def naive(entropy: torch.Tensor, candidates: torch.Tensor, fraction: float) -> torch.Tensor:
    kept = torch.zeros_like(candidates)
    for row in range(entropy.shape[0]):
        places = [i for i in range(entropy.shape[1]) if candidates[row, i]]
        value = {i: -math.inf if math.isnan(v) else v for i, v in enumerate(entropy[row].tolist())}
        places.sort(key=lambda i: (-value[i], i))
        for i in places[: max(1, math.floor(fraction * len(places)))]:
            kept[row, i] = True
    return kept


VALUES = st.sampled_from([0.0, -0.0, 0.5, 1.0, 3.0, math.nan, math.inf, -math.inf])


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 5), st.integers(0, 12), st.floats(0.01, 1), st.data())
def test_matches_definition(rows: int, length: int, fraction: float, data) -> None:
    count = rows * length
    entropy = torch.tensor(data.draw(st.lists(VALUES, min_size=count, max_size=count)))
    candidates = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    entropy, candidates = entropy.float().view(rows, length), candidates.bool().view(rows, length)
    expected = naive(entropy, candidates, fraction)
    for name in on_cpu_tensors():
        with use_backend(name):
            assert torch.equal(keep_top_entropy(entropy, candidates, fraction), expected), name


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (2, 31), (2, 257), (1, 1031)])
def test_special_values_and_ties(gpu_backend: str, shape: tuple[int, int]) -> None:
    """Few distinct values: most of the choice is between equals, over several rounds of a block."""
    values = torch.tensor([0.0, -0.0, 0.5, 3.0, math.nan, math.inf, -math.inf])
    entropy, candidates = values[torch.randint(0, 7, shape)], torch.rand(shape) < 0.8
    for fraction in (0.02, 0.7):
        expected = naive(entropy, candidates, fraction)
        assert torch.equal(keep_top_entropy(entropy, candidates, fraction), expected)


def test_order_of_threads_and_strides(gpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGPO_EMULATE_ORDER", "reverse")
    entropy, candidates = torch.rand(300, 2).round(decimals=1).t(), (torch.rand(300, 2) < 0.6).t()
    kept = keep_top_entropy(entropy, candidates, 0.4)
    assert torch.equal(kept, naive(entropy, candidates, 0.4))
    assert torch.equal(keep_top_entropy(entropy[1:], candidates[1:], 0.4), kept[1:])


@pytest.mark.gpu
def test_streams_graphs_and_devices(gpu_backend: str) -> None:
    check_everywhere(
        lambda *args: (keep_top_entropy(*args, 0.3),),
        (torch.rand(64, 257), torch.rand(64, 257) < 0.5),
        (torch.rand(64, 257), torch.rand(64, 257) < 0.5),
    )


def test_fraction_one_keeps_every_candidate(backend: str) -> None:
    entropy, candidates = torch.rand(4, 33), torch.rand(4, 33) < 0.5
    candidates[2] = False
    assert torch.equal(keep_top_entropy(entropy, candidates, 1.0), candidates)
    assert keep_top_entropy(entropy, candidates, 1e-9).sum(1).tolist() == [1, 1, 0, 1]


def test_large_rows_strides_isas_threads(isa: str, threads: int) -> None:
    entropy, candidates = torch.rand(1031, 24).t(), (torch.rand(1031, 24) < 0.6).t()
    kept = keep_top_entropy(entropy, candidates, 0.2)
    with use_backend("reference"):
        assert torch.equal(kept, keep_top_entropy(entropy, candidates, 0.2))


def test_compiles_and_passes_opcheck(backend: str) -> None:
    entropy, candidates = torch.rand(3, 7), torch.rand(3, 7) < 0.5
    torch.library.opcheck(torch.ops.igpo.keep_top_entropy.default, (entropy, candidates, 0.3))
    call = torch.compile(lambda *a: keep_top_entropy(*a, 0.3), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(entropy, candidates), keep_top_entropy(entropy, candidates, 0.3))


@pytest.mark.parametrize(
    ("entropy", "candidates", "fraction", "message"),
    [
        (
            torch.ones(2, 3).half(),
            torch.ones(2, 3).bool(),
            0.2,
            "entropy must be float32 | float64, got .*float16",
        ),
        (
            torch.ones(3),
            torch.ones(3).bool(),
            0.2,
            r"entropy must have shape \(B, L\), got shape \(3,\)",
        ),
        (torch.ones(2, 3), torch.ones(2, 4).bool(), 0.2, r"candidates must have shape \(2, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3).bool(), 0.0, r"fraction must lie in \(0, 1\], got 0.0"),
    ],
)
def test_rejects_bad_input(entropy, candidates, fraction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_top_entropy(entropy, candidates, fraction)
