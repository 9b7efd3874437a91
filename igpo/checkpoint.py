"""Checkpoints: a folder per step that is complete or not there, and exact resume from it.

    checkpoint-<step>/   model (or adapter) and tokenizer as save_pretrained writes them, config.yaml
        optimizer.pt     moments and float32 masters, tensors and numbers only; of several processes each writes its
                         share, optimizer-1.pt, …, and any number of them can go on from it
        critic.pt        of an algorithm that has one: its trained weights; critic_optimizer.pt, … as optimizer.pt
        state.json       step, counters, configuration, data digest, versions

Randomness needs no state: every stream is a function of (seed, step, row).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import config_io, environment
from .config import Config, ConfigError, DataConfig
from .critic import Critic
from .data.recipes import parse
from .models import load_model
from .optim import Updater
from .ranks import ranks

PREFIX = "checkpoint-"
LAST = "last"

# keys that may change between a run and its continuation: they do not enter the computation, or its rounding alone;
# linear and cosine schedules also depend on max_steps
FREE = {
    "train.output_dir", "train.max_steps", "train.logging_steps", "train.save_steps", "train.save_total_limit",
    "train.eval_steps", "train.resume_from_checkpoint", "train.report_to", "train.log_completions",
    "train.num_threads", "train.per_device_train_batch_size", "rollout.rollout_batch_size",
    "data.train_file", "data.eval_file", "data.streaming", "model.device", "model.attn_implementation",
    "train.gradient_checkpointing", "train.packing", "sft.max_packed_length", "reward.verify_workers",
}  # fmt: skip
FREE_SECTIONS = ("evaluation.",)


@dataclass(frozen=True)
class State:
    """Where a run stands: steps done, and totals that go on counting (num_tokens)."""

    step: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)


def save(
    policy: Any, tokenizer: Any, updater: Updater, cfg: Config, state: State, critic: Critic | None = None
) -> Path:  # fmt: skip
    """Writes output_dir/checkpoint-<step>, then removes the oldest beyond save_total_limit.

    The folder gets its name when it is complete: a run killed while writing leaves the checkpoints before it.
    """
    root, here = Path(cfg.train.output_dir), ranks()
    folder, draft = root / f"{PREFIX}{state.step}", root / f".{PREFIX}{state.step}.partial"
    if here.first:
        for leftover in (draft, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        draft.mkdir(parents=True)
    here.wait()
    torch.save(updater.state_dict(), draft / _share("optimizer", here.rank))
    if critic is not None:
        torch.save(critic.updater.state_dict(), draft / _share("critic_optimizer", here.rank))
    if here.first:
        _write_shared(draft, policy, tokenizer, cfg, state)
        if critic is not None:
            torch.save(critic.weights(), draft / "critic.pt")
    here.wait()
    if here.first:
        draft.rename(folder)
        if cfg.train.save_total_limit is not None:
            for old in existing(root)[: -cfg.train.save_total_limit]:
                shutil.rmtree(old)
    return folder


def _share(name: str, rank: int) -> str:
    return f"{name}-{rank}.pt" if rank else f"{name}.pt"


def _write_shared(draft: Path, policy: Any, tokenizer: Any, cfg: Config, state: State) -> None:
    """What is the same on every process."""
    policy.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / "config.yaml").write_text(config_io.dump(cfg), encoding="utf-8")
    facts = {
        "step": state.step,
        "counters": dict(state.counters),
        "config": config_io.flatten(cfg),
        "data": digest(cfg.data),
        "versions": environment.versions(),
    }
    (draft / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def existing(root: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    steps = {
        int(folder.name.removeprefix(PREFIX)): folder
        for folder in Path(root).glob(f"{PREFIX}*")
        if folder.name.removeprefix(PREFIX).isdecimal()
    }
    return [steps[step] for step in sorted(steps)]


def find(cfg: Config) -> Path | None:
    """The folder to resume from; None for a new run. Raises ConfigError: none there, or a new run beside an old one."""
    asked, root = cfg.train.resume_from_checkpoint, cfg.train.output_dir
    present = existing(root)
    if asked is None:
        if present:
            raise ConfigError(
                f"output_dir: {root} already holds {present[-1].name}. "
                "Choose another folder, or resume_from_checkpoint=last."
            )
        return None
    if asked == LAST:
        if not present:
            raise ConfigError(f"resume_from_checkpoint=last: {root} holds no checkpoint.")
        return present[-1]
    if not (Path(asked) / "state.json").is_file():
        raise ConfigError(f"resume_from_checkpoint: {asked!r} is not the folder of a checkpoint.")
    return Path(asked)


def restore(
    folder: Path, policy: Any, updater: Updater, cfg: Config, critic: Critic | None = None
) -> State:
    """Puts weights and optimizers back as they were; returns where the run stood.

    Raises:
        ConfigError: the configuration or the data differ from the checkpoint's in what the continuation depends on.
    """
    facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    _check_same(facts, cfg, folder)
    if hasattr(policy, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        weights = load_peft_weights(str(folder), device=str(policy.device))
        set_peft_model_state_dict(policy, weights)
    else:
        saved = load_model(folder, dtype=policy.dtype, device=policy.device)
        policy.load_state_dict(saved.state_dict())
    updater.load_state_dict(_together(folder, "optimizer"))
    if critic is not None:
        weights = torch.load(folder / "critic.pt", map_location="cpu", weights_only=True)
        critic.load_weights(weights)
        critic.updater.load_state_dict(_together(folder, "critic_optimizer"))
    return State(facts["step"], facts["counters"])


def _together(folder: Path, name: str) -> dict[str, Any]:
    """The state of an updater from the shares of all the processes that saved it."""
    shares = [
        torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        for file in sorted(folder.glob(f"{name}*.pt"))
    ]
    weights = {index: values for share in shares for index, values in share["weights"].items()}
    return {"done": shares[0]["done"], "weights": weights}


def digest(cfg: DataConfig) -> str | None:
    """Of a data file's bytes, or of the name of a dataset elsewhere: a continuation must see the same rows."""
    if cfg.train_file is None:
        return None
    _, source = parse(cfg.train_file, cfg)
    if source.is_url or not source.is_file:
        return hashlib.blake2b(str(source).encode()).hexdigest()[:32]
    with open(source.place, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]


def _check_same(facts: Mapping[str, Any], cfg: Config, folder: Path) -> None:
    now, then = config_io.flatten(cfg), facts["config"]
    free = FREE - (
        {"train.max_steps"} if cfg.train.lr_scheduler_type in ("linear", "cosine") else set()
    )
    differing = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and key not in free and not key.startswith(FREE_SECTIONS)
    ]
    if differing:
        raise ConfigError(
            f"{folder}: cannot resume, the run had other settings: {'; '.join(differing)}."
        )
    if facts["data"] != digest(cfg.data):
        raise ConfigError(
            f"{folder}: cannot resume, {cfg.data.train_file} holds other data than then."
        )
