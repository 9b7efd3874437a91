"""Algorithms whose likelihood is of whole sequences.

[espo] arXiv:2512.03759, released code of 2026-01-25.   [bgpo] arXiv:2510.11683, appendix.   [wd1] arXiv:2507.08838,
released code of 2025-07-08.   [dmpo] arXiv:2510.08233, released code of 2026-05-01.   [spg] arXiv:2510.09541, released
code of 2025-10-17.   [tbrm] arXiv:2505.15311.   [vrpo] arXiv:2505.19223 (LLaDA 1.5).   [linvit] arXiv:2402.16181.
[d1] as in igpo.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Mapping[str, Any]]

_LORA = {
    "use_lora": True,  # [espo], [wd1], [dmpo], [spg]
    "lora_r": 128,  # [espo], [wd1] (d1's), [dmpo], [spg]
    "lora_alpha": 64,  # [espo], [wd1] (d1's), [dmpo], [spg]
}

PRESETS: dict[str, Preset] = {
    "espo": {
        "rl": {
            "algorithm": "espo",
            "num_generations": 6,  # [espo] GSM8K, Countdown, Sudoku; 16 for MATH
            "num_iterations": 8,  # [espo]
            "scale_rewards": "loo",  # [espo] code; the paper subtracts the mean
            "importance_sampling_level": "sequence",  # [espo] exp of the ELBO's change by L
            "epsilon": 0.2,  # [espo]
            "beta": 1e-3,  # [espo] GSM8K, MATH; 3e-3 Countdown, 1e-2 Sudoku and code
            "kl_estimator": "k2",  # [espo]
            "kl_level": "sequence",  # [espo] code: by L
            "loss_type": "grpo",  # [espo] mean over sequences
            "draws": {"num_draws": 2},  # [espo] M, each a complementary pair
        },
        "rollout": {
            "max_completion_length": 256,  # [espo]
            "block_length": 32,  # [espo]
            "diffusion_steps": 256,  # [espo] GSM8K, MATH, code; 128 for planning
            "temperature": 1.0,  # [espo]
        },
        "train": {
            "prompts_per_step": 16,  # [espo]
            "learning_rate": 3e-6,  # [espo]
            "max_grad_norm": 0.2,  # [espo]
        },
        "lora": _LORA,
    },
    "bgpo": {
        "rl": {
            "algorithm": "bgpo",
            "num_generations": 8,  # [bgpo]
            "num_iterations": 1,  # [bgpo] mini-batch 16, on policy
            "scale_rewards": "group",  # [bgpo]
            "beta": 0.0,  # [bgpo] no KL, no clipping
            "draws": {
                "num_draws": 16,  # [bgpo] n_t; 32 for Sudoku
                "elbo_weighting": "L/l",  # ours: [bgpo] has 1/t, of the same mean and diverging variance
            },
        },
        "rollout": {
            "max_completion_length": 512,  # [bgpo] math, code; 256 for planning
            "block_length": 32,  # [bgpo]
            "diffusion_steps": 256,  # ours: not found in [bgpo]; 2 tokens a step
        },
        "train": {
            "prompts_per_step": 16,  # [bgpo]
            "learning_rate": 5e-7,  # [bgpo]
        },
    },
    "wd1": {
        "rl": {
            "algorithm": "wd1",
            "num_generations": 6,  # [wd1]
            "num_iterations": 12,  # [wd1] code; 8 in the paper
            "scale_rewards": "none",  # [wd1] centred, and the softmax does not see the centre
            "p_mask_prompt": 0.15,  # [wd1]
            "beta": 0.0,  # [wd1] beta = 0, lambda = 1
            "mask_after_eos": True,  # [d1], on whose code [wd1] is built
            "method": {"psi": 1.0},  # [wd1] 1 / (lambda + beta)
        },
        "rollout": {
            "max_completion_length": 256,  # [d1]
            "block_length": 32,  # [d1]
            "diffusion_steps": 128,  # [d1]
            "temperature": 0.9,  # [d1]
        },
        "train": {
            "prompts_per_step": 8,  # ours: [wd1] has 4 GPUs, [d1] 16 prompts on 8
            "learning_rate": 3e-6,  # [wd1]
        },
        "lora": _LORA,
    },
    "dmpo": {
        "rl": {
            "algorithm": "dmpo",
            "num_generations": 16,  # [dmpo]
            "num_iterations": 8,  # [dmpo]
            "scale_rewards": "none",  # [dmpo] the weights see the rewards themselves
            "beta": 0.0,  # [dmpo] the reference is in the target
            "draws": {"num_draws": 2},  # [dmpo] 4 replicates in complementary pairs
            "method": {
                "alpha": 0.04,  # [dmpo]
                "target_baseline": "negative",  # [dmpo] "neg", lambda_b = 1
            },
        },
        "rollout": {
            "max_completion_length": 256,  # [dmpo]
            "block_length": 32,  # [dmpo]
            "diffusion_steps": 128,  # [dmpo]
            "temperature": 0.2,  # [dmpo]
        },
        "train": {
            "prompts_per_step": 8,  # ours: [dmpo] has one prompt (8 x 2 rows) per GPU
            "learning_rate": 1e-6,  # [dmpo]
            "max_grad_norm": 0.2,  # [dmpo]
        },
        "lora": _LORA,
    },
    "spg": {
        "rl": {
            "algorithm": "spg",
            "num_generations": 6,  # [spg]
            "num_iterations": 4,  # [spg]
            "scale_rewards": "none",  # [spg] mean only
            "beta": 0.0,  # [spg] no KL
            "mask_after_eos": True,  # [spg]
            "draws": {
                "num_draws": 2,  # [spg] m
                "p_mask_clean": 0.15,  # [spg]
            },
            "method": {
                "upper_power": 1.5,  # [spg]; 1.0 Sudoku, 2.0 Countdown without mixture
                "upper_mixture": 0.5,  # [spg]
            },
        },
        "rollout": {
            "max_completion_length": 256,  # [spg]
            "block_length": 32,  # [spg]
            "diffusion_steps": 128,  # [spg]
            "temperature": 0.9,  # [spg]; 0.3 Sudoku
        },
        "train": {
            "prompts_per_step": 16,  # [d1], on whose code [spg] is built: 8 GPUs x 2 accumulation steps
            "learning_rate": 3e-6,  # [spg]
        },
        "lora": _LORA,
    },
    "vrpo": {
        "rl": {
            "algorithm": "vrpo",
            "num_iterations": 1,  # [vrpo] one epoch, of 350 k pairs
            "scale_rewards": "none",  # pairs are told by the order of rewards
            "beta": 0.1,  # ours: not found in [vrpo]; DPO's usual value
            "draws": {
                "num_draws": 8,  # [vrpo] n = 8 timesteps, one mask each
                "elbo_weighting": "L/l",  # ours: [vrpo] has 1/t, of the same mean and diverging variance
            },
        },
    },
    "wd1pp": {
        "rl": {
            "algorithm": "wd1pp",
            "num_generations": 6,  # [wd1]
            "num_iterations": 1,  # ours: the number for wd1++ is not found
            "scale_rewards": "none",  # as wd1
            "beta": 0.0,  # [wd1]
            "method": {
                "psi": 1.0,  # [wd1]
                "num_predictions": 8,  # ours: the number of intermediate completions is not found
            },
        },
        "rollout": {
            "max_completion_length": 256,  # [d1]
            "block_length": 32,  # [d1]
            "diffusion_steps": 128,  # [d1]
            "temperature": 0.9,  # [d1]
        },
        "train": {
            "prompts_per_step": 8,  # ours: as wd1
            "learning_rate": 3e-6,  # [wd1]
        },
        "lora": _LORA,
    },
    "linvit": {
        "rl": {
            "algorithm": "linvit",
            "num_iterations": 1,  # ours: [linvit] trains no model; one step towards its policy
            "scale_rewards": "none",  # the weights are softmax(Q / lambda)
            "beta": 0.0,  # [linvit] the prior is in the weights
            "method": {
                "num_values": 2,  # ours: completions behind a Q
                "value_temperature": 0.25,  # ours: lambda for rewards of 0 and 1
            },
        },
    },
    "tbrm": {
        "rl": {
            "algorithm": "tbrm",
            "num_iterations": 1,  # ours: one residual update per batch
            "scale_rewards": "none",  # [tbrm] raw rewards
            "beta": 0.05,  # ours: a correct answer asks for a log-ratio of 20 nats
            "draws": {"num_draws": 4},  # ours: two for each of the two estimates
        },
    },
}
