"""Keys and values of finished blocks, for block-causal policies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from igpo.types import Canvas

from .blocks import Blocks
from .flight import InFlight
from .graphs import Fix


class BlockCache:
    """A slot for every row in flight: what it keeps is exact, for later tokens change nothing before them.

    A slot holds the columns [0, filled) of its row without gaps; the block at work stands behind the longest slot,
    where it is overwritten by the next step. A finished block moves from there to the end of its own slot. A row that
    leaves frees its slot for one that enters.

    counted: rows go on together, and a finished block costs a call of its own. Else the finished blocks of some rows
    are computed beside the steps of others.   fix: see graphs; the block at work then stands at the end of the cache,
    and slots are given back by halves. None: shapes follow what is kept and in flight.
    """

    block_only, lockstep = True, False

    def __init__(
        self, policy: Any, canvas: Canvas, blocks: Blocks, tokens: Tensor, *, counted: bool, fix: Fix | None
    ) -> None:  # fmt: skip
        self.policy, self.canvas, self.blocks, self.tokens = policy, canvas, blocks, tokens
        self.counted, self.fix, self.num_forwards = counted, fix, 0
        self.held: list[int] = []  # the row of each slot
        self.stored: dict[int, int] = {}  # row -> blocks kept
        self.behind: list[int] = []  # slots whose finished block is still to be computed
        self.cache: Any = None
        self.run: Any = None  # of a step; None: to be made for this cache

    def enter(self, live: Sequence[InFlight]) -> None:
        self._seat(live)
        while True:
            late = [r.row for r in live if self.stored[r.row] < r.block]
            self.behind = [self.held.index(row) for row in late]
            if not late or not (self.counted or len(late) == len(live)):
                break
            self._arrange(live)
            self._compute()
        for r in live:
            r.ready = r.row not in late

    def begin(self, live: Sequence[InFlight], rows: Tensor, blocks: Tensor) -> None:
        self._arrange(live)
        self.order = self._indices([self.held.index(r.row) for r in live])

    def hidden(self, count: int) -> list[Tensor]:
        self.num_forwards += count
        return [self._compute()[self.order[:count]]]

    def _seat(self, live: Sequence[InFlight]) -> None:
        """Gives slots to rows that are new; without enough of them, the cache is made anew."""
        alive = {r.row for r in live}
        new = [r for r in live if r.row not in self.stored]
        idle = [slot for slot, row in enumerate(self.held) if row not in alive]
        if len(new) > len(idle):
            assert len(new) == len(live), "rows enter where others left, or all at once"
            longest = max(map(self._length, range(len(self.blocks.whole))))
            self.cache = self.policy.new_cache(len(new), longest)
            # what is hidden is multiplied by 0, and memory may hold NaN
            self.cache.keys.zero_()
            self.cache.values.zero_()
            self.cache.last = self.cache.keys.new_zeros(len(new), self.policy.head_weight.shape[1])
            self.held, idle, self.run = [r.row for r in new], list(range(len(new))), None
        for slot, r in zip(idle, new, strict=False):
            self.held[slot], self.stored[r.row] = r.row, r.block
        spare = idle[len(new) :]
        if spare and (self.fix is None or 2 * len(live) <= len(self.held)):
            kept = [slot for slot in range(len(self.held)) if slot not in spare]
            self.cache, self.run = self.cache.take(self._indices(kept)), None
            self.held = [self.held[slot] for slot in kept]
        if new:
            self._prefill([r.row for r in new])

    def _prefill(self, rows: list[int]) -> None:
        """Computes all that stands before the first block of new rows."""
        filled = [self._filled(row) for row in rows]
        slots = self._indices([self.held.index(row) for row in rows])
        self.cache.real[slots] = False
        longest = max(filled)
        if not longest:
            return
        there, stop = self._indices(rows), self._indices(filled)[:, None]
        place = torch.arange(longest, device=self.tokens.device).expand(len(rows), -1)
        first = self.canvas.prompt_length - self.blocks.prompts[there][:, None]
        column = (first + place).clamp(max=self.tokens.shape[1] - 1)
        part = self.policy.new_cache(len(rows), longest)
        tokens = self.tokens[there[:, None], column]
        self.policy.hidden(tokens, place < stop, place, cache=part, store=True)
        self.num_forwards += len(rows)
        self.cache.keys[:, slots, :, :longest] = part.keys
        self.cache.values[:, slots, :, :longest] = part.values
        self.cache.real[slots, :longest], self.cache.blocks[slots, :longest] = (
            part.real,
            part.blocks,
        )
        self.cache.last[slots] = part.last

    def _arrange(self, live: Sequence[InFlight]) -> None:
        """What each slot computes next: its row's block, or the finished one before it."""
        at = {r.row: min(r.block, self.stored[r.row]) for r in live}
        rows, blocks = self._indices([self.held, [at.get(row, 0) for row in self.held]])
        columns = self.blocks.columns(blocks, rows)[0] + self.canvas.prompt_length
        self.exist = columns < self.tokens.shape[1]
        self.there = rows[:, None], columns.clamp(max=self.tokens.shape[1] - 1)
        self.position_ids = self.canvas.position_ids[self.there]
        self.cache.length = max(self._filled(row) for row in self.held)
        if self.fix is not None:
            self.cache.length = self.cache.capacity - self.blocks.width

    def _compute(self) -> Tensor:
        """(slots, width, D) of the blocks as they stand; those that are finished are kept."""
        cache, inputs = self.cache, (self.tokens[self.there], self.exist, self.position_ids)
        if not self.behind:
            if self.run is None:
                step = partial(self.policy.hidden, cache=cache)
                self.run = step if self.fix is None else self.fix(step, inputs)
            return self.run(*inputs)
        last, start = cache.last, cache.length
        states = self.policy.hidden(*inputs, cache=cache, store=True)
        found, cache.last, cache.length = cache.last, last, start
        self._move(slice(start, start + self.blocks.width), found)
        self.num_forwards += len(self.behind)
        self.behind = []
        return states

    def _move(self, here: slice, last: Tensor) -> None:
        """Puts finished blocks from where they were computed to the ends of their slots."""
        cache, slots = self.cache, self._indices(self.behind)
        filled = self._indices([self._filled(self.held[slot]) for slot in self.behind])
        to = slots[:, None], filled[:, None] + torch.arange(self.blocks.width, device=slots.device)
        for kept in (cache.keys, cache.values):
            by_column = kept.permute(1, 3, 0, 2, 4)  # slots, columns, layers, heads, channels
            by_column[to] = by_column[slots, here]
        real, blocks = cache.real[slots, here], cache.blocks[slots, here]
        cache.real[:, here] = False
        cache.real[to], cache.blocks[to] = real, blocks
        cache.last[slots] = last[slots]
        for slot in self.behind:
            self.stored[self.held[slot]] += 1

    def _filled(self, row: int) -> int:
        return self.blocks.whole[row] + self.stored[row] * self.blocks.width

    def _length(self, row: int) -> int:
        return self.blocks.whole[row] + self.blocks.num_blocks[row] * self.blocks.width

    def _indices(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.tokens.device)
