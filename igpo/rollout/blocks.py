"""Where the blocks of every row lie, and what they hold before the first step."""

from __future__ import annotations

import torch
from torch import Tensor

from igpo.types import Canvas


class Blocks:
    """The blocks of B completions, `width` columns each.

    Of a block-causal policy they count from the first token of the prompt, so that the first one may begin in it and
    the last one reach behind the canvas; else from the first column of the completion.

    num_blocks: of each row.   masked: [row][block], positions to denoise.   ends: [row][block], whether what was given
    fills the block and stops the row there.   whole: of each row, prompt tokens in complete blocks.
    """

    def __init__(self, canvas: Canvas, width: int, *, causal: bool, early_stop: bool) -> None:
        size, self.length = canvas.completion.shape
        device = canvas.tokens.device
        self.width, self.causal, self.prompt_length = width, causal, canvas.prompt_length
        self.mask_id, self.canvas = canvas.mask_id, canvas
        self.early_stop = early_stop and canvas.eos_id is not None
        self.prompts = canvas.attention_mask[:, : canvas.prompt_length].sum(1)
        self.offset = self.prompts % width if causal else torch.zeros_like(self.prompts)
        most = self.length // width + causal
        block = (torch.arange(self.length, device=device) + self.offset[:, None]) // width
        number = (self.offset + self.length - 1) // width + 1
        counts = [
            torch.zeros(size, most, dtype=torch.int64, device=device).scatter_add_(1, block, x.long())
            for x in (canvas.completion == canvas.mask_id, self._stops(canvas.completion))
        ]  # fmt: skip
        # one wait for the device
        found = torch.cat((number[:, None], (self.prompts - self.offset)[:, None], *counts), 1)
        table = found.tolist()
        self.num_blocks: list[int] = [row[0] for row in table]
        self.whole: list[int] = [row[1] for row in table]
        self.masked: list[list[int]] = [row[2 : 2 + most] for row in table]
        enough = 1 if causal else width
        self.ends = [
            [not masked and eos >= enough for masked, eos in zip(row[2:], row[2 + most :], strict=False)]
            for row in table
        ]  # fmt: skip

    def columns(self, blocks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, width) completion columns of a block of each row, and which exist."""
        start = (blocks * self.width - self.offset[rows])[:, None]
        found = torch.arange(self.width, device=rows.device) + start
        return found, (found >= 0) & (found < self.length)

    def tokens(self, tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Of (B, T) tokens those in completion columns; of the nearest one there is for those outside."""
        there = (columns + self.prompt_length).clamp(0, tokens.shape[1] - 1)
        return tokens[rows[:, None], there]

    def look(self, tokens: Tensor, rows: Tensor, blocks: Tensor) -> tuple[list[int], list[int]]:
        """Of each row, how many positions of the block are masked, and whether its tokens stop the row (0 or 1).

        The host waits for the device.
        """
        found, exist = self.columns(blocks, rows)
        inside = self.tokens(tokens, rows, found)
        left = (exist & (inside == self.mask_id)).sum(1)
        ended = torch.zeros_like(left)
        if self.early_stop:
            stops = self._stops(inside)
            ended = ((exist & stops).any(1) if self.causal else stops.all(1)).long()
        left, ended = torch.stack((left, ended)).tolist()
        return left, ended

    def _stops(self, tokens: Tensor) -> Tensor:
        """Which tokens stop a row: of a block-causal policy one that ends a completion, else EOS in all of a block."""
        if not self.early_stop:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return self.canvas.is_end(tokens) if self.causal else tokens == self.canvas.eos_id
