"""What a training step computes: passes of the model and their FLOP, from the configuration and the model's shape.

Counts are exact for full canvases and prompts of max_prompt_length tokens; rows that end early, shorter prompts and
rows without an advantage take less. FLOP are those of matrix products, two per multiplication; the backward pass of
attention is twice its forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .canvas import masked_canvases
from .config import Config
from .models import MaskedDecoder, MaskedDecoderConfig
from .rl.algorithms import ALGORITHMS, build_algorithm
from .rl.likelihood import InnerUpdate
from .rl.parts import PREDICTING
from .rollout import pseudo_order, steps_per_block
from .rollout.schedule import SCHEDULES
from .types import Draw, Predictions, Prompt, Rollouts, Seed

# explorers whose further rollouts depend on what the first ones committed: not planned
UNPLANNED = ("vine", "candidates")
RESCUING = ("inpainting", "resampling")
ROWS = 8  # of the made-up rollouts, over which random draws are averaged


@dataclass(frozen=True)
class Passes:
    """`count` sequences, each of `tokens` through the layers beside `context` keys and `read` positions through the
    head. trained: with a backward pass."""

    count: float
    tokens: float
    context: float
    read: float
    trained: bool = False

    def times(self, factor: float) -> Passes:
        return Passes(self.count * factor, self.tokens, self.context, self.read, self.trained)


@dataclass(frozen=True)
class Layers:
    """FLOP of one token through a model: twice the weights it meets.   adapters: of LoRA.   attention: per key."""

    trunk: int
    adapters: int
    attention: int
    head: int
    trains_trunk: bool
    trains_head: bool
    recomputes: bool

    def flops(self, passes: Passes) -> float:
        trunk = passes.tokens * (self.trunk + self.adapters + self.attention * passes.context)
        head = passes.read * self.head
        if not passes.trained:
            return passes.count * (trunk + head)
        back = passes.tokens * (
            (1 + self.trains_trunk) * self.trunk + 2 * self.adapters + 2 * self.attention * passes.context
        )  # fmt: skip
        # the head's logits are computed again in its backward pass
        return passes.count * ((1 + self.recomputes) * trunk + back + (3 + self.trains_head) * head)


def layers_of(shape: MaskedDecoderConfig, cfg: Config) -> Layers:
    """Counted on the module itself, without memory for it."""
    with torch.device("meta"):
        model = MaskedDecoder(shape)
    share = shape.num_experts_per_tok / shape.num_experts if shape.num_experts else 1
    trunk = sum(
        2 * p.numel() * (share if p.dim() == 3 else 1) for p in model.layers.parameters() if p.dim() > 1
    )  # fmt: skip
    lora = cfg.lora.use_lora
    return Layers(
        trunk=int(trunk),
        adapters=2 * sum(p.numel() for p in adapters(model, cfg)) if lora else 0,
        attention=4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim,
        head=2 * shape.vocab_size * shape.hidden_size,
        trains_trunk=not lora,
        trains_head=not (lora or cfg.model.freeze_head),
        recomputes=cfg.train.gradient_checkpointing,
    )


def adapters(model: MaskedDecoder, cfg: Config) -> list[torch.Tensor]:
    """The matrices that LoRA would add, on the meta device."""
    names, head, r = cfg.lora.lora_target_modules, model.get_output_embeddings(), cfg.lora.lora_r
    return [
        torch.empty(size, device="meta")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
        if not names or name.rpartition(".")[2] in names or name in names
        for size in ((r, module.in_features), (module.out_features, r))
    ]


def of_training(cfg: Config, shape: MaskedDecoderConfig) -> dict[str, list[Passes]]:
    """What a step of `igpo train` computes, by part. The rescue is that of every group."""
    sequences = cfg.train.prompts_per_step * cfg.rl.num_generations
    explorer = ALGORITHMS[cfg.rl.algorithm].explorer
    rollout = [p.times(sequences) for p in of_rollout(cfg, shape)]
    parts = {"rollout": rollout, "rescue": rollout if explorer in RESCUING else []}
    if explorer in PREDICTING and explorer not in UNPLANNED:
        count, length = cfg.rl.method.num_predictions, canvas_length(cfg)
        half = cfg.rollout.max_completion_length / 2  # masked on average over the steps
        parts["predictions"] = [Passes(sequences * count, length, length, half)]
    found = of_updates(cfg)
    for name, passes in found.items():
        parts[name] = [p.times(sequences) for p in passes]
    return parts


def of_sft(cfg: Config, shape: MaskedDecoderConfig) -> dict[str, list[Passes]]:
    """Of `igpo sft`: t ~ U(0, 1) masks half of the completion on average."""
    length, half = canvas_length(cfg), cfg.rollout.max_completion_length / 2
    copies = 2 if shape.block_length and cfg.sft.beside_clean else 1  # noisy and clean
    return {"update": [Passes(cfg.sft.sft_batch_size, copies * length, length, half, trained=True)]}


def canvas_length(cfg: Config) -> int:
    return cfg.data.max_prompt_length + cfg.rollout.max_completion_length


def of_rollout(cfg: Config, shape: MaskedDecoderConfig) -> list[Passes]:
    """Of one sequence that does not stop early and commits no more than its schedule says."""
    r, length = cfg.rollout, canvas_length(cfg)
    blocks = r.max_completion_length // r.block_length
    counts = SCHEDULES[r.unmask_schedule](r.block_length, r.diffusion_steps // blocks)
    left = [r.block_length - sum(counts[:step]) for step in range(len(counts))]
    steps = sum(n > 0 for n in counts)  # a step without a commit calls no model
    read = sum(n for n, c in zip(left, counts, strict=True) if c) / steps
    if shape.block_length is None or not r.use_cache:
        twice = 2 if r.cfg_scale else 1
        return [Passes(steps * blocks * twice, length, length, read)]
    prompt, width = cfg.data.max_prompt_length, r.block_length
    behind = prompt + (r.max_completion_length + width) / 2
    stored = Passes(blocks - 1, width, behind, 0)
    return [Passes(1, prompt, prompt, 0), stored, Passes(steps * blocks, width, behind, read)]


def of_updates(cfg: Config) -> dict[str, list[Passes]]:
    """Old and reference log-probs, and the inner updates, of one sequence."""
    algorithm = build_algorithm(cfg.rl, cfg.rollout, _never, pad_id=0)
    likelihood, needs = algorithm.likelihood, algorithm.objective.needs
    updates = likelihood.draw(example(cfg), Seed(0).named("draws"))
    length = canvas_length(cfg)
    asked = _distinct(updates[: 1 if likelihood.once else None])
    evaluated = [_passes(draw, length) for draw in asked]
    with_old = likelihood.needs_old and (likelihood.num_iterations > 1 or likelihood.always_old)
    trained = [_passes(d, length, trained=True) for update in updates for d in update.draws]
    apart = len(updates[0].draws) > 1 and algorithm.constant_memory
    first: list[Passes] = []
    if needs.groups or (apart and not needs.separable):
        first = [
            _passes(d, length) for update in updates[1 if with_old else 0 :] for d in update.draws
        ]
    parts = {
        "old policy": evaluated if with_old else [],
        "reference": evaluated if likelihood.needs_reference else [],
        "first passes of the updates": first,
        "updates": trained,
    }
    return {name: passes for name, passes in parts.items() if passes}


def _never(rollouts: Any, prompts: Any) -> Any:
    raise AssertionError("nothing is graded in a plan")


def _distinct(updates: Sequence[InnerUpdate]) -> list[Draw]:
    return list({id(draw): draw for update in updates for draw in update.draws}.values())


def _passes(draw: Draw, length: int, trained: bool = False) -> Passes:
    """Rows in which a draw reads nothing are not forwarded; beside a clean copy a pass has twice the tokens."""
    count = float(draw.score.any(1).float().mean())
    read = float(draw.score.sum()) / len(draw.score) / max(count, 1e-9)
    tokens = length * (1 + draw.beside_clean)
    return Passes(count, tokens, length, read, trained)


def example(cfg: Config, rows: int = ROWS) -> Rollouts:
    """Rollouts of made-up tokens, committed left to right, with the predictions that the algorithm's explorer adds."""
    length, steps = cfg.rollout.max_completion_length, cfg.rollout.diffusion_steps
    canvas = masked_canvases(
        [Prompt("", (1,), row_id=0)], num_generations=rows, completion_length=length, mask_id=3, pad_id=0,
        eos_id=2,
    )  # fmt: skip
    tokens = canvas.tokens.masked_fill(canvas.tokens == 3, 1)
    order = pseudo_order(length, cfg.rollout).expand(rows, length)
    zeros = torch.zeros(rows, length)
    made = Rollouts(canvas, tokens, order, zeros, zeros + 1, torch.full((rows,), steps), 0)
    counts: Mapping[str, int] = {
        "predictions": cfg.rl.method.num_predictions,
        "step_rewards": cfg.rl.method.kept_predictions,
        "candidates": length // cfg.rollout.block_length,
    }
    explorer = ALGORITHMS[cfg.rl.algorithm].explorer
    if explorer not in counts:
        return made
    first = torch.arange(counts[explorer]) * steps_per_block(length, cfg.rollout) % steps
    words = made.completion[:, None].expand(-1, counts[explorer], -1)
    predictions = Predictions(first.expand(rows, -1), words, words * 0.0)
    return Rollouts(canvas, tokens, order, zeros, zeros + 1, made.num_steps, 0, predictions)
