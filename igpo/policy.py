"""The policy of a program: its tokenizer, its weights or its shape, LoRA, and the reference it is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from .config import Config, ConfigError, LoraConfig, ModelConfig
from .models import MaskedDecoder, MaskedDecoderConfig, load_model
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
    if not Path(folder).is_dir():
        raise ConfigError(f"tokenizer_name_or_path: there is no folder {folder!r}.")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for name in ("mask_token", "eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ConfigError(f"tokenizer in {folder!r} must have a {name}, got none.")
    return tokenizer


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
        model = _merged(path, device, dtype)
    else:
        model = load_model(path, dtype=dtype, device=device)
    _check_vocabulary(model, tokenizer)
    return (_add_lora(model, cfg.lora, Seed(cfg.train.seed)) if cfg.lora.use_lora else model).eval()


def reference_of(policy: Any, cfg: Config) -> Reference:
    """The policy before training, as a context: LoRA switched off, or a frozen copy."""
    if cfg.lora.use_lora:

        @contextmanager
        def without_adapter() -> Iterator[Policy]:
            with policy.disable_adapter():
                yield policy

        return without_adapter
    frozen = copy.deepcopy(policy).requires_grad_(False)

    @contextmanager
    def frozen_copy() -> Iterator[Policy]:
        yield frozen

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


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
            "they do not belong together."
        )
    if tokenizer.mask_token_id != model.config.mask_token_id:
        raise ConfigError(
            f"tokenizer's mask token is {tokenizer.mask_token_id}, the model's "
            f"{model.config.mask_token_id}: they do not belong together."
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs peft: pip install 'igpo[lora]'.") from error
    return peft


def _merged(path: str, device: torch.device, dtype: torch.dtype) -> Any:
    peft = _peft()
    base = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
    model = load_model(base, dtype=dtype, device=device)
    return peft.PeftModel.from_pretrained(model, path).merge_and_unload()


def _add_lora(model: MaskedDecoder, cfg: LoraConfig, seed: Seed) -> Any:
    """The model with adapters: A uniform in +-1/sqrt(fan in) from the seed, B zero. The base is frozen."""
    peft = _peft()
    adapters = peft.LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=0.0, target_modules=_targets(model, cfg)
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:  # peft drew it from torch's global generator
                bound = parameter.shape[1] ** -0.5
                draws = (
                    seed.named(f"lora/{name}").generator().uniform(-bound, bound, parameter.shape)
                )
                parameter.copy_(torch.from_numpy(draws))
    return wrapped


def _targets(model: MaskedDecoder, cfg: LoraConfig) -> list[str]:
    """Full names of the linear layers that get adapters. A target that names none is an error."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    chosen: list[str] = []
    for target in cfg.lora_target_modules:
        matches = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matches:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"lora_target_modules: {target!r} matches no linear layer. There are: {', '.join(kinds)}."
            )
        chosen += matches
    return sorted(set(chosen)) if cfg.lora_target_modules else linear
