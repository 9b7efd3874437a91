"""Policies and canvases small enough for any test: a decoder of 2 layers, and logits written down by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from igpo.canvas import masked_canvases, with_hints
from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder, MaskedDecoderConfig
from igpo.rollout import denoise
from igpo.types import Canvas, Prompt, Rollouts, Seed, take

VOCAB, MASK, EOS, PAD = 23, 22, 21, 20


def small_decoder(seed: int = 1) -> MaskedDecoder:
    config = MaskedDecoderConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        initializer_range=0.3, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return MaskedDecoder.from_seed(config, seed)


class Scripted:
    """A policy without a model: the last prompt token p says that completion position i has logits script[p, i]."""

    head_bias = None

    def __init__(self, script: Tensor) -> None:
        self.script, self.head_weight = script, torch.eye(script.shape[-1])

    def hidden(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        length = self.script.shape[1]
        prompt = tokens.shape[1] - length
        return torch.cat(
            (torch.zeros(len(tokens), prompt, len(self.head_weight)), self.script[tokens[:, prompt - 1]]), 1
        )  # fmt: skip


def early_script() -> Scripted:
    """Blocks of 4: prompt token 1 has all EOS in block 1, 2 in block 0, 3 all but one in block 0; elsewhere token 3."""
    script = torch.zeros(4, 16, VOCAB)
    script[..., 3] = 9.0
    script[1, 4:8, EOS] = script[2, :4, EOS] = script[3, 1:4, EOS] = 20.0
    return Scripted(script)


def canvases(
    *, generations: int = 3, length: int = 16, ends: tuple[int, ...] = (3, 5, 2)
) -> Canvas:
    """Prompts of different lengths that end in tokens `ends`."""
    prompts = [
        Prompt("", (*range(1, 1 + (3 * i + 1) % 5), end), row_id=100 - i)
        for i, end in enumerate(ends)
    ]
    return masked_canvases(
        prompts, num_generations=generations, completion_length=length, mask_id=MASK, pad_id=PAD, eos_id=EOS
    )  # fmt: skip


def hinted(canvas: Canvas, ratio: float = 0.4) -> Canvas:
    shape = canvas.frozen.shape
    mask = torch.rand(shape) < ratio * torch.arange(shape[0])[:, None] / (shape[0] - 1)
    return with_hints(canvas, torch.randint(0, PAD, shape), mask)  # row 0 has none


def before_step(rollouts: Rollouts, step: int) -> Tensor:
    """The canvas before a denoise step, rebuilt."""
    completion = rollouts.completion.masked_fill(rollouts.step_map >= step, MASK)
    return torch.cat((rollouts.canvas.tokens[:, : rollouts.canvas.prompt_length], completion), 1)


def padded(rows: list[Tensor], side: str, width: int, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of tokens in one (B, width) batch, and its attention mask."""
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for b, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        tokens[b, where], mask[b, where] = row, True
    return tokens, mask


def rolled_alike(decoder: MaskedDecoder, canvas: Canvas, cfg: RolloutConfig) -> Rollouts:
    """denoise with Seed(7), after asserting that neither other rows, their number nor padding change a row."""
    whole = denoise(decoder, canvas, cfg, Seed(7))
    order = torch.tensor([8, 2, 5])  # one row of every prompt
    for size in (1, 2):
        some = denoise(decoder, take(canvas, order), replace(cfg, rollout_batch_size=size), Seed(7))
        assert torch.equal(some.tokens, whole.tokens[order])
        assert torch.equal(some.step_map, whole.step_map[order])
    bare = take(canvas, torch.tensor([8]))
    start = int((~bare.attention_mask[0]).sum())
    bare = replace(
        bare, tokens=bare.tokens[:, start:], attention_mask=bare.attention_mask[:, start:],
        position_ids=bare.position_ids[:, start:], prompt_length=bare.prompt_length - start,
    )  # fmt: skip
    assert torch.equal(denoise(decoder, bare, cfg, Seed(7)).completion[0], whole.completion[8])
    return whole
