"""Every number of the demo: task, model, warm start, arms. docs/learning.md says how they were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from igpo.config import (
    AlgorithmConfig,
    Config,
    DrawsConfig,
    EvalConfig,
    InpaintConfig,
    RolloutConfig,
    SFTConfig,
    TrainConfig,
)
from igpo.models import MaskedDecoder, MaskedDecoderConfig
from igpo.types import Seed

from .chain import Chain

CHAIN = Chain(modulus=97, num_steps=10, digits=(2, 3, 4, 5))
WARM_SEED = 0  # of the shipped weights
NUM_STEPS = 24  # RL steps of an arm
EVAL_STEPS = 6
NUM_EVAL = 512  # held-out problems behind every accuracy

# arm -> what it changes of the recipe; the study of docs/learning.md has one more
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo"},
    "grpo_resample": {"algorithm": "grpo_resample"},
    "igpo": {"algorithm": "igpo"},
    "trace_in_group": {"algorithm": "trace_in_group"},
}
STUDY_ARMS: dict[str, dict[str, Any]] = {**ARMS, "trace_as_hints": {"algorithm": "trace_as_hints"}}

ROLLOUT = RolloutConfig(
    max_completion_length=CHAIN.completion_length,
    block_length=4,
    diffusion_steps=CHAIN.completion_length,  # one token a step
    temperature=0.8,
    remasking="low_confidence",
    early_stop=False,
    rollout_batch_size=256,
)


def decoder(
    seed: Seed, words: Sequence[str] = CHAIN.words, block_length: int | None = None
) -> MaskedDecoder:
    """The model before any training: 121 k parameters with the words of the chain."""
    config = MaskedDecoderConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.125, mask_token_id=words.index("<mask>"),
        eos_token_id=words.index("</s>"), pad_token_id=words.index("<pad>"),
        block_length=block_length,
    )  # fmt: skip
    return MaskedDecoder.from_seed(config, seed)


def warm_start_config() -> Config:
    """Masked SFT on chains of full length, never the same twice: plain cross-entropy of the masked tokens."""
    return Config(
        rollout=ROLLOUT,
        sft=SFTConfig(sft_weighting="none", sft_batch_size=64),
        train=TrainConfig(
            max_steps=1030, per_device_train_batch_size=64, learning_rate=4e-3, warmup_steps=100,
            adam_beta2=0.98, weight_decay=0.01, max_grad_norm=1.0, seed=WARM_SEED, save_steps=0, report_to=(),
        ),
    )  # fmt: skip


def arm_config(arm: str, seed: int, num_steps: int = NUM_STEPS) -> Config:
    """The published IGPO scaled down: lambda, eta, tau and G are the paper's; chunks are single states."""
    rl = AlgorithmConfig(
        num_generations=8, num_iterations=1, scale_rewards="none", likelihood="step_map",
        draws=DrawsConfig(num_slices=CHAIN.completion_length), hint_mode="replay",
        importance_sampling_level="token", beta=0.0, loss_type="bnpo", constant_memory=False,
        inpaint=InpaintConfig(eta_low=0.2, eta_high=0.6, chunk_min=1, chunk_max=1, entropy_filter=0.2),
    )  # fmt: skip
    return Config(
        rollout=ROLLOUT,
        rl=replace(rl, **STUDY_ARMS[arm]),
        train=TrainConfig(
            max_steps=num_steps, prompts_per_step=16, per_device_train_batch_size=128, learning_rate=6e-4,
            warmup_steps=5, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0, seed=seed, save_steps=0,
            eval_steps=EVAL_STEPS, report_to=(),
        ),
        evaluation=EvalConfig(eval_batch_size=NUM_EVAL),
    )  # fmt: skip
