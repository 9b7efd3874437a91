from __future__ import annotations

import math

import pytest
import torch
from gpu import is_slow, on_cpu_tensors
from gpu_checks import check_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo.ops import sample_hint_mask, use_backend


def runs(row: torch.Tensor) -> list[tuple[bool, int]]:
    """(value, length) of the runs of equal values."""
    out: list[tuple[bool, int]] = []
    for value in row.tolist():
        if out and out[-1][0] == value:
            out[-1] = (value, out[-1][1] + 1)
        else:
            out.append((value, 1))
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 90), max_size=6),
    st.integers(0, 80),
    st.floats(0, 1),
    st.tuples(st.integers(1, 6), st.integers(0, 6)),
    st.integers(-(2**40), 2**40),
)
def test_backends_are_bit_equal(lengths, length, ratio, low_extra, seed) -> None:
    args = torch.tensor(lengths, dtype=torch.int64), length
    options = {
        "ratio": ratio,
        "chunk_size": (low_extra[0], sum(low_extra)),
        "seed": seed,
        "step": 3,
    }
    results = []
    for name in on_cpu_tensors():
        with use_backend(name):
            results.append(sample_hint_mask(*args, **options))
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert results[0].shape == (len(lengths), length)


@pytest.mark.parametrize(
    ("lengths", "length", "chunk"),
    [
        ([], 8, (2, 3)),
        ([5], 0, (2, 3)),
        ([0, 1, 2**40], 1, (2**30, 2**31 - 1)),
        ([40, 700], 300, (5, 10)),  # a trace beyond the mask: its chunks count all the same
        ([333], 400, (1, 2)),  # more chunks than a block takes at once
        ([1000], 900, (200, 450)),
    ],
)
def test_gpu_backends_are_bit_equal(gpu_backend: str, lengths, length, chunk, monkeypatch) -> None:
    for order in ("forward", "reverse"):
        monkeypatch.setenv("IGPO_EMULATE_ORDER", order)
        traces = torch.tensor(lengths, dtype=torch.int64)
        masks = sample_hint_mask(traces, length, ratio=0.6, chunk_size=chunk, seed=4)
        with use_backend("reference"):
            expected = sample_hint_mask(traces, length, ratio=0.6, chunk_size=chunk, seed=4)
        assert torch.equal(masks, expected)
        if gpu_backend == "triton":
            break


@pytest.mark.gpu
def test_streams_graphs_and_devices(gpu_backend: str) -> None:
    """Captured in a graph, the op cannot have asked the device how long the traces are."""
    check_everywhere(
        lambda lengths, ratio: (sample_hint_mask(lengths, 256, ratio=ratio, seed=2),),
        (torch.randint(0, 400, (64,)), torch.rand(64)),
        (torch.randint(0, 400, (64,)), torch.rand(64)),
    )


def test_chunks_partition_the_trace(backend: str) -> None:
    """With sizes fixed to 4, a trace of 18 is cut into 4+4+4+4+2: what is shown are whole chunks at multiples of 4."""
    seeds = range(6 if is_slow(backend) else 200)
    masks = torch.cat(
        [
            sample_hint_mask(torch.tensor([18]), 25, ratio=0.4, chunk_size=(4, 4), seed=s)
            for s in seeds
        ]
    )
    chunks = masks[:, :20].reshape(-1, 5, 4)
    assert not masks[:, 18:].any()
    assert (chunks[:, :4].all(2) | ~chunks[:, :4].any(2)).all()
    assert torch.equal(chunks[:, 4, 0], chunks[:, 4, 1])
    assert (chunks[:, :, 0].sum(1) == 2).all()  # floor(0.4 * 5)
    rate = chunks[:, :, 0].float().mean(0)
    if not is_slow(backend):  # 4 sigma
        assert (rate - 0.4).abs().max() < 0.14, "every chunk, the short one too, is equally likely"


@pytest.mark.parametrize("chunk", [(1, 1), (2, 5), (5, 10)])
def test_runs_are_made_of_chunks(backend: str, chunk: tuple[int, int]) -> None:
    rows = 2 if is_slow(backend) else 50
    masks = sample_hint_mask(torch.full((rows,), 120), 120, ratio=0.5, chunk_size=chunk, seed=1)
    for row in masks:
        inner = runs(row)[1:-1]
        assert all(length >= chunk[0] for _, length in inner)


