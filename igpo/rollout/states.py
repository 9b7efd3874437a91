"""Where the hidden states of a step come from: the place for caches and captured graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from igpo.types import Canvas, Policy

from .flight import InFlight
from .graphs import Fix
from .guidance import unconditional


class States(Protocol):
    """Hidden states of the rows in flight.

    A round is a block's steps, all rows beginning one at its start, or a single step where rows go on at their own pace
    (rules that commit as many positions as they like). Calls: enter, begin, then hidden once for every step with work.

    block_only: states are of the block's columns alone, not of the whole canvas.   lockstep: rows must begin their
    blocks together; each may be at another block.   num_forwards: sequences x calls of the policy so far.
    """

    block_only: bool
    lockstep: bool
    num_forwards: int

    def enter(self, live: Sequence[InFlight]) -> None:
        """These rows are in flight in the coming round, in no order; all others have left for good."""
        ...

    def begin(self, live: Sequence[InFlight], rows: Tensor, blocks: Tensor) -> None:
        """Their working order: rows and blocks are (n,) int64 on the device."""
        ...

    def hidden(self, count: int) -> list[Tensor]:
        """(count, T, D), or (count, width, D) with block_only, of the first rows of the working order as they stand.

        With guidance a second one, without what was given. Valid until the next call.
        """
        ...


class WholeCanvas:
    """Every step computes the whole canvas anew: exact for every policy.

    batch: rows in flight at most.   fix: see graphs; None: shapes follow the number of rows that work.
    """

    block_only = lockstep = False

    def __init__(
        self, policy: Policy, canvas: Canvas, tokens: Tensor, *, guidance: bool, batch: int, fix: Fix | None
    ) -> None:  # fmt: skip
        self.canvas, self.tokens, self.guidance = canvas, tokens, guidance
        self.num_forwards = 0
        self.run = policy.hidden
        if fix is not None and len(tokens):
            first = torch.arange(min(batch, len(tokens)), device=tokens.device)
            inputs = (tokens, canvas.attention_mask, canvas.position_ids)
            self.run = fix(policy.hidden, [x[first] for x in inputs])

    def enter(self, live: Sequence[InFlight]) -> None:
        pass

    def begin(self, live: Sequence[InFlight], rows: Tensor, blocks: Tensor) -> None:
        self.rows = rows
        self.mask = self.canvas.attention_mask[rows]
        self.position_ids = self.canvas.position_ids[rows]

    def hidden(self, count: int) -> list[Tensor]:
        rows, mask, position_ids = self.rows[:count], self.mask[:count], self.position_ids[:count]
        tokens = self.tokens[rows]
        self.num_forwards += count * (1 + self.guidance)
        found = self.run(tokens, mask, position_ids)
        if not self.guidance:
            return [found]
        # of fixed shape, both results lie in the same memory
        free = unconditional(self.canvas, tokens, rows)
        return [found.clone(), self.run(free, mask, position_ids)]
