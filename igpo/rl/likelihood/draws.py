"""Draw functions of one canvas: the full mask, and a random part of it. What every draw function shares.

A draw function makes the choices of a likelihood, once per rollout batch and for all inner updates: which positions are
masked, which are read, with which weight. A new estimator is a new draw function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from igpo.ops import forward_mask
from igpo.types import Draw, Rollouts, Seed


@dataclass(frozen=True)
class InnerUpdate:
    """The draws of one inner update.

    counted: (B, L) bool, the completion tokens they score as the policy's own.   weight: (B, J, 1) or (B, J, L), what
    each draw's terms of the loss are multiplied by; None for ones.
    """

    draws: tuple[Draw, ...]
    counted: Tensor
    weight: Tensor | None = None


# (rollouts, seed) -> one InnerUpdate per inner update; the same draw where nothing differs, then it is evaluated once
DrawFunction = Callable[[Rollouts, Seed], Sequence[InnerUpdate]]


def mean_field(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    p_mask_prompt: float = 0.0,
    hint_mode: str = "score",
) -> list[InnerUpdate]:
    """log p(o^k | prompt, [MASK]^L): every token from one forward of the fully masked completion.

    p_mask_prompt: each prompt token is masked with this probability, anew for every inner update.

    Source: arXiv:2504.12216, section 4.1 (diffu-GRPO, p = 0.15); arXiv:2509.10396 (IGPO, p = 0).
    """
    scored = scorable(rollouts, hint_mode)
    hidden = on_canvas(rollouts, scored)
    if p_mask_prompt == 0:
        return [InnerUpdate((Draw(hidden, scored),), scored)] * num_iterations
    updates = []
    for inner in range(num_iterations):
        noise = prompt_mask(rollouts, p_mask_prompt, seed.named(f"prompt/{inner}"))
        updates.append(InnerUpdate((Draw(hidden | noise, scored),), scored))
    return updates


def prompt_mask(rollouts: Rollouts, probability: float, seed: Seed) -> Tensor:
    """(B, T) bool: every prompt token (no padding) with this probability; what is left of it does not matter."""
    canvas, length = rollouts.canvas, rollouts.canvas.prompt_length
    # a draw is keyed by its column: counted from the end of the prompt, where padding does not shift it
    prompt, real = (x[:, :length].flip(1) for x in (rollouts.tokens, canvas.attention_mask))
    ratio = torch.full((len(prompt),), probability, device=prompt.device)
    _, masked = forward_mask(
        prompt, real, ratio, mask_id=canvas.mask_id, seed=seed.value, step=seed.step,
        row_ids=canvas.row_ids,
    )  # fmt: skip
    return torch.cat([masked.flip(1), torch.zeros_like(canvas.frozen)], 1)


def random_mask(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    num_levels: int,
    first_level: tuple[int, int],
    exact: bool = True,
    score_visible: bool = False,
    hint_mode: str = "score",
) -> list[InnerUpdate]:
    """log p(o^k | prompt, canvas with a random part masked), of the masked tokens; more is masked in each inner update.

    Per row t_1 ~ U{first_level}, then mask_schedule up to num_levels; t_n / num_levels of the completion is masked.

    exact: that share, rounded to tokens (UniGRPO); False: every token with that probability (released IGPO code).
    score_visible: also reads the tokens that are not masked, which then enter a mean over the whole canvas but not
    `counted` (released IGPO code).

    Source: arXiv:2505.15809, section 4.3 (UniGRPO).
    """
    canvas, completion = rollouts.canvas, rollouts.completion
    stream = seed.named("first_level")
    first = [
        int(stream.generator(row).integers(*first_level, endpoint=True))
        for row in canvas.row_ids.tolist()
    ]
    levels = [mask_schedule(level, num_iterations, num_levels) for level in first]
    scored = scorable(rollouts, hint_mode)
    updates = []
    for inner in range(num_iterations):
        ratio = torch.tensor([row[inner] / num_levels for row in levels], device=completion.device)
        _, masked = forward_mask(
            completion, scored, ratio, mask_id=canvas.mask_id, seed=seed.named(f"mask/{inner}").value,
            step=seed.step, row_ids=canvas.row_ids, exact=exact,
        )  # fmt: skip
        read = scored if score_visible else masked
        updates.append(InnerUpdate((Draw(on_canvas(rollouts, masked), read),), masked))
    return updates


def coupled(
    rollouts: Rollouts, seed: Seed, *, num_iterations: int, hint_mode: str = "score"
) -> list[InnerUpdate]:
    """(log p(o^k | full mask) + log p(o^k | z) / share)/2, where z masks a random part S or its complement.

    t ~ U(0.2, 0.8) per row; a token of S is read with 1/t from the canvas that masks S, any other with 1/(1-t) from the
    canvas that masks the rest, so each is read twice. The expected weight is 1.5, not 1: good in a ratio, not as a
    log-likelihood. The full mask is one draw for all inner updates.

    Source: the released code of arXiv:2506.20639 (DiffuCoder), coupled-GRPO.
    """
    canvas, scored = rollouts.canvas, scorable(rollouts, hint_mode)
    full = Draw(
        on_canvas(rollouts, scored), scored, torch.full(scored.shape, 0.5, device=scored.device)
    )
    updates = []
    for inner in range(num_iterations):
        stream = seed.named(f"coupled/{inner}")
        ratio = torch.tensor(
            [stream.generator(row).uniform(0.2, 0.8) for row in canvas.row_ids.tolist()],
            device=scored.device,
        )
        _, masked = forward_mask(
            rollouts.completion, scored, ratio, mask_id=canvas.mask_id, seed=stream.value,
            step=seed.step, row_ids=canvas.row_ids,
        )  # fmt: skip
        halves = [
            Draw(on_canvas(rollouts, part), part, (0.5 / share).float()[:, None].expand_as(part))
            for part, share in ((masked, ratio), (scored & ~masked, 1 - ratio))
        ]
        updates.append(InnerUpdate((full, *halves), scored))
    return updates


def mask_schedule(first: int, num_iterations: int, num_levels: int) -> tuple[int, ...]:
    """t_n = floor((n-1)/(mu-1) (T - t_1) + t_1), n = 1..mu: from t_1 to T. Source: arXiv:2505.15809, section 4.3.

    >>> mask_schedule(300, 4, 1000)
    (300, 533, 766, 1000)
    """
    gaps = max(1, num_iterations - 1)
    return tuple(first + n * (num_levels - first) // gaps for n in range(num_iterations))


def scorable(rollouts: Rollouts, hint_mode: str) -> Tensor:
    """(B, L) bool: the completion positions that may be masked and scored."""
    frozen = rollouts.canvas.frozen
    return ~frozen if hint_mode == "condition" else torch.ones_like(frozen)


def on_canvas(rollouts: Rollouts, completion: Tensor) -> Tensor:
    """(B, L) bool of the completion -> (B, T) bool of the canvas: False on the prompt."""
    prompt = completion.new_zeros(len(completion), rollouts.canvas.prompt_length)
    return torch.cat([prompt, completion], 1)
