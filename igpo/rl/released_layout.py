"""The hint layout of the authors' released code (facebookresearch/igpo, 2025-12-27), which is not the paper's.

It differs from `explorer.original_layout` in that hints never lie on the last canvas tokens, a short last chunk is
dropped, the number of *hidden* chunks is rounded down, and the gaps between revealed chunks are stretched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from igpo.config import InpaintConfig
from igpo.types import Canvas, Prompt, Seed

FREE_TAIL = 30  # canvas tokens at the end that hold no hints (released generate.py)
MAX_STRETCH = 1.5  # largest stretch of gaps (same)
MAX_SPACING = 100  # largest gap after stretching, tokens (released trainer's configuration)

Chunk = tuple[int, int]  # [start, end) in the trace


def scaled_layout(
    prompts: Sequence[Prompt], canvas: Canvas, ratios: Tensor, cfg: InpaintConfig, seed: Seed
) -> tuple[Tensor, Tensor]:
    """Hints as the released code lays them out; the arguments and results of `explorer.original_layout`.

    Ratios are sorted within a group, as there. With cfg.exclude_answer False the last chunk is always revealed, which
    is what the released code does whatever its configuration says; a ratio of 0 gives no hints at all.
    """
    length = canvas.frozen.shape[1]
    hints = torch.zeros(len(ratios), length, dtype=torch.int64)
    hint_mask = torch.zeros(len(ratios), length, dtype=torch.bool)
    stream, group_ids = seed.named("chunks"), canvas.group_ids.cpu()
    for group in group_ids.unique().tolist():
        rows, prompt = (group_ids == group).nonzero()[:, 0], prompts[group]
        trace = prompt.trace_ids[: prompt.hint_length] if cfg.exclude_answer else prompt.trace_ids
        for row, ratio in zip(rows.tolist(), ratios[rows].sort().values.tolist(), strict=True):
            rng = stream.generator(int(canvas.row_ids[row]))
            chunks = cut(min(len(trace), length - FREE_TAIL), cfg, rng)
            shown = reveal(chunks, ratio, rng, last=not cfg.exclude_answer)
            hints[row], hint_mask[row] = place(trace, shown, length)
    return hints, hint_mask


def cut(length: int, cfg: InpaintConfig, rng: np.random.Generator) -> list[Chunk]:
    """Consecutive chunks of U{chunk_min..chunk_max} tokens; what is left at the end and too short is dropped."""
    chunks, start = [], 0
    while length - start >= cfg.chunk_min:
        size = min(int(rng.integers(cfg.chunk_min, cfg.chunk_max, endpoint=True)), length - start)
        chunks.append((start, start + size))
        start += size
    return chunks


def reveal(
    chunks: list[Chunk], ratio: float, rng: np.random.Generator, *, last: bool
) -> list[Chunk]:
    """The N - floor(N (1 - ratio)) chunks that stay after hiding the rest at random, and the last one if `last`."""
    if ratio == 0:
        return []
    hidden = set(
        rng.choice(len(chunks), int(len(chunks) * (1 - ratio)), replace=False).tolist()
        if chunks
        else []
    )
    if last:
        hidden.discard(len(chunks) - 1)
    return [chunk for index, chunk in enumerate(chunks) if index not in hidden]


def place(trace: Sequence[int], shown: Sequence[Chunk], length: int) -> tuple[Tensor, Tensor]:
    """Puts the shown chunks on a canvas of `length` tokens: (length,) hints int64 and hint_mask bool.

    Gaps, and what precedes the first chunk, are multiplied by clip((length - FREE_TAIL) / len(trace), 1, MAX_STRETCH);
    gaps are then capped at MAX_SPACING. A chunk that runs into the free tail is cut, the chunks after it are dropped.
    """
    hints = torch.zeros(length, dtype=torch.int64)
    hint_mask = torch.zeros(length, dtype=torch.bool)
    usable = length - FREE_TAIL
    stretch = min(MAX_STRETCH, max(1.0, usable / max(1, len(trace))))
    at = source_end = 0
    for index, (start, end) in enumerate(shown):
        gap = int((start - source_end) * stretch)
        at += gap if index == 0 else min(gap, MAX_SPACING)
        if at >= usable:
            break
        kept = min(end - start, usable - at)
        hints[at : at + kept] = torch.tensor(trace[start : start + kept], dtype=torch.int64)
        hint_mask[at : at + kept] = True
        at, source_end = at + kept, end
    return hints, hint_mask
