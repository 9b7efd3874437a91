"""What a rollout writes down: the tokens as they stand, and how each of them came about."""

from __future__ import annotations

import torch
from torch import Tensor

from igpo.ops.unmask_step import UnmaskResult
from igpo.types import GIVEN, Canvas


class Records:
    """Of B completions.

    tokens: (B, T) int64.   step_map: (B, L) int64.   statistics: (3, B, L) float32, log-prob, entropy and score at the
    commit.   support: (B, L, top_k) int32, or None.
    """

    def __init__(self, canvas: Canvas, top_k: int | None) -> None:
        size, length = canvas.completion.shape
        device = canvas.tokens.device
        self.mask_id, self.prompt_length = canvas.mask_id, canvas.prompt_length
        self.tokens = canvas.tokens.clone()
        self.step_map = torch.full_like(canvas.completion, GIVEN)
        self.statistics = torch.zeros(3, size, length, device=device)
        self.support = None
        if top_k is not None:
            self.support = torch.full((size, length, top_k), -1, dtype=torch.int32, device=device)

    def commit(
        self, rows: Tensor, columns: Tensor, tick: int, result: UnmaskResult, support: Tensor | None
    ) -> None:
        """Writes what was committed of masked positions: (n, c) columns of n rows. The others stay as they are."""
        there, skipped = (rows[:, None], columns), ~result.committed
        self.tokens[there[0], columns + self.prompt_length] = result.tokens
        # a masked position has no record
        self.step_map[there] = torch.where(skipped, GIVEN, tick)
        found = torch.stack((result.logprob, result.entropy, result.score)).float()
        self.statistics[:, there[0], columns] = found.masked_fill_(skipped, 0)
        if self.support is not None and support is not None:
            self.support[there] = support.int().masked_fill_(skipped[..., None], -1)

    def take_back(self, rows: Tensor, columns: Tensor, again: Tensor) -> None:
        """Masks the columns where `again` ((n, c) bool); their records are as if they were never committed."""
        back = torch.zeros_like(self.step_map[rows]).scatter_add_(1, columns, again.long()).bool()
        completion = self.tokens[:, self.prompt_length :]
        for record, nothing in ((completion, self.mask_id), (self.step_map, GIVEN)):
            record[rows] = record[rows].masked_fill(back, nothing)
        self.statistics[:, rows] = self.statistics[:, rows].masked_fill(back, 0)
        if self.support is not None:
            self.support[rows] = self.support[rows].masked_fill(back[..., None], -1)

    def fill(self, rows: Tensor, token: int, num_steps: Tensor) -> None:
        """Writes `token` to what is masked of rows that stopped after num_steps ((n,)) steps."""
        completion = self.tokens[:, self.prompt_length :]
        masked = completion[rows] == self.mask_id
        completion[rows] = torch.where(masked, token, completion[rows])
        self.step_map[rows] = torch.where(masked, num_steps[:, None], self.step_map[rows])
