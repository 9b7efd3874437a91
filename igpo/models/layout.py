"""How the tokens of a batch lie in memory, and which of them see each other: one plan per attention backend.

pack(x)           (B, T, …) -> what the layers compute on: the same, or (1, N, …) without the padding
attend(i, q, k, v)  (., H, ., d) of layer i -> the same shape
unpack(x)         back to (B, T, …)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVCache

# MKL multiplies a handful of rows by other kernels than many, and so rounds otherwise. From 16 rows on, a row's product
# in float32 is the same bits in any company (one thread; measured for K in {16 … 4096}, torch 2.13, Xeon AVX-512).
MIN_ROWS = 16


Run = tuple[int, int, int]  # sequences of equal length side by side: start, count, length


class Plan(Protocol):
    def pack(self, x: Tensor) -> Tensor: ...
    def unpack(self, x: Tensor) -> Tensor: ...
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


def sdpa(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=grouped)


def block_visible(blocks: Tensor, query_blocks: Tensor | None = None) -> Tensor:
    """(B, S) block of each key, (B, T) of each query -> (B, 1, T, S) bool: blocks see themselves and those before."""
    queries = blocks if query_blocks is None else query_blocks
    return blocks[:, None, None, :] <= queries[:, None, :, None]


def stream_sees(
    query_block: Tensor, key_block: Tensor, query_noisy: Tensor, key_noisy: Tensor
) -> Tensor:
    """Of [noisy || clean]: a noisy query sees the noisy keys of its block and the clean ones of the blocks before; a
    clean one sees the clean keys up to its block. Source: arXiv:2503.09573 (BD3-LM)."""
    of_clean = ~key_noisy & (key_block <= query_block - query_noisy.long())
    return of_clean | (query_noisy & key_noisy & (key_block == query_block))


def streams_visible(blocks: Tensor, noisy: Tensor) -> Tensor:
    """(B, T) block of each token of [noisy || clean], (B, T) whether it is noisy -> (B, 1, T, T) bool: stream_sees."""
    queries, keys = blocks[:, None, :, None], blocks[:, None, None, :]
    return stream_sees(queries, keys, noisy[:, None, :, None], noisy[:, None, None, :])


class Dense:
    """Padding is computed with and hidden by the mask."""

    def __init__(self, visible: Tensor | None) -> None:
        self.visible = visible

    @classmethod
    def of(cls, real: Tensor | None, blocks: Tensor | None, noisy: Tensor | None = None) -> Dense:
        """noisy: (T,) bool, the columns of the noisy copy; None: there is one copy."""
        if blocks is None:
            if real is None:
                return cls(None)
            # a sequence of padding only sees itself: softmax over no key at all would be NaN
            return cls((real | ~real.any(-1, keepdim=True))[:, None, None, :])
        visible = block_visible(blocks)
        if noisy is not None:
            visible = streams_visible(blocks, noisy.expand_as(blocks))
        if real is not None:
            itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
            visible = visible & real[:, None, None, :] | itself
        return cls(visible)

    def pack(self, x: Tensor) -> Tensor:
        return x

    unpack = pack

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, key, value, self.visible)


class Packed:
    """Padding is left out: the real tokens of all sequences stand one after the other, and each sequence attends alone.

    What comes out for a sequence does not depend on its padding or its company, to the last bit where a product of
    MIN_ROWS rows does not; `filler` rows of zeros see to that in small batches.

    documents: (B, T) int64, not decreasing along a row: sequences are the documents of a row, not the row. noisy: (T,)
    bool, the columns of the noisy copy of two; a document's clean copy then stands behind its noisy one.
    """

    def __init__(
        self, real: Tensor, blocks: Tensor | None, min_rows: int = 0, documents: Tensor | None = None,
        noisy: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.shape = real.shape
        self.index = real.flatten().nonzero().squeeze(1)
        sequences = torch.arange(real.shape[0], device=real.device)[:, None].expand_as(real)
        if documents is not None:
            sequences = sequences * real.shape[1] + documents
        sequences = sequences.flatten()[self.index]
        if noisy is not None:
            sequences, order = sequences.sort(stable=True)
            self.index = self.index[order]
        self.lengths: list[int] = sequences.unique_consecutive(return_counts=True)[1].tolist()
        self.filler = max(0, min_rows - len(self.index))
        packed = None if blocks is None else self.pack(blocks)[0]
        is_noisy = None if noisy is None else self.pack(noisy.expand_as(real))[0]
        self.runs = [(*run, _seen_in(run, packed, is_noisy)) for run in self._runs()]

    def pack(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)[self.index]
        if self.filler:
            rows = torch.cat((rows, rows.new_zeros(self.filler, *rows.shape[1:])))
        return rows[None]

    def unpack(self, x: Tensor) -> Tensor:
        result = x.new_zeros(self.shape.numel(), *x.shape[2:])
        return result.index_copy(0, self.index, x[0, : len(self.index)]).unflatten(0, self.shape)

    def _runs(self) -> list[Run]:
        lengths, runs, start = [*self.lengths, self.filler], [], 0
        for length, run in groupby(lengths):
            count = len(list(run))
            if length:
                runs.append((start, count, length))
            start += count * length
        return runs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # split, whose gradient is one concatenation; that of a slice is as large as the whole, for every sequence
        sizes = [count * length for _, count, length, _ in self.runs]
        parts = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
        mixed = []
        for (_, count, length, visible), heads in zip(self.runs, parts, strict=True):
            q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in heads)
            mixed.append(sdpa(q, k, v, visible).transpose(0, 1).flatten(1, 2))
        return torch.cat(mixed, dim=1)[None]


def _seen_in(run: Run, blocks: Tensor | None, noisy: Tensor | None) -> Tensor | None:
    """(count, 1, length, length) bool: who sees whom in sequences without padding; None: everyone."""
    if blocks is None:
        return None
    start, count, length = run
    here = slice(start, start + count * length)
    mine = blocks[here].view(count, length)
    return (
        block_visible(mine)
        if noisy is None
        else streams_visible(mine, noisy[here].view(count, length))
    )


class FlashVarlen(Packed):
    """Packed for flash-attn: sequences of different length in one call, no padding."""

    def __init__(self, real: Tensor, documents: Tensor | None = None) -> None:
        super().__init__(real, None, documents=documents)
        lengths = torch.tensor(self.lengths, device=real.device)
        self.ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.longest = max(self.lengths, default=0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        mixed = flash_attn_varlen_func(
            q, k, v, self.ends, self.ends, self.longest, self.longest, causal=False
        )
        return mixed.transpose(0, 1)[None]


class Flex(Dense):
    """Padding and blocks as a rule that FlexAttention compiles: whole tiles nobody sees are skipped."""

    def __init__(
        self, real: Tensor | None, blocks: Tensor | None, shape: Sequence[int], noisy: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(None)
        given = [x for x in (real, blocks, documents) if x is not None]
        if not given:
            self.block_mask = None
            return
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k >= 0) if real is None else real[b, k]
            if documents is not None:
                seen = seen & (documents[b, q] == documents[b, k])
            if blocks is not None and noisy is not None:
                return seen & stream_sees(blocks[b, q], blocks[b, k], noisy[q], noisy[k])
            return seen if blocks is None else seen & (blocks[b, k] <= blocks[b, q])

        size, length = shape
        device = str(given[0].device)
        self.block_mask = create_block_mask(rule, size, None, length, length, device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        return compiled_flex()(query, key, value, block_mask=self.block_mask, enable_gqa=grouped)


class Cached:
    """New tokens see the cached ones and each other; their keys and values go into the cache."""

    def __init__(self, cache: KVCache, real: Tensor, blocks: Tensor | None) -> None:
        self.cache, self.real = cache, real
        self.blocks = torch.zeros_like(real, dtype=torch.int64) if blocks is None else blocks
        cache.reserve(*real.shape)
        self.stop = cache.length + real.shape[1]
        keys = torch.cat((cache.blocks[:, : cache.length], self.blocks), 1)
        seen = torch.cat((cache.real[:, : cache.length], real), 1)
        itself = torch.arange(self.stop, device=real.device)
        itself = itself == itself[cache.length :, None]
        self.visible = block_visible(keys, self.blocks) & seen[:, None, None, :] | itself

    pack = unpack = Dense.pack

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.write(layer, key, value)
        return sdpa(query, keys, values, self.visible)


_compiled: Any = None


def compiled_flex() -> Any:
    """FlexAttention, compiled once per process: eager, it would hold the whole score matrix."""
    global _compiled
    if _compiled is None:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled = torch.compile(flex_attention)
    return _compiled
