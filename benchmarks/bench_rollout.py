"""rollout: denoising steps of LLaDA's sampler on a decoder of random weights, ours, the research form and caches."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import research
import torch
from decoders import canvases, decoder
from programs import Program, Provider, held_mib, measure
from shapes import DEVICE, TOY, Generation
from timing import Run
from torch import Tensor

from igpo.config import Config, RolloutConfig
from igpo.ops import unmask_step
from igpo.ops._head import head_logits
from igpo.rollout import denoise
from igpo.types import Canvas, Seed, take
from igpo.work_plan import Passes, layers_of

SEED, TEMPERATURE = Seed(0).at(1), 1.2
# around the middle, where as much follows a block on average as over the whole completion; on a CPU the one before it
CACHED_BLOCKS = 2 if DEVICE == "cuda" else 1


class Enough(Exception):
    """The steps that are timed are done."""


def ours(policy, canvas: Canvas, at: Generation, temperature: float, most: int) -> Tensor:
    """(B, T) tokens after `most` steps from block at.first on."""
    cfg = RolloutConfig(
        max_completion_length=at.completion, block_length=at.block, diffusion_steps=at.steps, temperature=temperature,
        rollout_batch_size=len(canvas.tokens),
    )  # fmt: skip
    last, found = at.first * at.steps_per_block + most - 1, []

    def stop(step: int, tokens: Tensor) -> None:
        if step == last:
            found.append(tokens)
            raise Enough

    with suppress(Enough):
        denoise(policy, canvas, cfg, SEED, on_step=stop)
    return found[0]


def options(at: Generation, temperature: float, most: int) -> dict:
    return {
        "block": at.block, "steps": at.steps, "temperature": temperature, "first": at.first, "most": most,
    }  # fmt: skip


def masked_at(at: Generation, steps: int) -> list[int]:
    """Positions of the block that are masked at each of its first steps."""
    each = at.block // at.steps_per_block
    return [at.block - each * step for step in range(steps)]


def stages(policy, canvas: Canvas, at: Generation, steps: int) -> dict[str, Provider]:
    """The calls no exact form of the sampler avoids, bare."""
    rows, counts = at.batch, masked_at(at, steps)

    @torch.no_grad()
    def forward() -> Tensor:
        return policy.hidden(canvas.tokens, canvas.attention_mask, canvas.position_ids)

    states = forward()[:, : at.block].contiguous()
    mask_id = canvas.mask_id

    @torch.no_grad()
    def head() -> None:
        for count in counts:
            head_logits(states[:, :count], policy.head_weight)

    def prepared() -> Tensor:
        with torch.no_grad():
            return head_logits(states, policy.head_weight)

    def unmask(logits: Tensor) -> None:
        for step, count in enumerate(counts):
            tokens = torch.full((rows, count), mask_id, device=DEVICE)
            unmask_step(
                logits[:, :count], tokens, mask_id=mask_id, num_unmask=at.block // at.steps_per_block,
                temperature=TEMPERATURE, seed=1, step=step, row_ids=canvas.row_ids,
            )  # fmt: skip

    return {
        "stage-forward": Provider(Run(forward), rows, "one forward", gated=False),
        "stage-head": Provider(Run(head), rows * steps, gated=False),
        "stage-unmask": Provider(Run(unmask, prepared), rows * steps, gated=False),
    }


def providers(policy, canvas: Canvas, at: Generation, steps: int) -> dict[str, Provider]:
    rows = min(at.batch, at.group)
    few = take(canvas, torch.arange(rows, device=DEVICE))
    caches = at.steps_per_block * CACHED_BLOCKS
    whole = len(canvas.tokens) if DEVICE == "cuda" else rows
    some = take(canvas, torch.arange(whole, device=DEVICE))

    def said(sequences: int, count: int) -> str:
        return f"{sequences} of {at.batch} sequences, {count} of {at.steps} steps"

    def plain() -> Tensor:
        return research.denoise(policy, few, group=at.group, **options(at, TEMPERATURE, steps))

    def cached(dual: bool) -> Provider:
        def run() -> Tensor:
            return research.cached(policy, some, dual=dual, **options(at, TEMPERATURE, caches))

        return Provider(Run(run), whole * caches, said(whole, caches))

    return {
        "igpo": Provider(
            Run(lambda: ours(policy, canvas, at, TEMPERATURE, steps)), at.batch * steps, said(at.batch, steps)
        ),
        "research": Provider(Run(plain), rows * steps, said(rows, steps)),
        "prefix-cache": cached(False),
        "dual-cache": cached(True),
        **stages(policy, canvas, at, steps),
    }  # fmt: skip


def agree(at: Generation) -> None:
    """At temperature 0 every form commits the same tokens, those with caches at the first step of a block."""
    model = decoder(at.model)
    canvas = canvases(at.model, at.batch, at.prompt, at.completion, given=at.first * at.block)
    for most in (1, at.steps_per_block + 1):
        truth = ours(model, canvas, at, 0.0, most)
        shown = options(at, 0.0, most)
        assert torch.equal(truth, research.denoise(model, canvas, group=at.group, **shown))
        for dual in (False, True) if most == 1 else ():
            assert torch.equal(truth, research.cached(model, canvas, dual=dual, **shown))


def bench_rollout(benchmark, request, generation: Generation) -> None:
    at = generation
    agree(replace(at, model=TOY, batch=3, group=2))
    policy = decoder(at.model)
    canvas = canvases(at.model, at.batch, at.prompt, at.completion, given=at.first * at.block)
    steps = 2 if DEVICE == "cpu" else at.steps_per_block
    each = at.block // at.steps_per_block
    given = int((canvas.tokens != canvas.mask_id).sum(1)[0])

    def gate(tokens: object) -> None:
        """As many tokens as the steps commit, and what was there before is still there."""
        assert isinstance(tokens, Tensor)
        before = canvas.tokens[: len(tokens)]
        assert torch.equal(tokens[:, :given], before[:, :given])
        committed = (tokens != canvas.mask_id).sum(1) - given
        assert committed.eq(committed[0]).all()
        assert int(committed[0]) in (
            each * steps, each * at.steps_per_block * CACHED_BLOCKS,
        )  # fmt: skip

    masked = sum(masked_at(at, at.steps_per_block)) / at.steps_per_block
    layers = layers_of(policy.config, Config())
    measure(
        benchmark,
        Program(
            op="rollout",
            axes={
                "problem": str(at), "variant": f"T={TEMPERATURE:g} block={at.block} steps={at.steps}",
                "rows": at.batch, "vocabulary": at.model.vocabulary,
            },
            providers=providers(policy, canvas, at, steps),
            gate=gate,
            unit="sequence and step",
            tokens=each,
            flops=int(layers.flops(Passes(1, at.length, at.length, masked))),
            counted="every token through the layers, the masked positions of the block through the head",
            dtype=at.model.dtype,
            held_mib=held_mib(policy),
        ),
    )  # fmt: skip
