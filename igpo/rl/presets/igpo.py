"""IGPO and the diffu-GRPO it builds on.

[paper] arXiv:2509.10396 (IGPO).   [igpo code] facebookresearch/igpo, 2025-12-27: run_igpo.sh over train.yaml.
[d1 code] dllm-reasoning/d1, 2025-05-04: diffu-GRPO, arXiv:2504.12216.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Mapping[str, Any]]

_IGPO_ROLLOUT = {
    "max_completion_length": 256,  # [igpo code]
    "block_length": 32,  # [igpo code]
    "diffusion_steps": 128,  # [igpo code] max_completion_length / 2: two tokens a step
    "temperature": 1.2,  # [igpo code]
    "remasking": "low_confidence",  # [igpo code]
    "early_stop": True,  # [igpo code] generate.py stops once a block is all end-of-text
}

_IGPO_TRAIN = {
    "seed": 3,  # [igpo code]
    "prompts_per_step": 64,  # [igpo code] 8 GPUs x 8 accumulation steps x one group of 8
    "learning_rate": 5e-7,  # [igpo code]
    "lr_scheduler_type": "constant_with_warmup",  # [igpo code]
    "warmup_steps": 50,  # [igpo code]
    "adam_beta1": 0.9,  # [igpo code]
    "adam_beta2": 0.99,  # [igpo code]
    "weight_decay": 0.1,  # [igpo code]
    "max_grad_norm": 0.2,  # [igpo code]
}

_IGPO_RL = {
    "num_generations": 8,  # [igpo code]
    "num_iterations": 4,  # [igpo code]
    "scale_rewards": "none",  # [paper] section 3: mean only, no standard deviation
    "p_mask_prompt": 0.0,  # [paper] drops d1's prompt masking
    "importance_sampling_level": "sequence",  # [igpo code] use_gspo=true
    "epsilon": 0.2,  # [igpo code] epsilon_low = epsilon_high
    "beta": 0.01,  # [igpo code]
    "kl_estimator": "k3",  # [igpo code]
    "mask_after_eos": False,  # [igpo code] the completion mask is computed and not used
}

_IGPO_INPAINT = {
    "eta_low": 0.2,  # [paper], [igpo code]
    "eta_high": 0.6,  # [paper], [igpo code]
    "chunk_min": 5,  # [igpo code] run script
    "chunk_max": 10,  # [igpo code] run script
    "replace_fraction": 0.5,  # [paper] lambda; [igpo code] max_replacements = 4 of 8
    "entropy_filter": 0.2,  # [paper] tau; [igpo code]
}

_IGPO_LORA = {
    "use_lora": True,  # [igpo code]
    "lora_r": 128,  # [igpo code]
    "lora_alpha": 64,  # [igpo code]
}

PRESETS: dict[str, Preset] = {
    "igpo": {
        "rl": {
            **_IGPO_RL,
            "algorithm": "igpo",
            "loss_type": "grpo",  # [paper] eq. 5: (1/G) sum_i (1/L_i) sum_k
            "inpaint": {
                **_IGPO_INPAINT,
                "layout": "original",  # [paper] z_hint[k] = y*_k
                "trigger": "correctness",  # [paper] all rewards of the group are 0
                "replace_order": "random",  # [paper]
                "exclude_answer": True,  # [paper] the final answer is never shown
            },
        },
        "rollout": _IGPO_ROLLOUT,
        "train": _IGPO_TRAIN,
        "lora": _IGPO_LORA,
    },
    "igpo_released": {
        "rl": {
            **_IGPO_RL,
            "algorithm": "igpo_released",
            "loss_type": "released",  # [igpo code] token mean; sequence ratio over all positions
            "inpaint": {
                **_IGPO_INPAINT,
                "layout": "scaled",  # [igpo code] create_spacing_scaled_inpainting_sequence
                "trigger": "correctness",  # [igpo code]
                "replace_order": "first",  # [igpo code]
                "exclude_answer": False,  # [igpo code] the last chunk is always revealed
            },
        },
        "rollout": _IGPO_ROLLOUT,
        "train": _IGPO_TRAIN,
        "lora": _IGPO_LORA,
    },
    "diffu_grpo": {
        "rl": {
            "algorithm": "grpo",
            "num_generations": 6,  # [d1 code]
            "num_iterations": 12,  # [d1 code]
            "scale_rewards": "none",  # [d1 code] mean only
            "p_mask_prompt": 0.15,  # [d1 code]
            "importance_sampling_level": "token",  # [d1 code]
            "epsilon": 0.5,  # [d1 code]
            "beta": 0.04,  # [d1 code]
            "kl_estimator": "k3",  # [d1 code]
            "loss_type": "bnpo",  # [d1 code] sum(loss * mask) / sum(mask)
            "mask_after_eos": True,  # [d1 code] up to and including the first EOS
        },
        "rollout": {
            "max_completion_length": 256,  # [d1 code]
            "block_length": 32,  # [d1 code]
            "diffusion_steps": 128,  # [d1 code]
            "temperature": 0.9,  # [d1 code]
            "remasking": "low_confidence",  # [d1 code]
        },
        "train": {
            "prompts_per_step": 16,  # [d1 code] 8 GPUs x 2 accumulation steps x one group of 6
            "learning_rate": 3e-6,  # [d1 code]
            "lr_scheduler_type": "constant",  # [d1 code]
            "adam_beta1": 0.9,  # [d1 code]
            "adam_beta2": 0.99,  # [d1 code]
            "weight_decay": 0.1,  # [d1 code]
            "max_grad_norm": 0.2,  # [d1 code]
        },
        "lora": {
            "use_lora": True,  # [d1 code]
            "lora_r": 128,  # [d1 code]
            "lora_alpha": 64,  # [d1 code]
        },
    },
}
