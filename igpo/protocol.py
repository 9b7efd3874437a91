"""What a number of an evaluation depends on: what its completions belong to, and what a reader needs beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .config import Config, ConfigError
from .environment import git_commit, machine, versions
from .models import stop_token_ids
from .models.hub import folder_of
from .models.weights import fingerprint
from .policy import placement
from .types import Prompt

# keys that change no completion, or are said another way
_FREE = ("rollout_batch_size", "record_support", "temperature", "max_completion_length", "diffusion_steps")  # fmt: skip
_VERIFICATION = {
    "answer": "answer after the last ####, else the last \\boxed{}, else the last number; numbers are exact",
}


def lengths_of(cfg: Config) -> tuple[int, ...]:
    lengths = cfg.evaluation.eval_lengths or (cfg.rollout.max_completion_length,)
    return tuple(dict.fromkeys(lengths))


def at_length(cfg: Config, length: int) -> Config:
    """The configuration with another canvas, and as many tokens per denoise step as before. Raises ConfigError."""
    rollout = cfg.rollout
    steps, rest = divmod(length * rollout.diffusion_steps, rollout.max_completion_length)
    if length < 1 or length % rollout.block_length or rest or not steps:
        raise ConfigError(
            f"eval_lengths must be multiples of block_length={rollout.block_length} that keep "
            f"{rollout.max_completion_length}/{rollout.diffusion_steps} tokens per step, got {length}."
        )
    return replace(
        cfg, rollout=replace(rollout, max_completion_length=length, diffusion_steps=steps)
    )


def identity(cfg: Config, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that changes a completion or its verdict, as JSON has it: completions with another identity are not mixed.

    `prompts` stands for data, template and tokenizer: a digest of tokens, answers and columns; `model` for the weights:
    a digest of samples of the files.
    """
    device, dtype = placement(cfg.model)
    rollout = {key: value for key, value in asdict(cfg.rollout).items() if key not in _FREE}
    reward = {key: value for key, value in asdict(cfg.reward).items() if key != "verify_workers"}
    found = {
        "model": _model(cfg.model.model_name_or_path),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "prompts": _digest([[p.row_id, p.ids, p.answer, dict(p.columns)] for p in prompts]),
        "num_problems": len(prompts),
        "prompt_template": cfg.data.prompt_template,
        "response_prefix": cfg.data.response_prefix,
        "max_completion_length": lengths_of(cfg),
        "diffusion_steps": [at_length(cfg, n).rollout.diffusion_steps for n in lengths_of(cfg)],
        **rollout,
        "temperature": cfg.evaluation.eval_temperature,
        "num_eval_generations": cfg.evaluation.num_eval_generations,
        "seed": cfg.train.seed,
        "stop_token_ids": sorted(stop_token_ids(tokenizer)),
        **reward,
    }
    return json.loads(json.dumps(found))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "key is X there, Y here" of every key that two identities do not share."""
    return [
        f"{key} is {then.get(key)!r} there, {now.get(key)!r} here"
        for key in dict.fromkeys((*now, *then))
        if then.get(key) != now.get(key)
    ]


def protocol(cfg: Config, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a reader must know to get the same number again."""
    task = cfg.reward.task
    judged = f"task {task} of igpo.rewards.verify (docs/rewards.md)"
    return {
        "model_name_or_path": cfg.model.model_name_or_path,
        "eval_file": cfg.data.eval_file,
        "eval_limit": cfg.evaluation.eval_limit,
        **identity(cfg, tokenizer, prompts),
        "first_prompt": tokenizer.decode(prompts[0].ids),
        "padding": "left, masked: the batch size changes no completion",
        "verification": _VERIFICATION.get(task, judged),
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": machine(),
    }


def _model(path: str | None) -> str:
    """Of a model's files; of an adapter's and its base model's."""
    assert path is not None, "checked by require_model"
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        return fingerprint(folder_of(path))
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return _digest([fingerprint(Path(path)), _model(base)])


def _digest(value: Any) -> str:
    text = json.dumps(value, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
