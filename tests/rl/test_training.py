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
from igpo.models import MaskedDecoder, MaskedDecoderConfig
from igpo.policy import load_tokenizer
from igpo.rl.algorithms import ALGORITHMS, LIKELIHOODS, build_algorithm
from igpo.train import set_up, train
from igpo.types import Graded, Prompt, Rollouts

# what an algorithm cannot do without, as on the command line
TOKEN = "importance_sampling_level=token"
OPTIONS = {
    "espo": ("kl_estimator=k2", "kl_level=sequence"),
    "c3po": ("loss_type=budget", TOKEN, "token_budget=64"),
    "tracerl": ("kl_to=old", "shrink=1"),
    "tracerl_value": ("kl_to=old", "shrink=1"),
    "airl_s": ("shrink=2", "num_candidates=2"),
    "diffpo_joint": (TOKEN, "entropy_bound=1.0"),
    "agrpo": ("kl_estimator=k3_ratio",),
    **dict.fromkeys(("grpo", "unigrpo", "coupled_grpo", "diffpo", "dipo"), (TOKEN,)),
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


@pytest.fixture
def block_causal(tiny: Callable[..., Config], tmp_path: Path) -> str:
    """The setting that names a very small model of blocks of 4."""
    tokenizer = load_tokenizer(tiny().model)
    shape = MaskedDecoderConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, block_length=4,
    )  # fmt: skip
    for part in (MaskedDecoder.from_seed(shape, 0), tokenizer):
        part.save_pretrained(tmp_path / "blocks")
    return f"model_name_or_path={tmp_path / 'blocks'}"


def test_dipo_is_refused_before_a_run_begins(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match="policy must be block-causal with block_length=4"):
        set_up(tiny("algorithm=dipo", TOKEN))


@pytest.mark.parametrize("setting", ["use_lora=true", "gradient_checkpointing=true"])
def test_dipo_trains_through_adapters_and_checkpoints(
    tiny: Callable[..., Config], block_causal: str, setting: str
) -> None:
    cfg = tiny("algorithm=dipo", TOKEN, block_causal, setting, "max_steps=1", "save_steps=0")
    assert logged(cfg)[0]["grad_norm"] > 1e-6


@pytest.mark.parametrize("name", ALGORITHMS)
def test_trains(tiny: Callable[..., Config], block_causal: str, name: str) -> None:
    model = (block_causal,) if LIKELIHOODS[ALGORITHMS[name].likelihood].block_causal else ()
    cfg = tiny(
        f"algorithm={name}", "max_steps=2", "save_steps=0", "num_predictions=2", "kept_predictions=1",
        "num_values=1", "beta=0.05", "entropy_filter=1", *model, *OPTIONS.get(name, ()),
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
