"""[noisy || clean]: one pass in which every block is denoised behind finished ones, against one pass a block."""

from __future__ import annotations

import pytest
import torch
from public_configs import MASK, public_model
from torch import Tensor
from torch.nn.attention import flex_attention
from toys import padded

from igpo.models import MaskedDecoder, layout

ROWS = [torch.arange(n) * 7 % 120 for n in (9, 4, 1, 8, 13)]
WIDTH = 4


def model_of(name: str) -> MaskedDecoder:
    model = public_model(name).double()
    model.config.block_length = WIDTH
    return model


def batch(side: str = "left") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """noisy, clean, attention_mask, position_ids."""
    clean, mask = padded(ROWS, side, width=15)
    hidden = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return clean.masked_fill(hidden & mask, MASK), clean, mask, (mask.cumsum(1) - 1).clamp_min(0)


def block_by_block(model: MaskedDecoder, noisy: Tensor, clean: Tensor) -> Tensor:
    """(n, D) of one sequence: the finished blocks, then the noisy one, which is read."""
    found = []
    for start in range(0, len(clean), WIDTH):
        here = torch.cat((clean[:start], noisy[start : start + WIDTH]))
        found.append(model.hidden(here[None])[0, start:])
    return torch.cat(found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["sdar", "dream", "llada2"])  # dream: shifted rows
@torch.no_grad()
def test_one_pass_is_block_by_block(name: str, side: str) -> None:
    model = model_of(name)
    noisy, clean, mask, positions = batch(side)
    found = model.hidden_of_blocks(noisy, clean, mask, positions)
    assert torch.isfinite(found).all()
    for b, real in enumerate(mask):
        expected = block_by_block(model, noisy[b][real], clean[b][real])
        torch.testing.assert_close(found[b][real], expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_without_padding_columns_are_positions() -> None:
    model = model_of("sdar")
    noisy, clean = (x[4:, -13:] for x in batch()[:2])
    expected = block_by_block(model, noisy[0], clean[0])
    torch.testing.assert_close(
        model.hidden_of_blocks(noisy, clean)[0], expected, rtol=0, atol=1e-10
    )


@torch.no_grad()
def test_a_block_does_not_see_its_own_clean_copy_nor_later_ones() -> None:
    model = model_of("sdar")
    noisy, clean = (x[4:, -13:] for x in batch()[:2])
    before = model.hidden_of_blocks(noisy, clean)
    after = model.hidden_of_blocks(noisy, torch.cat((clean[:, :4], (clean[:, 4:] + 1) % 120), 1))
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] != after[:, 8:]).any(-1).all()
    later = torch.cat((noisy[:, :4], torch.full_like(noisy[:, 4:], MASK)), 1)
    assert torch.equal(model.hidden_of_blocks(later, clean)[:, :4], before[:, :4])


@torch.no_grad()
def test_flex_attention_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: compiling takes a CPU ten seconds a shape."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(layout, "_compiled", flex_attention.flex_attention)
    model = public_model("sdar")
    noisy, clean, mask, positions = batch()
    whole = noisy[4:, -13:], clean[4:, -13:]
    expected = model.hidden_of_blocks(noisy, clean, mask, positions)
    unpadded = model.hidden_of_blocks(*whole)
    model.set_attn_implementation("flex_attention")
    found = model.hidden_of_blocks(noisy, clean, mask, positions)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=2e-5)
    torch.testing.assert_close(model.hidden_of_blocks(*whole), unpadded, rtol=0, atol=2e-5)


def test_what_it_cannot_do_is_said() -> None:
    noisy, clean, mask, positions = batch()
    with pytest.raises(ValueError, match="must be asked of a block-causal model, got one of full"):
        public_model("llada").hidden_of_blocks(noisy, clean, mask, positions)
    model = model_of("sdar")
    with pytest.raises(
        ValueError, match=r"clean must have the shape of noisy, \(5, 15\), got shape"
    ):
        model.hidden_of_blocks(noisy, clean[:, 1:], mask, positions)
    square = torch.ones(1, 1, 15, 15, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask must be of tokens, shape \(5, 15\)"):
        model.hidden_of_blocks(noisy, clean, square, positions)
