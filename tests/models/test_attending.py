"""Who sees whom: padding, company, blocks, caches and backends change nothing but what they are meant to."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from public_configs import MASK, PUBLIC, public_model
from torch import Tensor
from torch.nn.attention import flex_attention
from toys import padded

from igpo.models import MaskedDecoder, layout
from igpo.ops._head import head_logits

ROWS = [torch.arange(n) * 7 % 120 for n in (9, 4, 1, 9, 13)]
BLOCKS = {"sdar": 4, "sdar-moe": 4, "dream-reasoner": 4, "llada2": 4}


def model_of(name: str, **changes) -> MaskedDecoder:
    model = public_model(name, **changes)
    if name in BLOCKS:
        model.config.block_length = BLOCKS[name]
    return model


@pytest.fixture(params=list(PUBLIC))
def model(request: pytest.FixtureRequest) -> MaskedDecoder:
    return model_of(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_and_company_change_no_bit(model: MaskedDecoder, side: str) -> None:
    check_padding_and_company(model, side)


@pytest.mark.parametrize("name", ["llada", "llada2"])
@torch.no_grad()
def test_nor_do_threads(name: str, threads: int) -> None:
    check_padding_and_company(model_of(name), "left")


def check_padding_and_company(model: MaskedDecoder, side: str) -> None:
    tokens, mask = padded(ROWS, side, width=15)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(tokens, mask, positions).logits
    hidden = model.hidden(tokens, mask, positions)
    for b, row in enumerate(ROWS):
        assert torch.equal(logits[b][mask[b]], model(row[None]).logits[0]), b
        assert torch.equal(hidden[b][mask[b]], model.hidden(row[None])[0]), b
        some = [b, (b + 1) % 5]
        again = model(tokens[some], mask[some], positions[some]).logits
        assert torch.equal(again[0][mask[b]], logits[b][mask[b]]), b


@torch.no_grad()
def test_company_changes_no_bit_without_padding(model: MaskedDecoder) -> None:
    tokens = torch.randint(0, 120, (7, 24))
    together = model(tokens).logits
    for b in range(7):
        assert torch.equal(model(tokens[b : b + 1]).logits[0], together[b])


@pytest.mark.parametrize("name", ["llada", "dream", "sdar"])
@torch.no_grad()
def test_a_device_is_never_waited_for(name: str) -> None:
    """The meta device has no values to read: packing, which asks for lengths, is for CPUs alone."""
    model = model_of(name).to("meta")
    tokens, mask = padded(ROWS, "left", width=15)
    assert model.hidden(tokens.to("meta"), mask.to("meta")).shape == (5, 15, 64)


@torch.no_grad()
def test_positions_are_columns_unless_given(model: MaskedDecoder) -> None:
    tokens, mask = padded(ROWS, "left", width=15)
    columns = torch.arange(15).expand(5, 15)
    assert torch.equal(model(tokens, mask).logits, model(tokens, mask, columns).logits)


@pytest.mark.parametrize("name", ["dream", "llada"])
def test_row_i_of_hidden_predicts_token_i(name: str) -> None:
    """Dream's row i of the logits predicts token i + 1; the Policy protocol wants the row that predicts token i."""
    model = model_of(name)
    tokens, mask = padded(ROWS, "left", width=15)
    raw = model(tokens, mask).logits
    policy = head_logits(model.hidden(tokens, mask), model.head_weight)
    for b, row in enumerate(ROWS):
        mine, theirs = policy[b][mask[b]], raw[b][mask[b]]
        if name == "dream":
            assert len(row) == 1 or torch.equal(mine[1:], theirs[:-1])
            assert torch.equal(mine[0], theirs[0])
        else:
            assert torch.equal(mine, theirs)
    gap = torch.tensor([[True, True, False, True]])  # padding between real tokens is skipped
    tokens = torch.tensor([[5, 6, 1, 7]])
    moved = model.hidden(tokens, gap)[0]
    states = model(tokens, gap).last_hidden_state[0]
    assert torch.equal(moved[3], states[1 if name == "dream" else 3])


@torch.no_grad()
def test_blocks_see_themselves_and_those_before() -> None:
    model = model_of("sdar")
    tokens = torch.randint(0, 120, (1, 12))
    before = model(tokens).logits[0]
    other = tokens.clone()
    other[0, 7] = (tokens[0, 7] + 1) % 120
    moved = (model(other).logits[0] - before).abs().amax(-1) > 0
    assert moved.tolist() == [False] * 4 + [True] * 8


@torch.no_grad()
def test_a_mask_of_queries_and_keys_replaces_the_blocks() -> None:
    model = model_of("sdar")
    tokens = torch.randint(0, 120, (2, 12))
    blocks = torch.arange(12) // 3
    visible = (blocks[None, :] <= blocks[:, None])[None, None]
    wanted = public_model("sdar")
    wanted.config.block_length = 3
    torch.testing.assert_close(model(tokens, visible).logits, wanted(tokens).logits)
    with pytest.raises(ValueError, match=r"must be bool of shape \(2 or 1, 1, 12, 12\), got"):
        model(tokens, visible.float())


