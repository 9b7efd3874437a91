"""Decoders of random weights, made where they run, and canvases of random words: what the programs are timed on."""

from __future__ import annotations

import torch
from shapes import DEVICE, LLADA_8B, Geometry

from igpo.canvas import masked_canvases, with_hints
from igpo.models import MaskedDecoder, MaskedDecoderConfig
from igpo.types import Canvas, Prompt


def decoder(shape: Geometry, device: str = DEVICE) -> MaskedDecoder:
    """In eval mode. The last three ids are mask, EOS and padding. Weights are N(0, 0.02^2), but the head's, whose
    logits have a standard deviation of 2: a trained model's are as far apart."""
    if device == "cpu" and shape == LLADA_8B:
        raise ValueError("decoder: LLaDA-8B's geometry must be on a GPU, got cpu. Use SIXTEENTH.")  # fmt: skip
    mask = shape.vocabulary - 1
    config = MaskedDecoderConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        mask_token_id=mask, eos_token_id=mask - 1, pad_token_id=mask - 2,
    )  # fmt: skip
    with torch.device("meta"):
        model = MaskedDecoder(config).to(shape.dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            std = 2 / shape.width**0.5 if name.startswith("lm_head") else 0.02
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, std, generator=generator)
    return model.requires_grad_(False).eval()


def words(rows: int, columns: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary - 3, (rows, columns), generator=generator)


def canvases(
    shape: Geometry,
    rows: int,
    prompt: int,
    completion: int,
    *,
    given: int = 0,
    device: str = DEVICE,
) -> Canvas:
    """`rows` prompts of as many tokens, and masked completions whose first `given` tokens stand already."""
    mask = shape.vocabulary - 1
    prompts = [
        Prompt("", tuple(ids.tolist()), row_id=i)
        for i, ids in enumerate(words(rows, prompt, shape.vocabulary))
    ]
    canvas = masked_canvases(
        prompts, num_generations=1, completion_length=completion, mask_id=mask, eos_id=mask - 1, pad_id=mask - 2,
        device=device,
    )  # fmt: skip
    if not given:
        return canvas
    hints = torch.full((rows, completion), mask)
    hints[:, :given] = words(rows, given, shape.vocabulary)
    hints = hints.to(device)
    return with_hints(canvas, hints, hints != mask)
