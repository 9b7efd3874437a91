"""Canvases: prompts laid out beside masked completions, with or without hints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from igpo.ops import merge_hints
from igpo.types import Canvas, Prompt

GENERATIONS_PER_PROMPT = 2**20  # row_ids leave room for this many completions of one prompt
_MAX_ROW_ID = 2**63 // GENERATIONS_PER_PROMPT


def masked_canvases(
    prompts: Sequence[Prompt],
    *,
    num_generations: int,
    completion_length: int,
    mask_id: int,
    pad_id: int,
    eos_id: int | None = None,
    stop_token_ids: Iterable[int] = (),
    device: str | torch.device = "cpu",
) -> Canvas:
    """G fully masked canvases for each of P prompts; the row of completion g of prompt p is p*G + g.

    Prompts are padded on the left to the longest of them; position_ids count real tokens, so padding changes nothing.
    The random streams of a row belong to prompt.row_id and g, whatever else is in the batch; prompts that share a
    row_id share their random numbers.

    Args:
        prompts: P >= 1 of them, none empty.
        num_generations: G.   completion_length: L, tokens to generate.
        mask_id, pad_id, eos_id: token ids; pad_id may be eos_id, never mask_id.
        stop_token_ids: tokens that end a completion as eos_id does (Canvas.ends); never mask_id.
        device: of the result.
    Raises:
        ValueError: a count that is not positive, no prompt, or a prompt that is empty, holds mask_id, or has a row_id
            outside [0, 2^43).
    """
    stops = frozenset(stop_token_ids)
    special = [("pad_id", pad_id), ("eos_id", eos_id), *(("stop_token_ids", s) for s in stops)]
    _check(prompts, num_generations, completion_length, mask_id, special)
    length = max(len(prompt.ids) for prompt in prompts)
    rows = torch.full((len(prompts), length + completion_length), mask_id, dtype=torch.int64)
    real = torch.ones_like(rows, dtype=torch.bool)
    for row, mask, prompt in zip(rows, real, prompts, strict=True):
        padding = length - len(prompt.ids)
        row[:padding], mask[:padding] = pad_id, False
        row[padding:length] = torch.tensor(prompt.ids)
    group_ids = torch.arange(len(prompts)).repeat_interleave(num_generations)
    starts = torch.tensor([prompt.row_id * GENERATIONS_PER_PROMPT for prompt in prompts])
    row_ids = starts[group_ids] + torch.arange(num_generations).repeat(len(prompts))
    tokens, attention_mask = rows[group_ids], real[group_ids]
    return Canvas(
        tokens=tokens.to(device),
        attention_mask=attention_mask.to(device),
        position_ids=(attention_mask.cumsum(-1) - 1).clamp_min(0).to(device),
        frozen=torch.zeros(len(tokens), completion_length, dtype=torch.bool, device=device),
        row_ids=row_ids.to(device),
        group_ids=group_ids.to(device),
        prompt_length=length,
        mask_id=mask_id,
        eos_id=eos_id,
        stop_token_ids=stops,
    )


def with_hints(canvas: Canvas, hints: Tensor, hint_mask: Tensor) -> Canvas:
    """The canvas with hint tokens written into its completion; they are frozen: no rollout changes them.

    Args:
        hints: (B, L) int64, read only where hint_mask.
        hint_mask: (B, L) bool.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree (igpo.ops.merge_hints), or a hint is mask_id.
    Source: arXiv:2509.10396, section 3 (the hint-injected canvas z_hint).
    """
    completion, generate = merge_hints(canvas.completion, hints, hint_mask, mask_id=canvas.mask_id)
    if bool((generate & hint_mask).any()):
        raise ValueError(
            f"with_hints: hints must not be mask_id={canvas.mask_id} where hint_mask is True. "
            "Leave the positions that are to be generated out of hint_mask."
        )
    tokens = torch.cat((canvas.tokens[:, : canvas.prompt_length], completion), dim=1)
    return replace(canvas, tokens=tokens, frozen=canvas.frozen | hint_mask)


def _check(
    prompts: Sequence[Prompt],
    num_generations: int,
    completion_length: int,
    mask_id: int,
    special: Sequence[tuple[str, int | None]],
) -> None:
    op = "masked_canvases"
    if not prompts:
        raise ValueError(f"{op}: prompts must hold at least one prompt, got none.")
    if not 1 <= num_generations <= GENERATIONS_PER_PROMPT:
        raise ValueError(f"{op}: num_generations must be in [1, 2^20], got {num_generations}.")
    if completion_length < 1:
        raise ValueError(f"{op}: completion_length must be positive, got {completion_length}.")
    for name, token in special:
        if token == mask_id:
            raise ValueError(
                f"{op}: {name} must differ from mask_id, got {token} for both. Give [MASK] an id of its own."
            )
    for index, prompt in enumerate(prompts):
        if not prompt.ids:
            raise ValueError(f"{op}: prompts[{index}] must not be empty, got no ids.")
        if mask_id in prompt.ids:
            raise ValueError(
                f"{op}: prompts[{index}] must not hold mask_id={mask_id}, got it at position "
                f"{prompt.ids.index(mask_id)}. A prompt is never generated; use with_hints for partial completions."
            )
        if not 0 <= prompt.row_id < _MAX_ROW_ID:
            raise ValueError(
                f"{op}: prompts[{index}].row_id must be in [0, 2^43), got {prompt.row_id}."
            )
