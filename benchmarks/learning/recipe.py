"""Every number of the learning table: models, warm starts, and what a row changes of its published settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from igpo.config import Config, EvalConfig, RolloutConfig, TrainConfig
from igpo.config_io import flatten
from igpo.demo.recipe import warm_start_config
from igpo.rl.algorithms import ALGORITHMS
from igpo.rl.estimators import LIKELIHOODS
from igpo.rl.presets import PRESETS, preset_of

NUM_STEPS, PROMPTS, GENERATIONS, UPDATES = 16, 8, 8, 2  # UPDATES: inner ones
# of 3e-4 and 6e-4 the one at which igpo and wd1 did better on Sudoku (seed 100, which is not in the table)
LEARNING_RATE = 3e-4
NUM_EVAL = 256  # held-out problems behind every accuracy
MOST_DRAWS, MOST_PREDICTIONS = 4, 6  # of presets that have more, for rollouts of 8 steps


@dataclass(frozen=True)
class Shape:
    """block_length: of the rollout, and of the block-causal model; completions and prompts are whole blocks.

    temperature: of rollouts.   warm_steps, warm_blocks: SFT updates of the start, full attention and block-causal, on
    warm_pool training problems (0: never the same twice).
    """

    completion_length: int
    block_length: int
    diffusion_steps: int
    temperature: float
    warm_steps: int
    warm_blocks: int
    warm_pool: int


SHAPES = {
    "chain": Shape(8, 4, 8, 0.8, 700, 500, 0),
    "countdown": Shape(8, 4, 8, 0.8, 2300, 900, 2048),
    "sudoku": Shape(16, 4, 8, 0.8, 350, 100, 4096),
}


@dataclass(frozen=True)
class Entry:
    """A row of the table: an algorithm, its settings (section rl of a preset), what is changed of them and rollouts."""

    algorithm: str
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    block_causal: bool = False
    rollout: Mapping[str, Any] = field(default_factory=dict)


# what a rollout needs that only these have; a bound at which a few tokens of these tasks go together
_ROLLOUTS = {"diffpo_joint": {"entropy_bound": 0.1}}

# the trajectory's own likelihood, as in the demo
_REPLAY = {
    "likelihood": "step_map", "hint_mode": "replay", "importance_sampling_level": "token", "loss_type": "bnpo",
    "draws": {"num_slices": MOST_DRAWS},
}  # fmt: skip


def entries() -> dict[str, Entry]:
    """Name -> row: every algorithm, then compositions that say what a difference comes from."""
    found = {
        name: Entry(
            name, preset_of(name) or name, block_causal=LIKELIHOODS[made.likelihood].block_causal,
            rollout=_ROLLOUTS.get(name, {}),
        )
        for name, made in ALGORITHMS.items()
    }  # fmt: skip
    return found | {
        "grpo likelihood=step_map": Entry("grpo", "igpo", _REPLAY),
        "igpo likelihood=step_map": Entry("igpo", "igpo", _REPLAY),
        "grpo, block-causal model": Entry("grpo", "diffu_grpo", block_causal=True),
    }


def rollout(task: str) -> RolloutConfig:
    shape = SHAPES[task]
    return RolloutConfig(
        max_completion_length=shape.completion_length, block_length=shape.block_length,
        diffusion_steps=shape.diffusion_steps,
        temperature=shape.temperature, remasking="low_confidence", early_stop=False, rollout_batch_size=256,
    )  # fmt: skip


def config(task: str, entry: Entry, seed: int, num_steps: int = NUM_STEPS) -> Config:
    """The row's preset under the settings all rows share."""
    rl = merged(Config().rl, {**PRESETS[entry.preset]["rl"], "algorithm": entry.algorithm})
    rl = merged(rl, _common(task, rl))
    return Config(
        rollout=replace(rollout(task), **entry.rollout),
        rl=merged(rl, entry.changes),
        train=TrainConfig(
            max_steps=num_steps, prompts_per_step=PROMPTS, per_device_train_batch_size=PROMPTS * GENERATIONS,
            learning_rate=LEARNING_RATE, warmup_steps=5, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0,
            seed=seed, save_steps=0, report_to=(),
        ),
        evaluation=EvalConfig(eval_batch_size=NUM_EVAL),
    )  # fmt: skip


def _common(task: str, rl: Any) -> dict[str, Any]:
    """What all rows share, and published counts that are larger than these canvases."""
    shape, method = SHAPES[task], rl.method
    critic = (
        {"critic": {"critic_learning_rate": LEARNING_RATE}}
        if ALGORITHMS[rl.algorithm].critique
        else {}
    )
    return critic | {
        "num_generations": GENERATIONS,
        "num_iterations": UPDATES,
        "constant_memory": False,  # faster at this size, and the same gradient
        "inpaint": {"chunk_min": 1, "chunk_max": 1},
        "draws": {
            "num_draws": min(rl.draws.num_draws, MOST_DRAWS),
            "shrink": min(rl.draws.shrink, 2),
            "filtered_scoring": "support",  # no rollout here is filtered, so it makes no difference
            # agrpo scores under the sampling distribution
            "likelihood_temperature": shape.temperature if rl.draws.likelihood_temperature != 1 else 1.0,
        },
        "method": {
            "num_predictions": min(method.num_predictions, MOST_PREDICTIONS),
            "kept_predictions": min(method.kept_predictions, MOST_PREDICTIONS // 2),
            # the preset's half of a full batch
            "token_budget": PROMPTS * GENERATIONS * shape.completion_length // 2,
        },
    }  # fmt: skip


def warm_config(task: str, block_causal: bool) -> Config:
    """Masked SFT as the demo's start has it, on the task's canvas."""
    demo, shape = warm_start_config(), SHAPES[task]
    steps = shape.warm_blocks if block_causal else shape.warm_steps
    return replace(demo, rollout=rollout(task), train=replace(demo.train, max_steps=steps))


def merged(record: Any, changes: Mapping[str, Any]) -> Any:
    """The record with `changes`, whose mappings are changes of nested records."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return replace(
        record,
        **{k: merged(values[k], new) if is_dataclass(values[k]) else new for k, new in changes.items()},
    )  # fmt: skip


def digest(task: str, entry: Entry, start: str, num_steps: int, num_eval: int) -> str:
    """What a result depends on beside its seed and the code, in 12 letters: settings, start, size of the evaluation."""
    settings = changed(config(task, entry, 0, num_steps))
    return short([task, entry.block_causal, settings, start, num_eval])


def changed(cfg: Config) -> dict[str, Any]:
    """The settings that are not the defaults: a new option with a default makes nothing another recipe."""
    plain = flatten(Config())
    return {key: value for key, value in flatten(cfg).items() if value != plain[key]}


def short(facts: Any) -> str:
    """A digest of what JSON can hold, in 12 letters."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
