"""`igpo eval --task NAME`: the evaluation sets of the published tables, each with its whole protocol.

A task says where the problems are, how they are asked, how they are sampled and how they are judged: keys of
igpo/config.py that replace what configuration files say, and are replaced by keys on the command line. Sources:

    [d1]    arXiv:2504.12216 and its released code (dllm-reasoning/d1, eval/)
    [igpo]  arXiv:2509.10396, ICLR version
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .config import ConfigError, EvalConfig, RewardConfig, RolloutConfig
from .config_io import nearest, pairs
from .options import EvalOptions

# dataset/ of the released code at the commit of 4 May 2025: what the published numbers were measured on
_D1_DATA = "https://raw.githubusercontent.com/dllm-reasoning/d1/837888f22c21a5da91a0af2b0d7b19e81d9b47ec/dataset"


def _d1(eval_file: str, verifier: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """The protocol most papers on LLaDA share."""
    rollout = asdict(RolloutConfig()) | {
        "max_completion_length": 256,  # with diffusion_steps: two tokens a step at every length [d1]
        "diffusion_steps": 128,
        "block_length": 32,  # [d1]
        "temperature": 0.0,  # [d1]
        "remasking": "low_confidence",  # [d1]
    }
    evaluation = asdict(EvalConfig()) | {
        "eval_lengths": (128, 256, 512),  # [d1]
        "eval_temperature": 0.0,  # [d1]
        "num_eval_generations": 1,  # [d1]
    }
    return {
        "data": {
            "eval_file": eval_file,
            "prompt_template": "d1",  # instruction, blank line, question, <reasoning> given [d1]; our words
            "response_prefix": None,
            "max_prompt_length": 1024,  # chosen: above every prompt of these sets; prompts are never cut
        },
        # how much is done at once changes no completion
        "rollout": {key: value for key, value in rollout.items() if key != "rollout_batch_size"},
        "evaluation": {k: v for k, v in (evaluation | changes).items() if k != "eval_batch_size"},
        "reward": {"task": verifier, "compat": None, "reward_funcs": RewardConfig.reward_funcs},
    }


TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "gsm8k": _d1("gsm8k@test", "gsm8k"),
    "math500": _d1("math500", "math"),
    # 40 problems: the mean of 16 samples at temperature 0.1 [igpo], on its canvas
    "amc23": _d1(
        "amc23", "math", eval_lengths=(256,), eval_temperature=0.1, num_eval_generations=16
    ),
    "countdown": _d1(f"countdown={_D1_DATA}/countdown_cd3_test.jsonl", "countdown"),
    # all 500 puzzles; [d1] takes a random 256 of them
    "sudoku": _d1(f"sudoku={_D1_DATA}/4x4_test_sudoku.csv", "sudoku"),
}
# the published number is the share of right cells [d1]: it is the reward, accuracy counts solved puzzles
TASKS["sudoku"]["reward"]["reward_funcs"] = ("score",)


def settings(options: EvalOptions) -> list[tuple[str, Any]]:
    """The keys a task sets; none without a task. Raises ConfigError."""
    if options.task is None:
        return []
    if options.task not in TASKS:
        raise ConfigError(
            f"command line: task must be one of {', '.join(TASKS)}, got {options.task!r}, the nearest is "
            f"{nearest(options.task, TASKS)!r}. The verifier alone is reward.task."
        )
    return pairs(TASKS[options.task])
