from __future__ import annotations

import pytest
import torch
from gpu import is_slow, on_cpu_tensors
from gpu_checks import check_everywhere, needs_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo.ops import forward_mask, use_backend

MASK = 99


def example(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randint(0, 50, (rows, length)), torch.rand(rows, length) < 0.7, torch.rand(rows)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 5),
    st.integers(0, 70),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.integers(0, 9),
)
def test_backends_are_bit_equal(rows: int, length: int, exact: bool, seed: int, step: int) -> None:
    tokens, maskable, t = example(rows, length)
    results = []
    for name in on_cpu_tensors():
        with use_backend(name):
            results.append(
                forward_mask(tokens, maskable, t, mask_id=MASK, seed=seed, step=step, exact=exact)
            )
    noisy, masked = results[0]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    assert torch.equal(noisy, torch.where(masked, MASK, tokens))
    assert not (masked & ~maskable).any()
    if exact:
        assert torch.equal(masked.sum(1), (maskable.sum(1) * t.double()).round().long())


def assert_equals_reference(exact: bool, *example: torch.Tensor, seed: int = 3) -> None:
    options = {"mask_id": MASK, "seed": seed, "step": 1, "exact": exact}
    found = forward_mask(*example, **options)
    with use_backend("reference"):
        expected = forward_mask(*example, **options)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "shape", [(0, 3), (3, 0), (1, 1), (3, 2), (2, 129), (1, 1031)]
)  # fmt: skip
@pytest.mark.parametrize("exact", [False, True])
def test_gpu_backends_are_bit_equal(gpu_backend: str, shape: tuple[int, int], exact: bool) -> None:
    assert_equals_reference(exact, *example(*shape))


