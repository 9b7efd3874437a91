"""Keys and values of finished blocks, for block-causal policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sampler import Sampler


class BlockCache:
    """Keys and values of finished blocks, for the rows that are still denoised."""

    def __init__(self, sampler: Sampler, live: list[int]) -> None:
        self.sampler, self.held = sampler, list(live)
        rows = torch.tensor(live, device=sampler.tokens.device)
        canvas, width = sampler.canvas, sampler.cfg.block_length
        prompts = canvas.attention_mask[rows, : canvas.prompt_length].sum(1)
        whole = prompts - sampler.offset[rows]  # tokens in complete blocks
        longest = int(whole.max())
        blocks = max(sampler.num_blocks[row] for row in live)
        policy: Any = sampler.policy
        self.cache: Any = policy.new_cache(len(live), longest + blocks * width)
        if longest:
            place = torch.arange(longest, device=rows.device).expand(len(rows), -1)
            first = canvas.prompt_length - prompts[:, None]
            there = (first + place).clamp(max=canvas.prompt_length - 1)
            tokens = sampler.tokens[rows[:, None], there]
            policy.hidden(tokens, place < whole[:, None], place, cache=self.cache, store=True)
            sampler.num_forwards += len(rows)

    def enter(self, block: int, live: list[int], rows: Tensor) -> None:
        """Rows that left are dropped; the block before, complete now, is stored."""
        if live != self.held:
            where = {row: i for i, row in enumerate(self.held)}
            self.cache = self.cache.take(
                torch.tensor([where[row] for row in live], device=rows.device)
            )
            self.held = list(live)
        if block:
            self.hidden(block - 1, rows, store=True)
            self.sampler.num_forwards += len(rows)

    def hidden(self, block: int, rows: Tensor, *, store: bool = False) -> Tensor:
        """(n, block_length, D) of the block as it stands."""
        canvas, policy = self.sampler.canvas, self.sampler.policy
        columns = self.sampler.columns(block, rows)[0] + canvas.prompt_length
        exist = columns < canvas.tokens.shape[1]
        there = rows[:, None], columns.clamp(max=canvas.tokens.shape[1] - 1)
        cached: Any = policy.hidden
        return cached(
            self.sampler.tokens[there], exist, canvas.position_ids[there], cache=self.cache, store=store
        )  # fmt: skip
