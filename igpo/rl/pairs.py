"""Preference pairs of a dataset, as the graded rollouts they stand for: nothing is sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from igpo.config import RolloutConfig
from igpo.rollout import pseudo_order
from igpo.types import Canvas, Graded, Prompt, Rollouts

from .algorithms import Algorithm
from .explorer import no_exploration
from .objective import Preference


def has_pairs(prompts: Sequence[Prompt]) -> bool:
    return any(prompt.pair is not None for prompt in prompts)


def check_pairs(
    prompts: Sequence[Prompt], algorithm: Algorithm, length: int, eos_id: int | None
) -> None:
    """Raises ValueError unless the algorithm is of pairs, and every prompt has one that fits the canvas."""
    if not isinstance(algorithm.objective, Preference) or algorithm.explorer is not no_exploration:
        raise ValueError(
            "train_file: preference pairs (columns chosen and rejected) are for objective=preference without an "
            "explorer. Set algorithm=vrpo."
        )
    if eos_id is None:
        raise ValueError("train_file: preference pairs need a tokenizer with an eos_token.")
    for prompt in prompts:
        longest = max(map(len, prompt.pair)) if prompt.pair else 0
        if not 0 < longest <= length:
            raise ValueError(
                f"train_file: dataset row {prompt.row_id} must have two completions of at most max_completion_length="
                f"{length} tokens, EOS included, got {f'{longest} tokens' if longest else 'none'}. Raise "
                "max_completion_length or remove the row; completions are never cut."
            )


def graded_pairs(prompts: Sequence[Prompt], canvas: Canvas, rollout: RolloutConfig) -> Graded:
    """Two rows a prompt: the chosen completion with reward 1, then the rejected one with reward 0, EOS to the end.

    canvas: of the prompts, two rows each. Nothing was drawn: commit_logprob and commit_entropy are 0, no forward was
    spent, and step_map is left to right (`pseudo_order`). Source: arXiv:2505.19223 (VRPO), section 3.
    """
    length, device = canvas.frozen.shape[1], canvas.tokens.device
    rows = [
        [*ids, *[canvas.eos_id] * (length - len(ids))]
        for prompt in prompts
        for ids in prompt.pair or ()
    ]
    prompt_tokens = canvas.tokens[:, : canvas.prompt_length]
    nothing = torch.zeros(len(rows), length, device=device)
    steps = torch.full((len(rows),), rollout.diffusion_steps, device=device)
    rollouts = Rollouts(
        canvas, torch.cat([prompt_tokens, torch.tensor(rows, device=device)], 1),
        pseudo_order(length, rollout).to(device).expand(len(rows), -1).contiguous(), nothing, nothing, steps, 0,
    )  # fmt: skip
    chosen = torch.arange(len(rows), device=device) % 2 == 0
    texts = [prompt.columns[name] for prompt in prompts for name in ("chosen", "rejected")]
    return Graded(
        rollouts, chosen.float(), chosen, torch.zeros_like(chosen), tuple(map(str, texts)),
        parts={"preference": chosen.float()},
    )  # fmt: skip
