from __future__ import annotations

import pytest
import torch
from gpu import on_cpu_tensors
from gpu_checks import check_everywhere, needs_gpu
from hypothesis import given
from hypothesis import strategies as st

from igpo.ops import _native, merge_hints, use_backend

MASK = 7


def example(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randint(0, 9, shape),
        torch.randint(0, 9, shape),
        torch.rand(shape) < 0.4,
    )


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (2, 31), (5, 7, 11), (3, 9001)])
def test_matches_definition(backend: str, shape: tuple[int, ...], ran) -> None:
    tokens, hints, hint_mask = example(*shape)
    merged, generate = merge_hints(tokens, hints, hint_mask, mask_id=MASK)
    assert torch.equal(merged, torch.where(hint_mask, hints, tokens))
    assert torch.equal(generate, merged == MASK)
    assert ran("merge_hints") == backend


@given(st.integers(0, 40), st.integers(0, 6))
def test_inputs_are_not_modified_and_strides_do_not_matter(n: int, mask_id: int) -> None:
    tokens, hints, hint_mask = (x.t() for x in example(n, 3))
    before = tokens.clone(), hints.clone(), hint_mask.clone()
    for name in on_cpu_tensors():
        with use_backend(name):
            merged, generate = merge_hints(tokens, hints, hint_mask, mask_id=mask_id)
        assert torch.equal(merged, torch.where(hint_mask, hints, tokens))
        assert torch.equal(generate, merged == mask_id)
    assert all(map(torch.equal, before, (tokens, hints, hint_mask)))


@pytest.mark.parametrize("first", [1, 2, 3])
def test_any_alignment(gpu_backend: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens 8 bytes off, masks 1 byte off, an odd number of positions."""
    monkeypatch.setenv("IGPO_EMULATE_ORDER", "reverse")
    tokens, hints, hint_mask = (x[first:] for x in example(1040))
    for shift in (0, 1):
        inputs = tokens[: 1035 - shift], hints[shift:1035], hint_mask[: 1035 - shift]
        merged, generate = merge_hints(*inputs, mask_id=MASK)
        assert torch.equal(merged, torch.where(inputs[2], inputs[1], inputs[0]))
        assert torch.equal(generate, merged == MASK)


@pytest.mark.gpu
def test_streams_graphs_and_devices(gpu_backend: str) -> None:
    check_everywhere(
        lambda *args: merge_hints(*args, mask_id=MASK), example(64, 257), example(64, 257)
    )


@pytest.mark.gpu
def test_more_than_2_31_positions(gpu_backend: str) -> None:
    needs_gpu(gib=90)
    count = 2**31 + 5
    tokens, hints = (torch.zeros(count, dtype=torch.int64, device="cuda") for _ in range(2))
    hint_mask = torch.zeros(count, dtype=torch.bool, device="cuda")
    hints[-2:], hint_mask[-2:], tokens[-3:] = 5, True, MASK
    merged, generate = merge_hints(tokens, hints, hint_mask, mask_id=MASK)
    assert merged[-4:].tolist() == [0, MASK, 5, 5]
    assert generate.sum() == 1


def test_every_instruction_set_and_thread_count_agrees(isa: str, threads: int) -> None:
    tokens, hints, hint_mask = example(4, 5003)
    merged, generate = merge_hints(tokens, hints, hint_mask, mask_id=MASK)
    assert torch.equal(merged, torch.where(hint_mask, hints, tokens))
    assert torch.equal(generate, merged == MASK)


def test_forced_backend_really_ran() -> None:
    tokens, hints, hint_mask = example(3, 50)
    with use_backend("cpu"):
        merged, _ = merge_hints(tokens, hints, hint_mask, mask_id=MASK)
    direct, generate = torch.empty_like(tokens), torch.empty_like(hint_mask)
    _native.module().merge_hints(
        tokens.data_ptr(), hints.data_ptr(), hint_mask.data_ptr(), direct.data_ptr(),
        generate.data_ptr(), 150, MASK, 1,
    )  # fmt: skip
    assert torch.equal(merged, direct)


def test_compiles_and_passes_opcheck(backend: str) -> None:
    args = example(4, 33)
    torch.library.opcheck(torch.ops.igpo.merge_hints.default, (*args, MASK))
    compiled = torch.compile(
        lambda *a: merge_hints(*a, mask_id=MASK)[0] + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*args), merge_hints(*args, mask_id=MASK)[0] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokens": torch.zeros(2, 3)},
            r"merge_hints: tokens must be int64, got shape \(2, 3\), float32",
        ),
        (
            {"hints": torch.zeros(2, 4, dtype=torch.int64)},
            r"hints must have shape \(2, 3\), got shape \(2, 4\)",
        ),
        (
            {"hint_mask": torch.zeros(2, 3, dtype=torch.int64)},
            "hint_mask must be bool, got .*int64",
        ),
    ],
)
def test_rejects_bad_input(change: dict, message: str) -> None:
    good = dict(zip(("tokens", "hints", "hint_mask"), example(2, 3), strict=True))
    with pytest.raises(ValueError, match=message):
        merge_hints(**(good | change), mask_id=MASK)


def test_rejects_what_is_not_a_tensor() -> None:
    with pytest.raises(TypeError, match="merge_hints: tokens must be a tensor, got list"):
        merge_hints([1], *example(1)[1:], mask_id=MASK)
