"""The policy of a program: its tokenizer, its weights or its shape, LoRA, and the reference it is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from . import models
from .config import Config, ConfigError, ModelConfig
from .models import MaskedDecoder, MaskedDecoderConfig, load_model
from .models.adapters import add_adapters, merged
from .models.packing import WithoutPadding
from .types import Policy, Seed

Reference = Callable[[], AbstractContextManager[Policy]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The tokenizer in tokenizer_name_or_path, else in the model's folder. Raises ConfigError."""
    folder = cfg.tokenizer_name_or_path or cfg.model_name_or_path
    if folder is None:
        raise ConfigError(
            "tokenizer_name_or_path must name a folder when model_name_or_path is none. "
            "Make a tokenizer with `igpo tokenizer`."
        )
    model = cfg.model_name_or_path
    if model is not None and (Path(model) / "adapter_config.json").is_file():
        model = None  # what is beside an adapter was saved complete
    try:
        tokenizer = models.load_tokenizer(folder, model)
    except FileNotFoundError as error:
        raise ConfigError(f"tokenizer_name_or_path: {error}") from error
    for name in ("mask_token", "eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ConfigError(f"tokenizer in {folder!r} must have a {name}, got none.")
    return tokenizer


def canvas_ids(tokenizer: Any) -> dict[str, Any]:
    """What masked_canvases asks of a tokenizer."""
    return {
        "mask_id": tokenizer.mask_token_id,
        "pad_id": tokenizer.pad_token_id,
        "eos_id": tokenizer.eos_token_id,
        "stop_token_ids": models.stop_token_ids(tokenizer),
    }


def require_model(cfg: Config, command: str) -> None:
    """Raises ConfigError unless there is a trained model to ask."""
    if cfg.model.model_name_or_path is None:
        raise ConfigError(
            f"model_name_or_path must name the folder of a model for {command}, got none."
        )


def placement(cfg: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """The device, and the type of the weights that compute (masters are float32 whatever it is)."""
    if cfg.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = torch.device(cfg.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={cfg.device}: torch finds no CUDA device here.")
    if cfg.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, DTYPES[cfg.dtype]


def build_policy(cfg: Config, tokenizer: Any) -> Any:
    """The model that is trained or asked: loaded, or new from (shape, seed); with LoRA when use_lora. In eval mode.

    A folder with a LoRA adapter is loaded as base and adapter, merged. Dropout would make the first on-policy ratio
    differ from 1, so there is none and the mode never changes.
    """
    transformers_logging.disable_progress_bar()  # bars of milliseconds, in the middle of our lines
    device, dtype = placement(cfg.model)
    path = cfg.model.model_name_or_path
    if path is None:
        model = MaskedDecoder.from_seed(_shape(cfg.model, tokenizer), Seed(cfg.train.seed))
        nn.Module.to(model, device, dtype)  # transformers hides the signature
    elif (Path(path) / "adapter_config.json").is_file():
        if cfg.lora.use_lora:
            raise ConfigError(
                f"model_name_or_path: {path!r} holds a LoRA adapter. Name its base model and give "
                "resume_from_checkpoint to go on training it."
            )
        model = merged(path, dtype=dtype, device=device)
    else:
        model = load_model(path, dtype=dtype, device=device)
    _fit_vocabulary(model, tokenizer)
    prepare(model, cfg)
    return (
        add_adapters(model, cfg.lora, Seed(cfg.train.seed)) if cfg.lora.use_lora else model
    ).eval()


def as_scored(policy: Any, cfg: Config) -> Any:
    """The policy as likelihoods and losses see it: with packing, without padding."""
    return WithoutPadding(policy) if cfg.train.packing else policy


def reference_of(policy: Any, cfg: Config) -> Reference:
    """The policy before training, as scored, as a context: LoRA switched off, or a frozen copy."""
    if cfg.lora.use_lora:

        @contextmanager
        def without_adapter() -> Iterator[Policy]:
            with policy.disable_adapter():
                yield as_scored(policy, cfg)

        return without_adapter
    frozen = copy.deepcopy(policy).requires_grad_(False)

    @contextmanager
    def frozen_copy() -> Iterator[Policy]:
        yield as_scored(frozen, cfg)

    return frozen_copy


def _shape(cfg: ModelConfig, tokenizer: Any) -> MaskedDecoderConfig:
    return MaskedDecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def prepare(model: MaskedDecoder, cfg: Config) -> None:
    """Attention backend, activation checkpointing, frozen head. Raises ConfigError."""
    try:
        model.set_attn_implementation(cfg.model.attn_implementation)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if cfg.train.gradient_checkpointing:
        # transformers 5 has renamed it
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if cfg.model.freeze_head:
        (model.get_output_embeddings() or model.get_input_embeddings()).requires_grad_(False)


def _fit_vocabulary(model: MaskedDecoder, tokenizer: Any) -> None:
    """Ids the tokenizer does not have are never drawn. Raises ConfigError when the two do not belong together."""
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
            "they do not belong together."
        )
    if model.config.mask_token_id is None:  # a public config that does not say
        model.config.mask_token_id = tokenizer.mask_token_id
    if tokenizer.mask_token_id != model.config.mask_token_id:
        raise ConfigError(
            f"tokenizer's mask token is {tokenizer.mask_token_id}, the model's "
            f"{model.config.mask_token_id}: they do not belong together."
        )
    model.use_vocabulary(len(tokenizer))
