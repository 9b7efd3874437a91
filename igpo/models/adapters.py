"""LoRA through peft: where adapters go, how they start, and adapters trained here or on a family's public code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from igpo.config import ConfigError, LoraConfig
from igpo.types import Seed

from .decoder import MaskedDecoder
from .loading import load_model
from .released import ReleasedConfig
from .storage import table_of

_PREFIX = "base_model.model."  # peft's, of every key in adapter_model.safetensors


def peft_module() -> Any:
    """peft. Raises ConfigError when it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs peft: pip install 'igpo[lora]'.") from error
    return peft


def add_adapters(model: MaskedDecoder, cfg: LoraConfig, seed: Seed) -> Any:
    """The model with adapters: A uniform in +-1/sqrt(fan in) from the seed, B zero. The base is frozen."""
    peft = peft_module()
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
    """Full names of the linear layers that get adapters. A target that names none is an error.

    Names of the public family are understood too (LLaDA: attn_out, ff_proj, ff_out, of which the last is not the head).
    """
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    config = model.config
    chosen: list[str] = []
    for target in cfg.lora_target_modules:
        theirs = config.family.names.linear(target) if isinstance(config, ReleasedConfig) else []
        wanted = theirs or [target]
        matches = [name for name in linear if name in wanted or name.rpartition(".")[2] in wanted]
        if not matches:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"lora_target_modules: {target!r} matches no linear layer. There are: {', '.join(kinds)}."
            )
        chosen += matches
    return sorted(set(chosen)) if cfg.lora_target_modules else linear


def merged(path: str, *, dtype: torch.dtype, device: torch.device) -> MaskedDecoder:
    """The base model of an adapter folder with the adapter merged in; its keys may be those of the public code.

    Raises:
        ConfigError: a tensor of the adapter has no place, or the adapter's kind is not plain LoRA on linear layers.
    """
    peft = peft_module()
    saved = peft.PeftConfig.from_pretrained(path)
    model = load_model(saved.base_model_name_or_path, dtype=dtype, device=device)
    weights = _renamed(peft.load_peft_weights(path, device=str(device)), model)
    adapted = {key.removeprefix(_PREFIX).partition(".lora_")[0] for key in weights}
    if (
        saved.peft_type != "LORA"
        or saved.rank_pattern
        or saved.alpha_pattern
        or saved.modules_to_save
    ):
        raise ConfigError(
            f"{path!r}: the adapter must be LoRA of one rank on linear layers, got {saved.peft_type} with "
            f"rank_pattern={saved.rank_pattern}, alpha_pattern={saved.alpha_pattern}, "
            f"modules_to_save={saved.modules_to_save}."
        )
    places = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not adapted <= places:
        raise ConfigError(
            f"{path!r}: the adapter must fit the model, got tensors for {', '.join(sorted(adapted - places)[:8])}."
        )
    saved.target_modules = adapted
    wrapped = peft.get_peft_model(model, saved, autocast_adapter_dtype=False)
    # peft only warns about keys it does not place, and the model would come out without its adapter
    result = peft.set_peft_model_state_dict(wrapped, weights)
    lost = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]
    if lost:
        raise ConfigError(
            f"{path!r}: the adapter must be complete, got {', '.join(lost[:8])} wrong."
        )
    return wrapped.merge_and_unload()


def _renamed(weights: Mapping[str, Tensor], model: MaskedDecoder) -> dict[str, Tensor]:
    """Keys of an adapter trained on the public class in our names; our own stay."""
    ours = {
        released.removesuffix(".weight"): pieces[0].name.removesuffix(".weight")
        for released, pieces in table_of(model).items()
        if len(pieces) == 1
    }
    renamed = {}
    for key, tensor in weights.items():
        module, lora, rest = key.removeprefix(_PREFIX).partition(".lora_")
        renamed[f"{_PREFIX}{ours.get(module, module)}{lora}{rest}"] = tensor
    return renamed
