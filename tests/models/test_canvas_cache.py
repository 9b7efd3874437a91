"""Windows of canvases whose other columns keep old keys and values, against attention written down by hand."""

from __future__ import annotations

import pytest
import torch
from frozen import by_hand, computed
from public_configs import MASK, public_model
from torch import Tensor
from toys import padded, small_decoder

from igpo.models import MaskedDecoder

FULL = ["llada", "llada-grouped-tied", "mmada", "dream", "llada-moe"]
LENGTHS, T = (17, 20, 17, 9), 20


@pytest.fixture(params=FULL)
def model(request: pytest.FixtureRequest) -> MaskedDecoder:
    return public_model(request.param)


def canvases(generator: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rows = [(torch.arange(n) * 13 + 7 * n + generator) % 90 for n in LENGTHS]
    tokens, mask = padded(rows, "left", T)
    return tokens, mask, (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def test_matches_attention_over_frozen_keys_by_hand(model: MaskedDecoder) -> None:
    model = model.double()
    tokens, mask, positions = canvases()
    store, slots = model.new_cache(6, T), torch.tensor([4, 1, 0, 5])
    model.hidden(tokens, mask, positions, cache=store.view(slots))
    changed = tokens.clone()
    changed[:, 13:] = MASK  # the columns beyond the window change unseen
    columns = torch.arange(12, 16) + torch.tensor([[0], [1], [2], [0]])
    at = torch.arange(4)[:, None], columns
    view = store.view(slots, columns=columns, real=mask)
    found = model.hidden(changed[at], mask[at], positions[at], cache=view)
    for b, length in enumerate(LENGTHS):
        here = slice(T - length, T)
        frozen = computed(model, tokens[b, here], positions[b, here])
        mine = columns[b] - (T - length)
        wanted, _ = by_hand(model, changed[b, here], positions[b, here], frozen, mine)
        exact = model.hidden(changed[b : b + 1, here])[0, mine]
        # of a shifted model row i predicts token i: the state of the column before it
        shown = slice(1, None) if model.config.shifted else slice(None)
        wanted = wanted[:-1] if model.config.shifted else wanted
        torch.testing.assert_close(found[b, shown], wanted, rtol=0, atol=1e-10)
        assert (wanted - exact[shown]).abs().max() > 1e-4  # and it is an approximation


@torch.no_grad()
def test_a_window_of_everything_is_exact(model: MaskedDecoder) -> None:
    tokens, mask, positions = canvases()
    store, slots = model.new_cache(4, T), torch.arange(4)
    whole = store.view(slots, in_order=True)
    assert torch.equal(
        model.hidden(tokens, mask, positions, cache=whole), model.hidden(tokens, mask, positions)
    )
    changed = torch.where(mask, tokens + 3, tokens)
    view = store.view(slots, in_order=True, columns=torch.arange(T).expand(4, -1), real=mask)
    found = model.hidden(changed, mask, positions, cache=view)
    wanted = model.hidden(changed, mask, positions)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=0, atol=2e-5)


@torch.no_grad()
def test_rows_do_not_depend_on_company_or_padding(model: MaskedDecoder) -> None:
    tokens, mask, positions = canvases()
    columns = torch.arange(14, 17).expand(4, -1)
    at = torch.arange(4)[:, None], columns

    def states(rows: list[int], skip: int = 0) -> Tensor:
        """skip: columns of padding left out."""
        store, slots = model.new_cache(len(rows), T - skip), torch.arange(len(rows)).flip(0)
        own = tokens[rows, skip:], mask[rows, skip:], positions[rows, skip:]
        model.hidden(*own, cache=store.view(slots))
        view = store.view(slots, columns=columns[rows] - skip, real=mask[rows, skip:])
        changed = tokens.masked_fill(tokens % 2 == 0, MASK)
        return model.hidden(changed[at][rows], mask[at][rows], positions[at][rows], cache=view)

    together = states([0, 1, 2, 3])
    assert torch.equal(states([2, 0]), together[[2, 0]])
    assert torch.equal(states([3], skip=11), together[3:])


@torch.no_grad()
def test_refusals() -> None:
    model = small_decoder()
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    store, slots = model.new_cache(2, 6), torch.arange(2)
    with pytest.raises(
        ValueError, match=r"must have shape \(2, 6\), that of its columns, got \(2, 5\)"
    ):
        model.hidden(tokens[:, 1:], cache=store.view(slots))
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"Use torch\.no_grad"):
        model.hidden(tokens, cache=store.view(slots))
    causal = public_model("sdar")
    view = causal.new_cache(2, 6).view(slots)
    with pytest.raises(ValueError, match="must have full attention, got a block-causal one"):
        causal.hidden(tokens, cache=view)
