"""Documents packed in one row: each is computed as if it were alone."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from public_configs import MASK, PUBLIC, public_model
from torch.nn.attention import flex_attention
from toys import padded

from igpo.models import MaskedDecoder, layout, load_model
from igpo.models.packing import WithoutPadding, first_fit_decreasing

LENGTHS = (
    7,
    1,
    13,
    4,
    4,
    1,
)  # 1, a prime, equal ones side by side; blocks of 4 that documents do not fill
ROWS = [torch.arange(n) * (7 + n) % 120 for n in LENGTHS]
PACKED = torch.cat(ROWS)[None]
# ids need not count up, and one that comes again is another document
IDS = torch.tensor([5, 2, 9, 5, 0, 5]).repeat_interleave(torch.tensor(LENGTHS))[None]


def model_of(name: str) -> MaskedDecoder:
    model = public_model(name)
    if name in ("sdar", "sdar-moe", "dream-reasoner", "llada2"):
        model.config.block_length = 4
    return model


@pytest.mark.parametrize("name", PUBLIC)
@torch.no_grad()
def test_packed_documents_are_bitwise_those_of_a_padded_batch(name: str) -> None:
    model = model_of(name)
    tokens, mask = padded(ROWS, "left", width=15)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(PACKED, document_ids=IDS).logits[0]
    hidden = model.hidden(PACKED, document_ids=IDS)[0]
    assert torch.equal(logits, model(tokens, mask, positions).logits[mask])
    assert torch.equal(hidden, model.hidden(tokens, mask, positions)[mask])
    for row, mine in zip(ROWS, hidden.split(LENGTHS), strict=True):
        assert torch.equal(mine, model.hidden(row[None])[0])


@pytest.mark.parametrize("name", ["llada", "dream", "lladamoe", "sdar", "llada2"])
@torch.no_grad()
def test_public_checkpoints_pack(shared: Path, name: str) -> None:
    model = load_model(shared / "fixtures" / "models" / name, block_length=None)
    tokens, mask = padded(ROWS, "left", width=15)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    packed = model(PACKED, document_ids=IDS).logits[0]
    assert torch.equal(packed, model(tokens, mask, positions).logits[mask])


@torch.no_grad()
def test_rows_of_documents_with_padding_and_positions_of_their_own() -> None:
    model = model_of("dream")  # shifted rows: each document's first token gets its own
    tokens = torch.cat((PACKED, PACKED.flip(1)))
    ids = torch.cat((IDS, IDS.flip(1)))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, -1] = mask[1, :3] = False
    hidden = model.hidden(tokens, mask, document_ids=ids)
    for row, count in ((0, 5), (1, 6)):
        ends = accumulate(LENGTHS[:: 1 - 2 * row], initial=0)
        for start, stop in list(pairwise(ends))[:count]:
            real = mask[row, start:stop]
            positions = torch.arange(stop - start)[real]
            alone = model.hidden(tokens[row, start:stop][real][None], None, positions[None])
            assert torch.equal(hidden[row, start:stop][real], alone[0])
    far = torch.arange(30)[None] * 5
    moved = model.hidden(PACKED, None, far, document_ids=IDS)
    expected = model.hidden(ROWS[2][None], None, far[:, 8:21])
    assert torch.equal(moved[:, 8:21], expected)


@pytest.mark.parametrize("name", ["sdar", "dream", "llada2"])
@torch.no_grad()
def test_two_copies_of_documents(name: str) -> None:
    model = public_model(name).double()
    model.config.block_length = 4
    noisy = PACKED.masked_fill(torch.rand(PACKED.shape) < 0.5, MASK)
    found = model.hidden_of_blocks(noisy, PACKED, document_ids=IDS)[0].split(LENGTHS)
    for mine, dirty, clean in zip(found, noisy[0].split(LENGTHS), ROWS, strict=True):
        alone = model.hidden_of_blocks(dirty[None], clean[None])[0]
        torch.testing.assert_close(mine, alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_flex_attention_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: compiling takes a CPU ten seconds a shape."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(layout, "_compiled", flex_attention.flex_attention)
    noisy = PACKED.masked_fill(torch.rand(PACKED.shape) < 0.5, MASK)
    for name in ("sdar", "dream"):
        model = model_of(name)
        calls = [lambda m: m.hidden(PACKED, document_ids=IDS)]
        if name == "sdar":
            calls.append(lambda m: m.hidden_of_blocks(noisy, PACKED, document_ids=IDS))
        expected = [call(model) for call in calls]
        model.set_attn_implementation("flex_attention")
        for call, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(call(model), wanted, rtol=0, atol=2e-5)


def test_what_documents_cannot_be_is_said() -> None:
    model = model_of("sdar")
    with pytest.raises(
        ValueError, match=r"document_ids must be integers .*\(1, 30\), at least one, got"
    ):
        model.hidden(PACKED, document_ids=IDS[:, 1:])
    with pytest.raises(ValueError, match=r"got torch.float32, shape \(1, 30\)"):
        model(PACKED, document_ids=IDS.float())
    for shape in ((0, 4), (2, 0)):
        nothing = torch.zeros(shape, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"at least one, got torch.int64, shape \(\d, \d\)"):
            model.hidden(nothing, document_ids=nothing)
    square = torch.ones(1, 1, 30, 30, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"without a cache, got such a mask"):
        model.hidden(PACKED, square, document_ids=IDS)
    with torch.no_grad(), pytest.raises(ValueError, match=r"without a cache, got a cache"):
        model.hidden(PACKED, document_ids=IDS, cache=model.new_cache(1, 30))


@pytest.mark.parametrize("name", ["dream", "sdar", "llada-moe"])
def test_a_policy_without_padding_has_the_same_gradient(name: str) -> None:
    model = model_of(name).double()
    tokens, mask = padded(ROWS, "left", width=15)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    calls = [lambda policy: policy.hidden(tokens, mask, positions)]
    if name == "sdar":
        noisy = tokens.masked_fill(mask & (tokens % 2 == 0), MASK)
        calls.append(lambda policy: policy.hidden_of_blocks(noisy, tokens, mask, positions))
    weights = torch.rand(int(mask.sum()), 64, dtype=torch.float64)
    for call in calls:
        found = []
        for policy in (model, WithoutPadding(model)):
            model.zero_grad()
            states = call(policy)
            (states[mask] * weights).sum().backward()
            found.append(
                [states[mask], *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            )
        assert len(found[0]) > 10
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    assert WithoutPadding(model).head_weight is model.head_weight


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 100))
def test_rows_hold_every_sequence_once_and_no_more_than_fits(
    lengths: list[int], capacity: int
) -> None:
    rows = first_fit_decreasing(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= capacity for total in totals)
    assert all(a + b > capacity for a, b in pairwise(totals))
    assert len(rows) <= 2 * math.ceil(sum(lengths) / capacity)


def test_a_sequence_no_row_holds_is_refused() -> None:
    assert first_fit_decreasing([3, 5, 2, 4], 7) == [[1, 2], [3, 0]]
    assert first_fit_decreasing([], 7) == []
    for lengths in ([3, 8], [3, 0]):
        with pytest.raises(ValueError, match=r"lengths must be in \[1, 7\], got [08] at 1"):
            first_fit_decreasing(lengths, 7)