@pytest.mark.parametrize("exact", [False, True])
def test_order_of_threads_alignment_and_strides(
    gpu_backend: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IGPO_EMULATE_ORDER", "reverse")
    tokens, maskable, t = example(2, 301)
    assert_equals_reference(exact, tokens[:, 1:], maskable[:, 1:], t)  # a copy of the slice
    assert_equals_reference(exact, tokens.t()[:4], maskable.t()[:4], t.repeat(2))
    odd = tokens.view(-1)[1:].view(1, -1), maskable.view(-1)[1:].view(1, -1)  # 8 bytes off
    assert_equals_reference(exact, *odd, t[:1])


def test_exact_counts_round_half_to_even(backend: str) -> None:
    counts = [
        int(forward_mask(torch.zeros(1, n, dtype=torch.int64), torch.ones(1, n, dtype=torch.bool),
                         torch.tensor([0.5]), mask_id=MASK, seed=n, exact=True)[1].sum())
        for n in (1, 3, 5)
    ]  # fmt: skip
    assert counts == [0, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
def test_streams_graphs_and_devices(gpu_backend: str, exact: bool) -> None:
    check_everywhere(
        lambda *args: forward_mask(*args, mask_id=MASK, seed=1, exact=exact),
        example(64, 257), example(64, 257),
    )  # fmt: skip


@pytest.mark.gpu
def test_more_than_2_31_positions(gpu_backend: str) -> None:
    needs_gpu(gib=60)
    rows, length = 2049, 2**20
    tokens = torch.zeros(rows, length, dtype=torch.int64, device="cuda")
    maskable = torch.ones(rows, length, dtype=torch.bool, device="cuda")
    t, ids = torch.full((rows,), 0.3, device="cuda"), torch.arange(rows, device="cuda")
    noisy = forward_mask(tokens, maskable, t, mask_id=MASK, seed=1, row_ids=ids)[0]
    alone = forward_mask(tokens[-1:], maskable[-1:], t[-1:], mask_id=MASK, seed=1, row_ids=ids[-1:])
    assert torch.equal(noisy[-1:], alone[0])


@pytest.mark.parametrize("exact", [False, True])
def test_extremes(backend: str, exact: bool) -> None:
    tokens, maskable, _ = example(6, 41)
    ends = torch.tensor([0.0, 1.0]).repeat(3)
    _, masked = forward_mask(tokens, maskable, ends, mask_id=MASK, seed=1, exact=exact)
    assert torch.equal(masked, maskable & (ends == 1)[:, None])


def test_frequencies(backend: str) -> None:
    """Every position is masked with probability t, independently: counts per position and their variance."""
    if is_slow(backend):
        return assert_equals_reference(True, *example(5, 20))  # whose frequencies are tested
    rows, length, t = 4000, 20, 0.3
    masked = forward_mask(
        torch.zeros(rows, length, dtype=torch.int64), torch.ones(rows, length, dtype=torch.bool),
        torch.full((rows,), t), mask_id=MASK, seed=2,
    )[1].double()  # fmt: skip
    assert (masked.mean(0) - t).abs().max() < 4.5 * (t * (1 - t) / rows) ** 0.5
    variance = masked.sum(1).var()  # binomial: t (1 - t) L
    assert abs(variance / (t * (1 - t) * length) - 1) < 0.1
    exact = forward_mask(
        torch.zeros(rows, 10, dtype=torch.int64), torch.ones(rows, 10, dtype=torch.bool),
        torch.full((rows,), 0.25), mask_id=MASK, seed=2, exact=True,
    )[1].double()  # fmt: skip
    assert (exact.sum(1) == 2).all()  # 2.5 to even
    assert (exact.mean(0) - 0.2).abs().max() < 4.5 * (0.16 / rows) ** 0.5
    pairs = (exact[:, :, None] * exact[:, None, :]).mean(0)[~torch.eye(10, dtype=torch.bool)]
    assert (pairs - 2 / 90).abs().max() < 5 * (2 / 90 / rows) ** 0.5, "all pairs equally likely"
    return None


@pytest.mark.parametrize("exact", [False, True])
def test_a_row_depends_on_its_id_only(backend: str, exact: bool) -> None:
    tokens, maskable, t = example(5, 23)
    ids = torch.tensor([4, -1, 2**40, 0, 9])
    options = {"mask_id": MASK, "seed": 11, "exact": exact}
    whole = forward_mask(tokens, maskable, t, row_ids=ids, **options)[0]
    order = torch.tensor([3, 1, 4, 0])
    part = forward_mask(tokens[order], maskable[order], t[order], row_ids=ids[order], **options)[0]
    assert torch.equal(part, whole[order])
    assert not torch.equal(
        whole, forward_mask(tokens, maskable, t, row_ids=ids, step=1, **options)[0]
    )


def test_every_instruction_set_and_thread_count_agrees(isa: str, threads: int) -> None:
    tokens, maskable, t = example(13, 301)
    for exact in (False, True):
        masked = forward_mask(tokens.t().t(), maskable, t, mask_id=MASK, seed=1, exact=exact)[1]
        with use_backend("reference"):
            assert torch.equal(
                masked, forward_mask(tokens, maskable, t, mask_id=MASK, seed=1, exact=exact)[1]
            )


def test_compiles_and_passes_opcheck(backend: str) -> None:
    tokens, maskable, t = example(3, 9)
    op = torch.ops.igpo.forward_mask.default
    torch.library.opcheck(op, (tokens, maskable, t.double(), MASK, -5, torch.arange(3), True))
    call = torch.compile(
        lambda *a: forward_mask(*a, mask_id=MASK, seed=1), fullgraph=True, backend="aot_eager"
    )
    expected = forward_mask(tokens, maskable, t, mask_id=MASK, seed=1)
    assert all(map(torch.equal, call(tokens, maskable, t), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 3)}, "forward_mask: tokens must be int64, got .*float32"),
        (
            {"tokens": torch.zeros(3, dtype=torch.int64)},
            r"tokens must have shape \(B, L\), got shape \(3,\)",
        ),
        ({"maskable": torch.zeros(2, 3)}, "maskable must be bool, got .*float32"),
        ({"t": torch.tensor([0.5])}, r"t must have shape \(2,\), got shape \(1,\)"),
        ({"t": torch.tensor([0.5, 1.5])}, r"t must lie in \[0, 1\], got \[0.5, 1.5\]"),
        ({"row_ids": torch.arange(3)}, r"row_ids must have shape \(2,\)"),
    ],
)
def test_rejects_bad_input(change: dict, message: str) -> None:
    tokens, maskable, t = example(2, 3)
    good = {"tokens": tokens, "maskable": maskable, "t": t, "mask_id": MASK, "seed": 1}
    with pytest.raises(ValueError, match=message):
        forward_mask(**(good | change))
