"""Algorithms whose likelihood is of tokens.

[agrpo] arXiv:2510.04019, released code of 2026-05-11, its GSM8K configuration.   [mmada] arXiv:2505.15809, section 4.3.
[coupled] arXiv:2506.20639 (DiffuCoder), released code of 2025-07-08.   [tracerl] arXiv:2509.06949, released code of
2026-01-28, its LLaDA configuration.   [dipo] arXiv:2512.22234 (DiRL), released code of 2026-01-20.   [diffpo]
arXiv:2510.02212.   [c3po] arXiv:2506.14731.   [mdpo] arXiv:2508.13148, the command of its repository, 2025-10-21.
[vineppo] arXiv:2410.01679.   [d1] as in igpo.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Mapping[str, Any]]

_DIFFPO = {
    "num_generations": 6,  # ours: as [d1], on which [diffpo] compares
    "num_iterations": 8,  # ours: not found in [diffpo]
    "scale_rewards": "none",  # ours: as [d1]
    "importance_sampling_level": "token",  # [diffpo] the surrogate is of tokens
    "epsilon": 0.5,  # ours: as [d1]
    "beta": 0.0,  # [diffpo] the KL term is optional
    "loss_type": "bnpo",  # ours: as [d1]
    "method": {"behaviour_cap": 2.0},  # ours: C is not found in [diffpo]
}
_DIFFPO_TRAIN = {
    "prompts_per_step": 16,  # ours: as [d1]
    "learning_rate": 3e-6,  # ours: as [d1]
}

PRESETS: dict[str, Preset] = {
    "agrpo": {
        "rl": {
            "algorithm": "agrpo",
            "num_generations": 8,  # [agrpo]
            "num_iterations": 1,  # [agrpo] on policy
            "scale_rewards": "none",  # [agrpo] mean only
            "epsilon": 0.2,  # [agrpo]
            "beta": 0.0,  # [agrpo]
            "kl_estimator": "k3_ratio",  # [agrpo] k3 times the ratio, were beta not 0
            "draws": {
                "num_draws": 24,  # [agrpo] k
                "step_proposal": "entropy",  # [agrpo]
                "filtered_scoring": "support",  # [agrpo] over the tokens that could be drawn
                "likelihood_temperature": 0.6,  # [agrpo] scored under the sampling distribution
            },
        },
        "rollout": {
            "max_completion_length": 384,  # [agrpo]
            "block_length": 12,  # [agrpo]
            "diffusion_steps": 128,  # [agrpo] 3 tokens a step
            "temperature": 0.6,  # [agrpo]
            "top_k": 150,  # [agrpo]
            "top_p": 0.99,  # [agrpo]; there of the mass that top_k left, and the token that reaches it is out
            "record_support": True,  # [agrpo] there as a mask over the vocabulary
            "remasking": "random",  # [agrpo] the order then has no gradient
        },
        "train": {
            "prompts_per_step": 16,  # [agrpo] 8 rows x 2 accumulation steps x 8 GPUs / 8 generations
            "learning_rate": 5e-6,  # [agrpo]
            "lr_scheduler_type": "cosine",  # [agrpo]
            "adam_beta1": 0.9,  # [agrpo]
            "adam_beta2": 0.99,  # [agrpo]
            "warmup_steps": 10,  # [agrpo] warm-up ratio 0.01; ours: of 1000 updates
            "weight_decay": 0.01,  # [agrpo]
            "max_grad_norm": 1.0,  # [agrpo]
        },
        "lora": {
            "use_lora": True,  # [agrpo]
            "lora_r": 64,  # [agrpo]
            "lora_alpha": 64,  # [agrpo]
        },
    },
    "unigrpo": {
        "rl": {
            "algorithm": "unigrpo",
            "num_generations": 8,  # ours: not found in [mmada]
            "num_iterations": 4,  # ours: mu of the example schedule 300, 533, 766, 1000
            "scale_rewards": "group",  # [mmada] group-normalised
            "min_mask_ratio": 0.0,  # [mmada] t_1 = floor(r T), r ~ U(0, 1)
            "importance_sampling_level": "token",  # [mmada] token ratio at the same mask
            "epsilon": 0.2,  # ours: the constant is not legible in [mmada]
            "beta": 0.01,  # ours: the constant is not legible in [mmada]
            "loss_type": "grpo",  # [mmada] a sequence's log-prob is the mean of its masked tokens
        },
        "train": {
            "prompts_per_step": 160,  # [mmada] batch 1280, by 8 generations
            "learning_rate": 5e-5,  # [mmada]
        },
    },
    "coupled_grpo": {
        "rl": {
            "algorithm": "coupled_grpo",
            "num_generations": 10,  # [coupled]
            "num_iterations": 2,  # [coupled]
            "scale_rewards": "loo",  # [coupled]
            "importance_sampling_level": "token",  # [coupled]
            "epsilon": 0.5,  # [coupled]
            "beta": 0.01,  # [coupled]
            "kl_estimator": "k3",  # [coupled]
            "loss_type": "bnpo",  # [coupled] sum(loss * mask) / sum(mask)
            "draws": {"filtered_scoring": "ignore"},  # [coupled] over all tokens
        },
        "rollout": {
            "max_completion_length": 256,  # [coupled]
            "block_length": 256,  # [coupled] the whole canvas at once
            "diffusion_steps": 256,  # [coupled]
            "temperature": 1.0,  # [coupled]
            "top_p": 0.95,  # [coupled]
            "remasking": "entropy",  # [coupled] the lowest entropy first
        },
        "train": {
            "learning_rate": 1e-6,  # [coupled] full fine-tuning
        },
    },
    "tracerl": {
        "rl": {
            "algorithm": "tracerl",
            "num_generations": 8,  # [tracerl]
            "num_iterations": 1,  # [tracerl]
            "scale_rewards": "group",  # [tracerl] z-score, population standard deviation
            "epsilon": 0.2,  # [tracerl]
            "beta": 0.01,  # [tracerl]
            "kl_estimator": "k3",  # [tracerl]
            "kl_to": "old",  # [tracerl]
            "draws": {"shrink": 8},  # [tracerl] 64 slices of 512 steps
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
        },
    },
    "dipo": {
        "rl": {
            "algorithm": "dipo",
            "num_generations": 32,  # [dipo] 128 prompts of 32; the code's example has 8
            "num_iterations": 1,  # [dipo] equation 7: the old policy is the policy
            "scale_rewards": "group",  # [dipo] z-score; groups of equal rewards, dropped there, get the KL term
            "importance_sampling_level": "token",  # [dipo] equation 6
            "epsilon": 0.2,  # [dipo]
            "epsilon_high": 0.28,  # [dipo] epsilon + 0.08
            "beta": 0.1,  # [dipo] its code; the paper gives no value
            "kl_estimator": "k3",  # [dipo]
            "loss_type": "bnpo",  # [dipo] equation 7: by the number of tokens
            "draws": {"filtered_scoring": "ignore"},  # [dipo] over all tokens
        },
        "rollout": {
            "max_completion_length": 8192,  # [dipo]
            "block_length": 4,  # [dipo] SDAR's
            "diffusion_steps": 8192,  # [dipo] its static form; ours: no confidence threshold (0.9) commits more at once
            "temperature": 1.0,  # [dipo]
            "top_k": 50,  # [dipo]
        },
        "train": {
            "prompts_per_step": 128,  # [dipo]
            "learning_rate": 1e-6,  # [dipo]
        },
        "model": {
            "attn_implementation": "flex_attention",  # [dipo]; a CPU needs sdpa
        },
    },
    "diffpo": {"rl": {**_DIFFPO, "algorithm": "diffpo"}, "train": _DIFFPO_TRAIN},
    "diffpo_joint": {
        "rl": {
            **_DIFFPO,
            "algorithm": "diffpo_joint",
            "critic": {
                "critic_learning_rate": 3e-6,  # ours: the policy's
                "bound_std": 0.3,  # ours: not found in [diffpo]
                "step_cost": 0.1,  # ours: not found in [diffpo]
            },
        },
        "rollout": {
            "entropy_bound": 0.1,  # ours: where the trained bound starts; not found in [diffpo]
            "diffusion_steps": 256,  # ours: at least one token a step, so that the bound alone decides how many
        },
        "train": _DIFFPO_TRAIN,
    },
    "mdpo": {
        "rl": {
            "algorithm": "mdpo",
            "num_generations": 8,  # ours: not found in [mdpo]
            "num_iterations": 1,  # [mdpo] log-probs recorded at the rollout are the old ones
            "scale_rewards": "none",  # [mdpo] z-scored per step instead
            "epsilon": 0.2,  # ours: not found in [mdpo]
            "beta": 0.02,  # [mdpo]
            "kl_estimator": "k2",  # [mdpo] per token
            "method": {
                "num_predictions": 32,  # ours: [mdpo] grades all 128 steps
                "kept_predictions": 8,  # [mdpo] S
            },
        },
        "rollout": {
            "max_completion_length": 512,  # [mdpo]
            "block_length": 512,  # [mdpo]
            "diffusion_steps": 128,  # [mdpo]
            "temperature": 0.4,  # [mdpo]
        },
        "train": {
            "prompts_per_step": 16,  # [mdpo] accumulation steps; ours: one group each
            "learning_rate": 7e-7,  # [mdpo]
        },
    },
    "vineppo": {
        "rl": {
            "algorithm": "vineppo",
            "num_generations": 8,  # ours: not looked up in [vineppo]
            "num_iterations": 2,  # ours: not looked up in [vineppo]
            "scale_rewards": "none",  # values are the baseline
            "epsilon": 0.2,  # ours: PPO's usual value
            "beta": 1e-4,  # ours: not looked up in [vineppo]
            "kl_estimator": "k3",  # ours: as every other here
            "draws": {"shrink": 8},  # ours: as [tracerl] on LLaDA
            "method": {"num_values": 2},  # ours: [vineppo] has 9, which costs 4.5 times as much
        },
    },
    "c3po": {
        "rl": {
            "algorithm": "c3po",
            "loss_type": "budget",  # [c3po] samples up to a fixed number of tokens, and divided by it
            "importance_sampling_level": "token",  # [c3po] aggregated at token level
            "mask_after_eos": True,  # [c3po] lengths differ; that is what the budget is for
            "method": {"token_budget": 65536},  # ours: half of 64 x 8 completions of 256
        },
    },
}
