"""Prefix and dual cache: keys and values of everything outside the block at work, as they stood when it began."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.types import Canvas, Policy

from .blocks import Blocks
from .flight import InFlight

CACHES = ("none", "prefix", "dual")


class CanvasCache:
    """The hidden states of blocks: exact at a block's first step, approximate at the others.

    A row's first step in a block computes the whole canvas. Later ones compute the block alone (dual), or everything
    from the block on (prefix), against the keys and values that the first one left of the rest. Of a shifted model the
    column before is computed too: its state predicts the block's first token. (Fast-dLLM commits that token at the
    first step and goes on without; here no position is special.)

    Source: Fast-dLLM (arXiv:2505.22618), section 3.2.
    """

    block_only, lockstep = True, False

    def __init__(
        self, policy: Any, canvas: Canvas, blocks: Blocks, tokens: Tensor, *, dual: bool
    ) -> None:
        self.policy, self.canvas, self.blocks, self.tokens = policy, canvas, blocks, tokens
        self.dual, self.num_forwards = dual, 0
        self.lead = int(policy.config.shifted)
        self.is_padded = not bool(canvas.attention_mask.all())
        self.store: Any = None
        self.slots: dict[int, int] = {}  # of rows whose block has begun
        self.begun: dict[int, int] = {}  # row -> block

    def enter(self, live: Sequence[InFlight]) -> None:
        self.begun = {r.row: r.block for r in live if self.begun.get(r.row) == r.block}
        self.slots = {row: self.slots[row] for row in self.begun}

    def begin(self, live: Sequence[InFlight], rows: Tensor, blocks: Tensor) -> None:
        if self.store is None:
            self.store = self.policy.new_cache(len(live), self.tokens.shape[1])
        # with no block under way the slots are in working order, and nothing has to be picked
        taken = set(self.slots.values())
        free = (slot for slot in range(self.store.batch) if slot not in taken)
        for r in live:
            if r.row not in self.slots:
                self.slots[r.row] = next(free)
        self.live, self.rows = list(live), rows
        slots = [self.slots[r.row] for r in live]
        self.in_order, self.at = slots == list(range(len(live))), self._indices(slots)
        self.start = blocks * self.blocks.width + self.canvas.prompt_length

    def hidden(self, count: int) -> list[Tensor]:
        begun = [r.row in self.begun for r in self.live[:count]]
        parts = [[i for i in range(count) if not begun[i]]]
        work = [i for i in range(count) if begun[i]]
        if self.dual:
            parts.append(work)
        else:  # windows of one length at a time
            work.sort(key=lambda i: self.live[i].block)
            parts += [list(run) for _, run in groupby(work, key=lambda i: self.live[i].block)]
        parts = [part for part in parts if part]
        self.num_forwards += count
        states = [self._window(part) if begun[part[0]] else self._whole(part) for part in parts]
        if len(states) == 1:
            return states
        order = self._indices([i for part in parts for i in part])
        return [torch.cat(states)[order.argsort()]]

    def _whole(self, part: list[int]) -> Tensor:
        """(n, width, D) of rows whose block begins."""
        pick = self._pick(part)
        for i in part:
            self.begun[self.live[i].row] = self.live[i].block
        every = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        states = self._run(pick, every.expand(len(part), -1), whole=True)
        own = self.start[pick, None] + torch.arange(self.blocks.width, device=states.device)
        return states[torch.arange(len(part), device=states.device)[:, None], own]

    def _window(self, part: list[int]) -> Tensor:
        """(n, width, D) of rows whose block is under way, all at the same one but with dual."""
        pick, length = self._pick(part), self.lead + self.blocks.width
        if not self.dual:
            behind = self.blocks.length - self.live[part[0]].block * self.blocks.width
            length = self.lead + behind
        columns = self.start[pick, None] - self.lead
        columns = columns + torch.arange(length, device=columns.device)
        # without a prompt there is no column before the first one
        states = self._run(pick, columns.clamp(min=0))
        return states[:, self.lead : self.lead + self.blocks.width]

    def _run(self, pick: Tensor | slice, columns: Tensor, *, whole: bool = False) -> Tensor:
        rows = self.rows[pick]
        there = rows[:, None], columns
        mask = self.canvas.attention_mask
        view = self.store.view(
            self.at[pick],
            in_order=self.in_order and isinstance(pick, slice),
            columns=None if whole else columns,
            real=mask[rows] if self.is_padded else None,
        )
        return self.policy.hidden(
            self.tokens[there], mask[there], self.canvas.position_ids[there], cache=view
        )

    def _pick(self, part: list[int]) -> Tensor | slice:
        """The rows of a part; a slice where they are the first ones."""
        return slice(0, len(part)) if part[-1] == len(part) - 1 else self._indices(part)

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.tokens.device)


def check_cache(policy: Policy, cfg: RolloutConfig) -> None:
    """Raises ValueError for an unknown cache, or a policy or a guidance it cannot be used with."""
    name = cfg.approximate_cache
    if name not in CACHES:
        raise ValueError(
            f"denoise: approximate_cache must be one of {', '.join(CACHES)}, got {name!r}."
        )
    if name == "none":
        return
    reasons = {
        "with a block-causal policy, whose own cache (use_cache) is exact": getattr(policy, "block_length", None)
        is not None,
        "with a policy that keeps no keys and values (one without new_cache)": not hasattr(policy, "new_cache"),
        f"with cfg_scale={cfg.cfg_scale}, which looks at two canvases a row": cfg.cfg_scale > 0,
        "with cuda_graphs=on, which records whole canvases": cfg.cuda_graphs == "on",
    }  # fmt: skip
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"denoise: approximate_cache must be none {reason}, got {name!r}. Set approximate_cache=none."
            )
