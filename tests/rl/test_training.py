"""Every algorithm trains a very small decoder through the whole program."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from igpo.config import Config
from igpo.logging import RunLog
from igpo.rl.algorithms import ALGORITHMS, build_algorithm
from igpo.train import set_up, train
from igpo.types import Graded, Prompt, Rollouts

# what an algorithm cannot do without, as on the command line
TOKEN = "importance_sampling_level=token"
OPTIONS = {
    "espo": ("kl_estimator=k2", "kl_level=sequence"),
    "c3po": ("loss_type=budget", TOKEN, "token_budget=64"),
    "tracerl": ("kl_to=old", "shrink=1"),
    "agrpo": ("kl_estimator=k3_ratio",),
    **dict.fromkeys(("grpo", "unigrpo", "coupled_grpo", "diffpo"), (TOKEN,)),
}


def parity(rollouts: Rollouts, prompts: Sequence[Prompt]) -> Graded:
    """The share of even tokens: a reward a model without training already differs in."""
    rewards = (rollouts.completion % 2 == 0).float().mean(1)
    correct, texts = rewards >= 0.75, ("",) * len(rewards)
    return Graded(rollouts, rewards, correct, torch.zeros_like(correct), texts)


def logged(cfg: Config) -> list[dict[str, float]]:
    run = set_up(cfg)
    algorithm = build_algorithm(cfg.rl, cfg.rollout, parity, pad_id=run.tokenizer.pad_token_id)
    with RunLog(cfg, 0) as log:
        train(replace(run, grade=parity, algorithm=algorithm), log)
    lines = (Path(cfg.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_trains(tiny: Callable[..., Config], name: str) -> None:
    cfg = tiny(
        f"algorithm={name}", "max_steps=2", "save_steps=0", "num_predictions=2", "kept_predictions=1",
        "num_values=1", "beta=0.05", "entropy_filter=1", *OPTIONS.get(name, ()),
    )  # fmt: skip
    for line in logged(cfg):
        assert all(math.isfinite(number) for number in line.values())
        assert line["grad_norm"] > 1e-6


@pytest.mark.parametrize("name", ["agrpo", "spg", "mdpo"])
def test_learns(tiny: Callable[..., Config], name: str) -> None:
    """A reward that needs no context: 12 steps raise it, whatever the likelihood."""
    cfg = tiny(
        f"algorithm={name}", "max_steps=12", "save_steps=0", "max_grad_norm=1", "learning_rate=3e-2",
        "prompts_per_step=4", "beta=0", "num_predictions=4", "kept_predictions=2", "shrink=1", "alpha=0.2",
    )  # fmt: skip
    reward = [line["reward"] for line in logged(cfg)]
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.08
