"""What an update of every algorithm costs: forwards per sequence, and the memory its draws hold.

    python benchmarks/algorithm_cost.py [--out FILE.json] [NAME ...]

Each preset at its own canvas (LONGEST tokens at most), steps, draws and inner updates, on a decoder so small that a CPU
does it in a minute; completions are random and rollouts are not counted. Memory is the peak of torch's CPU allocator
over one inner update (gradients and activations, not weights), with constant_memory on and off. A critic's forwards are
counted apart.
"""

from __future__ import annotations

import argparse
import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from counting import Counting
from learning.recipe import merged
from report import machine
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from igpo.canvas import masked_canvases
from igpo.config import Config
from igpo.models import MaskedDecoder, MaskedDecoderConfig
from igpo.models.critic import CriticModel
from igpo.rl.algorithms import ALGORITHMS, Algorithm, build_algorithm
from igpo.rl.critique import Critique, fit
from igpo.rl.gradient import accumulate
from igpo.rl.presets import PRESETS
from igpo.rollout import pseudo_order, steps_per_block
from igpo.types import Graded, PolicyBatch, Predictions, Prompt, Rollouts, Seed

ROWS, WORDS, SEED = 4, 512, Seed(0).at(1)
LONGEST = 512  # round: longer completions change no count
MASK, EOS, PAD = WORDS - 1, WORDS - 2, WORDS - 3
PROMPT = Prompt("", tuple(range(16)), row_id=0, trace_ids=tuple(range(LONGEST // 4)))


def decoder(block_length: int | None) -> MaskedDecoder:
    config = MaskedDecoderConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        mask_token_id=MASK, eos_token_id=EOS, pad_token_id=PAD, block_length=block_length,
    )  # fmt: skip
    return MaskedDecoder.from_seed(config, Seed(0))


def shortened(cfg: Config) -> Config:
    """At most LONGEST tokens, with as many a step."""
    rollout = cfg.rollout
    if (length := rollout.max_completion_length) <= LONGEST:
        return cfg
    steps = rollout.diffusion_steps * LONGEST // length
    return replace(
        cfg, rollout=replace(rollout, max_completion_length=LONGEST, diffusion_steps=steps)
    )


def random_rollouts(cfg: Config, explorer: str) -> Graded:
    """Completions of random words, committed left to right, with what the explorer of the algorithm would add."""
    length = cfg.rollout.max_completion_length
    canvas = masked_canvases(
        [PROMPT], num_generations=ROWS, completion_length=length,
        mask_id=MASK, pad_id=PAD, eos_id=EOS,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(0, PAD, (ROWS, length), generator=rng)
    order = pseudo_order(length, cfg.rollout).expand(ROWS, length)
    zeros, steps = torch.zeros(ROWS, length), torch.full((ROWS,), cfg.rollout.diffusion_steps)
    tokens = torch.cat([canvas.tokens[:, :16], words], 1)
    rollouts = Rollouts(canvas, tokens, order, zeros, zeros + 1, steps, 0)
    if cfg.rollout.record_support:
        others = torch.arange(1, cfg.rollout.top_k).expand(ROWS, length, -1)
        support = torch.cat([words[..., None], (words[..., None] + others) % WORDS], -1)
        rollouts = replace(rollouts, support=support.int())
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5])
    credit = None
    counts = {
        "predictions": cfg.rl.method.num_predictions,
        "step_rewards": cfg.rl.method.kept_predictions,
        "candidates": length // cfg.rollout.block_length,
    }
    if explorer in counts:
        first = torch.arange(counts[explorer]) * steps_per_block(length, cfg.rollout)
        first = (first % cfg.rollout.diffusion_steps).expand(ROWS, -1)
        made = words[:, None].expand(ROWS, counts[explorer], length)
        rollouts = replace(rollouts, predictions=Predictions(first, made, made * 0.0))
        credit = rewards[:, None].expand(first.shape) - 0.4
    elif explorer == "vine":
        credit = rewards[:, None].expand(ROWS, length) - 0.4
    none = torch.zeros(ROWS, dtype=torch.bool)
    return Graded(rollouts, rewards, rewards > 0.9, none, ("",) * ROWS, credit=credit)


def peak_mib(work) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return float(held.cumsum(0).max()) / 2**20


def measure(name: str) -> dict[str, object]:
    cfg = shortened(merged(Config(), PRESETS[name]))
    algorithm = build_algorithm(cfg.rl, cfg.rollout, lambda rollouts, prompts: None, pad_id=PAD)  # type: ignore[arg-type, return-value]
    graded = random_rollouts(cfg, ALGORITHMS[cfg.rl.algorithm].explorer)
    policy, frozen = (Counting(decoder(algorithm.likelihood.block_length)) for _ in range(2))

    @contextmanager
    def reference():
        yield frozen

    advantages = algorithm.advantage(graded)
    batch = algorithm.likelihood.prepare(policy, graded, SEED, reference)
    updates = cfg.rl.num_iterations
    costs = {"old": policy.plain / ROWS / updates, "reference": frozen.plain / ROWS / updates}
    policy.plain = policy.with_graph = 0
    critic = with_critic(algorithm.critique, policy, graded, batch) if algorithm.critique else {}
    for inner in range(updates):
        update(algorithm, policy, batch, graded, advantages, inner)
    costs |= {
        "first pass": policy.plain / ROWS / updates,
        "train": policy.with_graph / ROWS / updates,
    }
    policy.model.zero_grad(set_to_none=False)
    peaks = {}
    for constant in (True, False):
        changed = replace(algorithm, constant_memory=constant)
        work = partial(update, changed, policy, batch, graded, advantages, updates - 1)
        work()
        peaks["draw by draw" if constant else "one graph"] = round(peak_mib(work), 2)
    draws = len(batch.draws[0])
    return {
        "name": name,
        "draws": draws,
        "inner updates": updates,
        **costs,
        **critic,
        "peak MiB": peaks,
    }


def with_critic(
    critique: Critique, policy: Counting, graded: Graded, batch: PolicyBatch
) -> dict[str, float]:
    """Forwards of the critic for each rolled-out sequence, and of the policy on traces, which it is not to count."""
    network = CriticModel(decoder(None))
    counts = {False: 0, True: 0}

    def counting(tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None):
        counts[torch.is_grad_enabled()] += len(tokens)
        return network(tokens, attention_mask, position_ids)

    _, lessons, _ = critique.judge(counting, policy, [PROMPT], graded, batch, graded.rewards, SEED)
    traces, policy.plain = policy.plain, 0
    for lesson in lessons:
        for _ in fit(counting, critique, lesson, torch.arange(len(lesson.tokens)), ROWS):
            pass
    return {
        "critic": counts[False] / ROWS, "critic, train": counts[True] / ROWS, "old, of traces": traces / ROWS
    }  # fmt: skip


def update(
    algorithm: Algorithm, policy: Counting, batch: PolicyBatch, graded: Graded, advantages: Tensor, inner: int
) -> None:  # fmt: skip
    weights = algorithm.reweigh(graded, batch, advantages, inner)
    rows = torch.arange(ROWS)
    for _ in accumulate(algorithm, policy, batch, weights, inner, rows, ROWS):
        pass


def table(lines: list[dict]) -> str:
    out = [
        "| preset | draws | mu | old | ref | first pass | train | peak MiB, draw by draw | one graph |"
    ]
    out.append("|---|---|---|---|---|---|---|---|---|")
    for x in lines:
        counts = " | ".join(f"{x[key]:g}" for key in ("old", "reference", "first pass", "train"))
        peaks = " | ".join(f"{x['peak MiB'][key]:.1f}" for key in ("draw by draw", "one graph"))
        out.append(f"| `{x['name']}` | {x['draws']} | {x['inner updates']} | {counts} | {peaks} |")
    for x in lines:
        if "critic" in x:
            names = ("critic", "critic, train", "old, of traces")
            counts = ", ".join(f"{key}: {x[key]:g}" for key in names)
            out.append(f"{x['name']}, forwards per sequence: {counts}")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [measure(name) for name in options.names or PRESETS]
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "rows": lines}, indent=1) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