def test_number_of_chunks_shown(backend: str) -> None:
    sizes_are_one = {"chunk_size": (1, 1), "seed": 9}
    for n in (1, 10) if is_slow(backend) else (1, 7, 10, 41):
        for eta in (0.0, 0.1, 0.29, 0.6, 0.999, 1.0):
            mask = sample_hint_mask(torch.tensor([n]), 50, ratio=eta, **sizes_are_one)
            assert mask.sum() == math.floor(eta * n)
    per_row = sample_hint_mask(
        torch.tensor([10, 10, 10]), 10, ratio=torch.tensor([0.0, 0.5, 1.0]), **sizes_are_one
    )
    assert per_row.sum(1).tolist() == [0, 5, 10]


def test_everything_is_shown_at_ratio_one(backend: str) -> None:
    mask = sample_hint_mask(torch.tensor([0, 3, 40, 99]), 50, ratio=1.0, seed=2)
    assert mask.sum(1).tolist() == [0, 3, 40, 50]


def test_a_row_depends_on_its_id_only(backend: str) -> None:
    lengths, ids = torch.tensor([30, 50, 20, 44]), torch.tensor([7, -3, 2**50, 7])
    ratio = torch.tensor([0.3, 0.5, 0.9, 0.3])
    whole = sample_hint_mask(lengths, 60, ratio=ratio, seed=5, row_ids=ids)
    order = torch.tensor([2, 0, 3, 1])
    moved = sample_hint_mask(lengths[order], 60, ratio=ratio[order], seed=5, row_ids=ids[order])
    assert torch.equal(moved, whole[order])
    alone = sample_hint_mask(lengths[1:2], 60, ratio=ratio[1:2], seed=5, row_ids=ids[1:2])
    assert torch.equal(alone, whole[1:2])
    assert not torch.equal(whole, sample_hint_mask(lengths, 60, ratio=ratio, seed=6, row_ids=ids))
    assert not torch.equal(
        whole, sample_hint_mask(lengths, 60, ratio=ratio, seed=5, step=1, row_ids=ids)
    )


def test_every_instruction_set_and_thread_count_agrees(isa: str, threads: int) -> None:
    lengths = torch.arange(0, 300, 7)
    mask = sample_hint_mask(lengths, 211, ratio=0.45, seed=3)
    with use_backend("reference"):
        assert torch.equal(mask, sample_hint_mask(lengths, 211, ratio=0.45, seed=3))


def test_compiles_and_passes_opcheck(backend: str) -> None:
    lengths = torch.tensor([5, 60])
    op = torch.ops.igpo.sample_hint_mask.default
    torch.library.opcheck(
        op, (lengths, 30, torch.tensor([0.5, 0.2]).double(), 2, 4, -77, torch.arange(2))
    )
    call = torch.compile(
        lambda x: sample_hint_mask(x, 30, ratio=0.5, seed=1), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(call(lengths), sample_hint_mask(lengths, 30, ratio=0.5, seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"trace_lengths": torch.ones(2)},
            "sample_hint_mask: trace_lengths must be int64, got .*float32",
        ),
        (
            {"trace_lengths": torch.ones(2, 2, dtype=torch.int64)},
            "trace_lengths must have one dimension",
        ),
        ({"ratio": 1.5}, r"ratio must lie in \[0, 1\], got 1.5"),
        ({"ratio": torch.tensor([0.5, -0.1])}, r"ratio must lie in \[0, 1\], got \[0.5, -0.1"),
        ({"ratio": torch.tensor([0.5])}, r"ratio must have shape \(2,\), got shape \(1,\)"),
        (
            {"chunk_size": (4, 3)},
            r"chunk_size must be \(low, high\) with 1 <= low <= high, got \(4, 3\)",
        ),
        ({"length": -1}, "length must be >= 0, got -1"),
        ({"row_ids": torch.arange(3)}, r"row_ids must have shape \(2,\), got shape \(3,\)"),
    ],
)
def test_rejects_bad_input(change: dict, message: str) -> None:
    good = {"trace_lengths": torch.tensor([5, 6]), "length": 8, "ratio": 0.5, "seed": 1}
    with pytest.raises(ValueError, match=message):
        sample_hint_mask(**(good | change))
