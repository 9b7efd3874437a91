"""`igpo train|sft … --dry-run`: what a run needs and sees, and two of its steps with a small model of random weights.

The plan is computed from the shape of the model and the settings; times only where a rate was measured or given.
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

from . import dataset_report, time_plan, work_plan
from . import sft as sft_program
from . import train as train_program
from .config import Config, ConfigError
from .logging import output, say
from .models import MaskedDecoder, MaskedDecoderConfig
from .models.families import family_of
from .models.loading import CLASSES
from .options import DataOptions, DryRunOptions
from .policy import build_policy, load_tokenizer, placement
from .rl.algorithms import ALGORITHMS
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


def train(cfg: Config, options: DryRunOptions) -> None:
    """`igpo train --dry-run`."""
    _dry_run(cfg, options, train_program.run, is_sft=False)


def sft(cfg: Config, options: DryRunOptions) -> None:
    """`igpo sft --dry-run`."""
    _dry_run(cfg, options, sft_program.run, is_sft=True)


def _dry_run(
    cfg: Config, options: DryRunOptions, program: Callable[[Config], Metrics], *, is_sft: bool
) -> None:
    time_plan.check_tflops(options.tflops)
    shape = model_shape(cfg)
    output.print(_titled("memory of the states, GiB", memory(cfg, shape, is_sft=is_sft), ".2f"))
    work(cfg, shape, options.tflops, is_sft=is_sft)
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
    adapters = sum(x.numel() for x in work_plan.adapters(model, cfg))
    return everything + adapters, adapters


def memory(cfg: Config, shape: MaskedDecoderConfig, *, is_sft: bool) -> dict[str, float]:
    """GiB by part, without activations and logits, which depend on per_device_train_batch_size and the backend."""
    everything, trained = parameters(shape, cfg)
    width = placement(cfg.model)[1].itemsize
    made = ALGORITHMS.get(cfg.rl.algorithm)  # an unknown one is refused by the run itself
    critic = not is_sft and made is not None and made.critique is not None
    copied = not is_sft and cfg.rl.beta != 0 and not cfg.lora.use_lora
    parts = {
        "weights": everything * width,
        "float32 masters of the trained weights": trained * 4 * (width != 4),
        "gradients (float32)": trained * 4,
        "AdamW moments (float32)": trained * 8,
        "reference model": everything * width * copied,
        # as if it had a head and all layers: an upper bound
        "critic: weights, masters, gradients, moments": critic
        * (everything * width + trained * (12 + 4 * (width != 4))),
    }
    gib = {name: size / _GIB for name, size in parts.items() if size}
    return {**gib, "together": sum(gib.values())}


def work(
    cfg: Config, shape: MaskedDecoderConfig, tflops: float | None, *, is_sft: bool
) -> list[time_plan.Line]:
    """Prints passes, FLOP and, with a rate, time of a step and of the run; returns the lines of the step."""
    parts = work_plan.of_sft(cfg, shape) if is_sft else work_plan.of_training(cfg, shape)
    device, dtype = placement(cfg.model)
    rates = time_plan.rates_here(time_plan.measured(), device, dtype)
    found = time_plan.lines(parts, work_plan.layers_of(shape, cfg), rates, tflops)
    step = time_plan.totals(found)
    whole = [replace(x, part=x.part.replace("a step", f"{cfg.train.max_steps:,} steps")) for x in step]  # fmt: skip
    table = Table("work, at most", "passes", "PFLOP", "time")
    for line in (*found, *step):
        table.add_row(*_cells(line, 1))
    for line in whole:
        table.add_row(*_cells(line, cfg.train.max_steps))
    output.print(table)
    place = f"{time_plan.device_name(device)} in {str(dtype).removeprefix('torch.')}"
    for sentence in time_plan.source(parts, rates, tflops, place):
        say(sentence)
    say(
        f"canvases of {work_plan.canvas_length(cfg)} tokens, none ending early; one device; a pass is one sequence "
        "through the model, in updates forward and backward"
    )
    explorer = ALGORITHMS[cfg.rl.algorithm].explorer
    if explorer in work_plan.UNPLANNED and not is_sft:
        say(
            f"not planned: the further rollouts of {cfg.rl.algorithm}, which depend on the first ones"
        )
    return [*found, *step]


def _cells(line: time_plan.Line, steps: int) -> list[str]:
    seconds = None if line.seconds is None else line.seconds * steps
    return [
        line.part, f"{line.forwards * steps:,.0f}", f"{line.flops * steps / 1e15:,.4g}", time_plan.duration(seconds),
    ]  # fmt: skip


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
