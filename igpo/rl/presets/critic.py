"""Algorithms with a critic.

[tracerl] arXiv:2509.06949, released code of 2026-01-28: its LLaDA configuration, and what its configurations with a
value model add.   [airls] arXiv:2508.14313, its abstract; its own settings were not looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Mapping[str, Any]]

PRESETS: dict[str, Preset] = {
    "tracerl_value": {
        "rl": {
            "algorithm": "tracerl_value",
            "num_generations": 8,  # [tracerl]
            "num_iterations": 1,  # [tracerl] one pass over the rollouts; there it is several updates
            "scale_rewards": "group",  # [tracerl] the reward is z-scored, population standard deviation
            "epsilon": 0.2,  # [tracerl]
            "beta": 0.01,  # [tracerl]
            "kl_estimator": "k3",  # [tracerl]
            "kl_to": "old",  # [tracerl]
            "draws": {"shrink": 8},  # [tracerl] 64 slices of 512 steps
            "critic": {
                "critic_learning_rate": 5e-6,  # [tracerl]
                "gamma": 1.0,  # [tracerl]
                "gae_lambda": 1.0,  # [tracerl]
                "value_epsilon": 0.2,  # [tracerl] the policy's epsilon
            },
        },
        "rollout": {
            "max_completion_length": 512,  # [tracerl]
            "block_length": 32,  # [tracerl]
            "diffusion_steps": 512,  # [tracerl]
            "temperature": 0.8,  # [tracerl]
        },
        "train": {
            "prompts_per_step": 32,  # [tracerl] tasks
            "learning_rate": 1e-6,  # [tracerl]
            "lr_scheduler_type": "constant",  # [tracerl] a cosine that ends where it begins, no warm-up
            "adam_beta2": 0.999,  # [tracerl]
            "weight_decay": 0.0,  # [tracerl]
            "max_grad_norm": 1.0,  # [tracerl]
        },
    },
    "airl_s": {
        "rl": {
            "algorithm": "airl_s",
            "num_generations": 8,  # ours: not looked up in [airls]
            "num_iterations": 1,  # ours: not looked up in [airls]
            "scale_rewards": "group",  # [airls] GRPO; its z-score
            "epsilon": 0.2,  # ours: PPO's usual value
            "beta": 0.0,  # ours: a step's reward holds -log pi already
            "draws": {"shrink": 16},  # ours: a step is a block of the default rollout
            "critic": {
                "critic_learning_rate": 5e-6,  # ours: as [tracerl], for a network of the same kind
                "gamma": 1.0,  # ours: not looked up in [airls]
                "step_reward_weight": 1.0,  # ours: not looked up in [airls]
                "num_candidates": 1,  # [airls] searches when it answers, not while it trains
            },
        },
        "train": {
            "prompts_per_step": 16,  # ours: as the d1 runs
            "learning_rate": 1e-6,  # ours: as [tracerl]
        },
    },
}