@pytest.mark.parametrize("name", [*BLOCKS, "dream"])
@torch.no_grad()
def test_a_cache_of_finished_blocks_is_exact(name: str) -> None:
    """Prompts of 6, 8 and 3 tokens, padded on the left; blocks counted from each row's first token."""
    model = model_of(name).double()
    model.config.block_length = 4
    rows = [torch.arange(n) * 11 % 120 for n in (18, 20, 15)]
    tokens, mask = padded(rows, "left", width=20)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    truth = model.hidden(tokens, mask, positions)
    cache = model.new_cache(3, 24)
    whole = [len(row) // 4 * 4 for row in rows]
    start = [0, 0, 0]
    for width in (8, 4, 4, 4):
        take = [min(width, max(0, size - at)) for at, size in zip(start, whole, strict=True)]
        parts = [row[at : at + n] for row, at, n in zip(rows, start, take, strict=True)]
        block, real = padded(parts, "left", width)
        where = real.cumsum(1) - 1 + torch.tensor(start)[:, None]
        noisy = block.masked_fill(real, MASK)  # a look without storing leaves the cache as it was
        model.hidden(noisy, real, where.clamp_min(0), cache=cache)
        states = model.hidden(block, real, where.clamp_min(0), cache=cache, store=True)
        for b, (at, n) in enumerate(zip(start, take, strict=True)):
            if n:
                mine = truth[b][mask[b]][at : at + n]
                torch.testing.assert_close(states[b][real[b]], mine, rtol=0, atol=1e-12)
        start = [at + n for at, n in zip(start, take, strict=True)]
    assert cache.length == 20
    some = cache.take(torch.tensor([2, 0]))
    block = torch.full((2, 4), MASK)
    where = torch.tensor([[12, 13, 14, 15], [16, 17, 18, 19]])
    both = model.hidden(
        torch.cat((block, block[:1])),
        None,
        torch.cat((where[1:], where[1:], where[:1])),
        cache=cache,
    )
    torch.testing.assert_close(model.hidden(block, None, where, cache=some), both[[2, 0]])


def test_a_cache_refuses_what_it_cannot_hold() -> None:
    model, tokens = model_of("sdar"), torch.zeros(2, 4, dtype=torch.int64)
    cache = model.new_cache(2, 6)
    with pytest.raises(RuntimeError, match=r"got gradients enabled\. Use torch\.no_grad"):
        model.hidden(tokens, cache=cache)
    with torch.no_grad():
        model.hidden(tokens, cache=cache, store=True)
        with pytest.raises(ValueError, match="capacity must hold 8 tokens, got 6"):
            model.hidden(tokens, cache=cache)
        with pytest.raises(ValueError, match="must have 2 rows, those of the cache, got 1"):
            model.hidden(tokens[:1], cache=cache)


@torch.no_grad()
def test_flex_attention_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: compiling takes a CPU ten seconds a shape."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(layout, "_compiled", flex_attention.flex_attention)
    tokens, mask = padded(ROWS, "left", width=15)
    for name in ("sdar", "llada"):
        model = model_of(name)
        expected = model(tokens, mask).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(
            model(tokens, mask).logits[mask], expected[mask], rtol=0, atol=2e-5
        )
    assert torch.equal(model.hidden(tokens, torch.ones_like(mask)), model.hidden(tokens))


def test_flash_attention_says_why_it_cannot() -> None:
    model = model_of("sdar")
    with pytest.raises(ValueError, match="flash-attn has no block-causal mask; use flex_attention"):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(
        ValueError, match="'eager' cannot be used: it must be one of sdpa, flex_att"
    ):
        model.set_attn_implementation("eager")
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ValueError, match="the package flash-attn is not installed"):
            model_of("llada").set_attn_implementation("flash_attention_2")


def test_flash_attention_gets_sequences_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with flash_attn_varlen_func's signature: what it is given is what the masked path computes."""
    seen = []

    def varlen(q, k, v, ends_q, ends_k, longest_q, longest_k, *, causal: bool) -> Tensor:
        assert (longest_q, longest_k, causal) == (13, 13, False)
        assert torch.equal(ends_q, ends_k)
        assert ends_q.dtype == torch.int32
        seen.append(ends_q.tolist())
        parts = []
        for first, last in zip(ends_q.tolist(), ends_q.tolist()[1:], strict=False):
            heads = (x[first:last].transpose(0, 1) for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(0, 1))
        return torch.cat(parts)

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    model = model_of("dream")
    tokens, mask = padded(ROWS, "left", width=15)
    expected = model(tokens, mask).logits
    model.set_attn_implementation("flash_attention_2")
    torch.testing.assert_close(model(tokens, mask).logits[mask], expected[mask], rtol=0, atol=2e-5)
    documents = torch.arange(5)[:, None].expand_as(mask)[mask][None]
    packed = model(tokens[mask][None], document_ids=documents).logits[0]
    torch.testing.assert_close(packed, expected[mask], rtol=0, atol=2e-5)
    assert seen == [[0, 9, 13, 14, 23, 36]] * 4
