"""`igpo train|sft … --dry-run`: what a run needs and sees, and two of its steps with a small model of random weights.

The plan is computed from the shape of the model and the settings; nothing in it is measured, so it holds no times.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from . import dataset_report
from . import sft as sft_program
from . import train as train_program
from .config import Config, ConfigError
from .logging import output, say
from .models import MaskedDecoder, MaskedDecoderConfig
from .models.families import family_of
from .models.loading import CLASSES
from .options import DataOptions
from .policy import build_policy, load_tokenizer, placement
from .types import Metrics

STEPS = 2
_GIB = 2**30
# of the small model; its vocabulary is the tokenizer's
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def train(cfg: Config) -> None:
    """`igpo train --dry-run`."""
    _dry_run(cfg, train_program.run, is_sft=False)


def sft(cfg: Config) -> None:
    """`igpo sft --dry-run`."""
    _dry_run(cfg, sft_program.run, is_sft=True)


def _dry_run(cfg: Config, program: Callable[[Config], Metrics], *, is_sft: bool) -> None:
    shape = model_shape(cfg)
    output.print(_titled("memory of the states, GiB", memory(cfg, shape, is_sft=is_sft), ".2f"))
    output.print(_titled("work of a step", work(cfg, shape, is_sft=is_sft), ",.4g"))
    dataset_report.run(cfg, DataOptions())
    say(f"{STEPS} steps with a small model of random weights:")
    with tempfile.TemporaryDirectory(prefix="igpo-dry-run-") as folder:
        last = program(small(cfg, Path(folder), shape.block_length))
    output.print(_titled("the last step", {k: v for k, v in last.items() if v is not None}, ".4g"))
    say("dry run: passed")


def model_shape(cfg: Config) -> MaskedDecoderConfig:
    """Of the model in model_name_or_path, else of the one ModelConfig describes. Raises ConfigError."""
    path = cfg.model.model_name_or_path
    if path is None:
        tokenizer = load_tokenizer(cfg.model)
        m = cfg.model
        return MaskedDecoderConfig(
            vocab_size=len(tokenizer), hidden_size=m.hidden_size, intermediate_size=m.intermediate_size,
            num_hidden_layers=m.num_hidden_layers, num_attention_heads=m.num_attention_heads,
            mask_token_id=tokenizer.mask_token_id,
        )  # fmt: skip
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(f"model_name_or_path: there is no {file}.")
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("model_type") in (None, MaskedDecoderConfig.model_type):
        return MaskedDecoderConfig(**{"mask_token_id": 0, **found})
    family_of(found)
    return CLASSES[found["model_type"]][0].from_dict(found)


def parameters(shape: MaskedDecoderConfig, cfg: Config) -> tuple[int, int]:
    """(all, trained) weights, counted on the module itself without memory for it."""
    with torch.device("meta"):
        model = MaskedDecoder(shape)
    everything = sum(p.numel() for p in model.parameters())
    if not cfg.lora.use_lora:
        return everything, everything
    names = cfg.lora.lora_target_modules
    head = model.get_output_embeddings()
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
        if not names or name.rpartition(".")[2] in names or name in names
    ]
    adapters = sum(cfg.lora.lora_r * (m.in_features + m.out_features) for m in linear)
    return everything + adapters, adapters


def memory(cfg: Config, shape: MaskedDecoderConfig, *, is_sft: bool) -> dict[str, float]:
    """GiB by part, without activations and logits, which depend on per_device_train_batch_size and the backend."""
    everything, trained = parameters(shape, cfg)
    width = placement(cfg.model)[1].itemsize
    copied = not is_sft and cfg.rl.beta != 0 and not cfg.lora.use_lora
    parts = {
        "weights": everything * width,
        "float32 masters of the trained weights": trained * 4 * (width != 4),
        "gradients (float32)": trained * 4,
        "AdamW moments (float32)": trained * 8,
        "reference model": everything * width * copied,
    }
    gib = {name: size / _GIB for name, size in parts.items() if size}
    return {**gib, "together": sum(gib.values())}


def work(cfg: Config, shape: MaskedDecoderConfig, *, is_sft: bool) -> dict[str, float]:
    """Counts of a step. A forward is one sequence through the model; forward and backward count as three."""
    everything, _ = parameters(shape, cfg)
    length = cfg.data.max_prompt_length + cfg.rollout.max_completion_length
    if is_sft:
        if shape.block_length and cfg.sft.beside_clean:
            length *= 2  # a noisy and a clean copy
        counts = {
            "sequences": cfg.sft.sft_batch_size,
            "forwards of the update": 3 * cfg.sft.sft_batch_size,
        }
    else:
        sequences = cfg.train.prompts_per_step * cfg.rl.num_generations
        rollout = sequences * cfg.rollout.diffusion_steps
        counts = {
            "sequences": sequences,
            "optimizer updates": cfg.rl.num_iterations,
            "forwards of the rollout": rollout,
            "more, if every group is rescued": rollout * cfg.rl.algorithm.startswith("igpo"),
            # one draw an inner update: likelihoods with several draws multiply these
            "forwards of the old and reference policy": sequences
            * cfg.rl.num_iterations
            * (1 + (cfg.rl.beta != 0)),
            "forwards of the updates": 3 * sequences * cfg.rl.num_iterations,
        }
    forwards = sum(n for name, n in counts.items() if "forwards" in name)
    dense = everything - shape.vocab_size * shape.hidden_size  # the embedding is a lookup
    pflop = 2 * dense * length * forwards / 1e15
    shown = {name: float(n) for name, n in counts.items() if n}
    return {
        **shown,
        "tokens of a sequence, at most": float(length),
        "PFLOP, without rescues": pflop,
    }


def small(cfg: Config, folder: Path, block_length: int | None) -> Config:
    """The same run of STEPS steps with a small model: settings, data, template, rewards, adapters and blocks stay."""
    model = replace(
        cfg.model, **_SMALL, model_name_or_path=None,
        tokenizer_name_or_path=cfg.model.tokenizer_name_or_path or cfg.model.model_name_or_path,
    )  # fmt: skip
    train = replace(
        cfg.train, output_dir=str(folder / "run"), max_steps=STEPS, prompts_per_step=1, logging_steps=1, save_steps=0,
        eval_steps=0, resume_from_checkpoint=None, report_to=(), log_completions=False,
    )  # fmt: skip
    made = replace(cfg, model=model, train=train, sft=replace(cfg.sft, sft_batch_size=2))
    if cfg.lora.use_lora or block_length:  # adapters and blocks belong to a saved model
        saved = folder / "model"
        tokenizer = load_tokenizer(model)
        plain: Any = replace(made, lora=replace(cfg.lora, use_lora=False))
        policy = build_policy(plain, tokenizer)
        policy.config.block_length = block_length
        for part in (policy, tokenizer):
            part.save_pretrained(saved)
        made = replace(made, model=replace(model, model_name_or_path=str(saved)))
    return made


def _titled(title: str, numbers: Any, form: str) -> Table:
    table = Table(title, "")
    for name, value in numbers.items():
        table.add_row(name, format(value, form))
    return table
