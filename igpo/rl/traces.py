"""Reference traces as if they had been rolled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from igpo.config import RolloutConfig
from igpo.rollout import pseudo_order, steps_per_block
from igpo.types import Prompt, Rollouts


def fits(prompt: Prompt, length: int) -> bool:
    """Whether the prompt has a trace, of at most `length` tokens."""
    return 0 < len(prompt.trace_ids) <= length


def written(
    prompts: Sequence[Prompt], rollouts: Rollouts, cfg: RolloutConfig, pad_id: int
) -> Rollouts:
    """The rows with the trace of their prompt as the completion, written left to right.

    The trace is followed by EOS to the end of the canvas (pad_id where the canvas names no EOS). step_map is
    rollout.pseudo_order. Nothing was drawn: commit_logprob and commit_entropy are 0, and there is no support.
    """
    canvas, length = rollouts.canvas, rollouts.step_map.shape[1]
    fill = pad_id if canvas.eos_id is None else canvas.eos_id
    traces = [prompts[g].trace_ids for g in canvas.group_ids.tolist()]
    padded = [[*trace, *[fill] * (length - len(trace))] for trace in traces]
    completion = torch.tensor(padded, device=canvas.tokens.device)
    order = pseudo_order(length, cfg).to(canvas.tokens.device)
    return replace(
        rollouts,
        tokens=torch.cat([canvas.tokens[:, : canvas.prompt_length], completion], 1),
        step_map=order.expand(len(traces), -1),
        commit_logprob=torch.zeros_like(rollouts.commit_logprob),
        commit_entropy=torch.zeros_like(rollouts.commit_entropy),
        num_steps=torch.full_like(rollouts.num_steps, cfg.diffusion_steps),
        support=None if rollouts.support is None else torch.full_like(rollouts.support, -1),
    )


def stopped(rollouts: Rollouts, cfg: RolloutConfig) -> Rollouts:
    """As the sampler's early stop would have left them: what follows the first block of EOS was filled in."""
    eos, length = rollouts.canvas.eos_id, rollouts.step_map.shape[1]
    if not cfg.early_stop or eos is None:
        return rollouts
    blocks = (rollouts.completion == eos).unflatten(1, (-1, cfg.block_length)).all(2)
    last = torch.where(blocks.any(1), blocks.int().argmax(1), length // cfg.block_length - 1)
    num_steps = (last + 1) * steps_per_block(length, cfg)
    return replace(
        rollouts,
        step_map=torch.minimum(rollouts.step_map, num_steps[:, None]),
        num_steps=num_steps,
    )
