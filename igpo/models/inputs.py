"""What a call of the decoder is about: checked inputs, their positions and blocks, and the plan to compute them by."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import CanvasView, KVCache
from .canvas_cache import canvas_plan
from .layout import MIN_ROWS, Cached, Dense, FlashVarlen, Flex, Packed, Plan


class Inputs(NamedTuple):
    """tokens, positions: (B, T) int64.   real: (B, T) bool.   blocks: (B, T) int64, None with full attention.

    documents: (B, T) int64, 0, 1, … along a row; None: a row is one.
    """

    tokens: Tensor
    real: Tensor
    positions: Tensor
    blocks: Tensor | None
    plan: Plan
    documents: Tensor | None = None


def read_inputs(
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    backend: str,
    block_length: int | None,
    cache: KVCache | CanvasView | None,
    document_ids: Tensor | None = None,
) -> Inputs:
    """See MaskedDecoder.hidden. Raises ValueError."""
    _check(tokens, attention_mask, position_ids)
    documents = _documents(document_ids, tokens, attention_mask, cache)
    if position_ids is None:
        position_ids = _columns(tokens, documents)
    blocks = None
    if block_length is not None:
        blocks = position_ids.div(block_length, rounding_mode="floor")
    if attention_mask is not None and attention_mask.dim() == 4:
        if backend != "sdpa" or cache is not None:
            raise ValueError(
                "MaskedDecoder: a mask of queries and keys needs attn_implementation='sdpa' and no cache, got "
                f"{backend!r}{'' if cache is None else ' and a cache'}."
            )
        # a query that may see nothing sees everything: softmax over no key at all would be NaN
        plan: Plan = Dense(attention_mask | ~attention_mask.any(-1, keepdim=True))
        return Inputs(tokens, torch.ones_like(tokens, dtype=torch.bool), position_ids, blocks, plan)
    mask = None if attention_mask is None else attention_mask.bool()
    plan = _plan(tokens, mask, blocks, backend, cache, documents)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return Inputs(tokens, real, position_ids, blocks, plan, documents)


def read_streams(
    noisy: Tensor,
    clean: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    backend: str,
    block_length: int | None,
    document_ids: Tensor | None = None,
) -> Inputs:
    """The columns of noisy, then those of clean. See MaskedDecoder.hidden_of_blocks. Raises ValueError."""
    if block_length is None:
        raise ValueError(
            "MaskedDecoder: hidden_of_blocks must be asked of a block-causal model, got one of full attention, whose "
            "blocks also see the masks of later ones. Use hidden, or load_model(…, block_length=n)."
        )
    _check(noisy, attention_mask, position_ids)
    if clean.shape != noisy.shape:
        raise ValueError(
            f"MaskedDecoder: clean must have the shape of noisy, {tuple(noisy.shape)}, got shape {tuple(clean.shape)}."
        )
    if attention_mask is not None and attention_mask.dim() == 4:
        raise ValueError(
            f"MaskedDecoder: attention_mask must be of tokens, shape {tuple(noisy.shape)}, beside a clean copy, got "
            f"shape {tuple(attention_mask.shape)}."
        )
    documents = _documents(document_ids, noisy, attention_mask, None)
    if position_ids is None:
        position_ids = _columns(noisy, documents)
    tokens, positions = torch.cat((noisy, clean), 1), position_ids.repeat(1, 2)
    mask = None if attention_mask is None else attention_mask.bool().repeat(1, 2)
    blocks = positions.div(block_length, rounding_mode="floor")
    if documents is not None:
        documents = documents.repeat(1, 2)
    is_noisy = torch.arange(tokens.shape[1], device=tokens.device) < noisy.shape[1]
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    if backend == "flex_attention":
        plan: Plan = Flex(mask, blocks, tokens.shape, is_noisy, documents)
    elif documents is not None or _padded(tokens, mask):
        plan = Packed(real, blocks, MIN_ROWS, documents, is_noisy)
    else:
        plan = Dense.of(mask, blocks, is_noisy)
    return Inputs(tokens, real, positions, blocks, plan, documents)


def _documents(
    ids: Tensor | None, tokens: Tensor, attention_mask: Tensor | None, cache: KVCache | CanvasView | None
) -> Tensor | None:  # fmt: skip
    """(B, T) int64: 0, 1, … along each row, one more wherever the id changes."""
    if ids is None:
        return None
    square = attention_mask is not None and attention_mask.dim() == 4
    if square or cache is not None:
        raise ValueError(
            "MaskedDecoder: document_ids must come without a mask of queries and keys and without a cache, got "
            f"{'such a mask' if square else 'a cache'}."
        )
    if ids.shape != tokens.shape or ids.is_floating_point() or not ids.numel():
        raise ValueError(
            f"MaskedDecoder: document_ids must be integers of the shape of tokens, {tuple(tokens.shape)}, at least "
            f"one, got {ids.dtype}, shape {tuple(ids.shape)}."
        )
    return F.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).cumsum(1)


def _columns(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """(B, T) int64: 0, 1, … from the first column of each document."""
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if documents is None:
        return columns
    opens = F.pad(documents.diff(dim=1), (1, 0)) > 0
    return columns - torch.where(opens, columns, 0).cummax(1).values


def _padded(tokens: Tensor, mask: Tensor | None) -> bool:
    """Whether there is padding; not asked of a device that would have to be waited for."""
    return mask is not None and tokens.device.type == "cpu" and not bool(mask.all())


def _plan(
    tokens: Tensor, mask: Tensor | None, blocks: Tensor | None, backend: str, cache: KVCache | CanvasView | None,
    documents: Tensor | None,
) -> Plan:  # fmt: skip
    if isinstance(cache, CanvasView):
        own = _plan(tokens, mask, blocks, backend, None, None)
        return canvas_plan(cache, tokens, blocks, own)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    if cache is not None:
        return Cached(cache, real, blocks)
    if backend == "flash_attention_2":
        return FlashVarlen(real, documents)
    if backend == "flex_attention":
        return Flex(mask, blocks, tokens.shape, documents=documents)
    few = tokens.device.type == "cpu" and tokens.numel() < MIN_ROWS
    if documents is not None or few or _padded(tokens, mask):
        return Packed(real, blocks, MIN_ROWS, documents)
    return Dense.of(mask, blocks)


def last_real(real: Tensor) -> Tensor:
    """(B, T) int64: the last real column up to and including this one; 0 where there is none."""
    columns = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, columns, 0).cummax(1).values


def aligned(
    states: Tensor, real: Tensor, before: Tensor | None, documents: Tensor | None = None
) -> Tensor:
    """Shifted rows moved so that row i predicts token i: the state of the real token before it.

    The first real token of a document gets `before`, the state of the last cached token (B, D), else its own (as
    Dream's code does).
    """
    columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
    previous = torch.cat((columns[:, :1], last_real(real)[:, :-1]), 1)
    first = real.cumsum(1) <= real.long()  # no real token stands before
    if documents is not None:
        first = first | (documents.gather(1, previous) != documents)
    source = torch.where(first, columns, previous)
    moved = states.gather(1, source[..., None].expand_as(states))
    return moved if before is None else torch.where(first[..., None], before[:, None], moved)


def aligned_streams(states: Tensor, inputs: Inputs) -> Tensor:
    """As aligned, of the noisy copy: a block's first token is predicted by the clean copy of the token before it."""
    assert inputs.blocks is not None, "read_streams gives them"
    length = states.shape[1] // 2
    real, blocks = inputs.real[:, :length], inputs.blocks[:, :length]
    documents = None if inputs.documents is None else inputs.documents[:, :length]
    own, clean = (aligned(part, real, None, documents) for part in states.split(length, 1))
    block = blocks[..., None]
    opens = aligned(block, real, None, documents) != block
    return torch.where(opens, clean, own)


def _check(tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    if tokens.dim() != 2:
        raise ValueError(
            f"MaskedDecoder: tokens must have shape (B, T), got shape {tuple(tokens.shape)}."
        )
    size, length = tokens.shape
    if attention_mask is not None and attention_mask.dim() == 4:
        rows, heads, *square = attention_mask.shape
        fits = rows in (1, size) and heads == 1 and square == [length, length]
        if not fits or attention_mask.dtype != torch.bool:
            raise ValueError(
                f"MaskedDecoder: a 4-D attention_mask must be bool of shape ({size} or 1, 1, {length}, {length}), got "
                f"{attention_mask.dtype}, shape {tuple(attention_mask.shape)}."
            )
        attention_mask = None
    for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if value is not None and value.shape != tokens.shape:
            raise ValueError(
                f"MaskedDecoder: {name} must have the shape of tokens, {tuple(tokens.shape)}, "
                f"got shape {tuple(value.shape)}."
            )
