"""What prefix and dual cache change: tokens, log-probs, accuracy, and how much is computed.

    python benchmarks/approximate_cache.py [--layers N] [--problems N] [--out FILE.json]

The model is the demo's warm start (2 layers, docs/learning.md), or with --layers one of that width and depth, trained
here in the same way. Exact, prefix and dual rollouts of the same held-out problems share their random numbers.

same tokens: completion tokens equal to those of exact mode.   |dlogp|: of every committed token, between the log-prob
recorded at its commit and that of the exact model on the same canvas, nats; sequence: of the sums.   FLOP: of the
layers (products of weights and of attention, no head), over exact mode's.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from report import machine
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.demo import arm, recipe, warm_start
from igpo.models import MaskedDecoder
from igpo.rollout import denoise
from igpo.types import Prompt, Rollouts, Seed

HELD_OUT = Seed(11)  # chosen: not the demo's
SETTINGS = {
    "greedy, blocks of 4": {"temperature": 0.0},
    "temperature 0.8, blocks of 4": {},
    "temperature 0.8, blocks of 12": {"block_length": 12},
    "greedy, blocks of 12, threshold 0.9": {"temperature": 0.0, "block_length": 12, "threshold": 0.9},
}  # fmt: skip


class Computed:
    """What the layers of a decoder are given: columns and FLOP, on canvases of `length` columns."""

    def __init__(self, model: MaskedDecoder, length: int) -> None:
        weights = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
        width = model.config.num_attention_heads * model.config.head_dim
        # a column: two per weight; its query and its weights against every key and value
        self.per_column = 2 * weights + 4 * width * length * model.config.num_hidden_layers
        self.columns, self.model = 0, model

    def __enter__(self) -> Computed:
        self.handle = self.model.embed_tokens.register_forward_hook(self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def count(self, _: object, args: tuple[Tensor], __: object) -> None:
        self.columns += args[0].numel()

    @property
    def flop(self) -> int:
        return self.columns * self.per_column


@torch.no_grad()
def exact_logprob(model: MaskedDecoder, rollouts: Rollouts, cfg: RolloutConfig) -> Tensor:
    """(B, L) of every committed token under the exact model, on the canvas it was committed on."""
    canvas, found = rollouts.canvas, torch.zeros_like(rollouts.commit_logprob)
    for step in rollouts.step_map.unique().tolist():
        before = rollouts.completion.masked_fill(rollouts.step_map >= step, canvas.mask_id)
        tokens = torch.cat((canvas.tokens[:, : canvas.prompt_length], before), 1)
        logits = model(tokens, canvas.attention_mask, canvas.position_ids).logits
        logits = logits[:, canvas.prompt_length :] / (cfg.temperature or 1.0)
        logits[..., canvas.mask_id] = -torch.inf
        logp = logits.log_softmax(-1).gather(-1, rollouts.completion[..., None])[..., 0]
        found = torch.where(rollouts.step_map == step, logp, found)
    return found


def measure(model: MaskedDecoder, problems: list[Prompt], changes: dict) -> list[dict]:
    lines: list[dict] = []
    exact: Rollouts | None = None
    for kind in ("none", "prefix", "dual"):
        cfg = replace(recipe.ROLLOUT, approximate_cache=kind, **changes)
        canvas = arm.canvases(problems, 1, recipe.arm_config("grpo", 0))
        with Computed(model, canvas.tokens.shape[1]) as computed:
            start = time.process_time()
            rollouts = denoise(model, canvas, cfg, Seed(5))
            seconds = time.process_time() - start
        exact = rollouts if exact is None else exact
        off = (rollouts.commit_logprob - exact_logprob(model, rollouts, cfg)).double()
        equal = rollouts.completion == exact.completion
        lines.append({
            "cache": kind,
            "accuracy": float(arm.grader(recipe.CHAIN)(rollouts, problems).correct.float().mean()),
            "same tokens": float(equal.float().mean()),
            "same sequences": float(equal.all(1).float().mean()),
            "mean |dlogp|": float(off.abs().mean()),
            "99 % |dlogp|": float(off.abs().flatten().quantile(0.99)),
            "max |dlogp|": float(off.abs().max()),
            "rms dlogp, sequence": float(off.sum(1).square().mean().sqrt()),
            "forwards": rollouts.num_forwards,
            "FLOP": computed.flop,
            "CPU s": seconds,
        })  # fmt: skip
    return lines


def trained(layers: int) -> MaskedDecoder:
    """The demo's warm start, of another depth."""
    if layers == 2:
        return warm_start.shipped()
    seed = Seed(recipe.WARM_SEED)
    config = recipe.decoder(seed).config
    config.num_hidden_layers = layers
    model = MaskedDecoder.from_seed(config, seed)
    return warm_start.fit(model, recipe.CHAIN, recipe.warm_start_config())


COLUMNS = {
    "accuracy": ".1%", "same tokens": ".1%", "mean |dlogp|": ".1e", "99 % |dlogp|": ".1e",
    "rms dlogp, sequence": ".1e", "forwards": ",",
}  # fmt: skip


def table(settings: dict[str, list[dict]]) -> str:
    names = [name.replace("|", "\\|") for name in COLUMNS]
    out = ["| | cache | " + " | ".join(names) + " | FLOP |", "|" + "---|" * (len(names) + 3)]
    for name, lines in settings.items():
        for x in lines:
            cells = [name if x is lines[0] else "", x["cache"]]
            cells += [format(x[key], how) for key, how in COLUMNS.items()]
            cells.append(f"{x['FLOP'] / lines[0]['FLOP']:.2f}")
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = trained(options.layers)
    problems = recipe.CHAIN.problems(options.problems, HELD_OUT, "held-out")
    settings = {name: measure(model, problems, changes) for name, changes in SETTINGS.items()}
    if options.out:
        found = {
            "machine": machine(),
            "layers": options.layers,
            "problems": options.problems,
            "settings": settings,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(settings))


if __name__ == "__main__":
    main()
