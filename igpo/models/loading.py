"""Reading a saved or public model, completely or not at all; and making transformers' Auto classes do the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from . import released, storage
from .decoder import MaskedDecoder
from .decoder_config import MaskedDecoderConfig
from .families import family_of
from .hub import folder_of


class LladaDecoder(MaskedDecoder):
    config_class = released.LladaConfig


class MmadaDecoder(MaskedDecoder):
    config_class = released.MmadaConfig


class DreamDecoder(MaskedDecoder):
    config_class = released.DreamConfig


class SdarDecoder(MaskedDecoder):
    config_class = released.SdarConfig


class SdarMoeDecoder(MaskedDecoder):
    config_class = released.SdarMoeConfig


class Llada2MoeDecoder(MaskedDecoder):
    config_class = released.Llada2MoeConfig


CLASSES: dict[str, tuple[type[MaskedDecoderConfig], type[MaskedDecoder]]] = {
    config.model_type: (config, cls)
    for config, cls in (
        (MaskedDecoderConfig, MaskedDecoder),
        (released.LladaConfig, LladaDecoder),
        (released.MmadaConfig, MmadaDecoder),
        (released.DreamConfig, DreamDecoder),
        (released.SdarConfig, SdarDecoder),
        (released.SdarMoeConfig, SdarMoeDecoder),
        (released.Llada2MoeConfig, Llada2MoeDecoder),
    )
}

# a registered class outside transformers is taken before a repository's own code, which therefore never runs
for _type, (_config, _cls) in CLASSES.items():
    AutoConfig.register(_type, _config, exist_ok=True)
    for _auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        _auto.register(_config, _cls, exist_ok=True)


def load_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    block_length: int | None = None,
    attn_implementation: str = "sdpa",
    **hub: Any,
) -> MaskedDecoder:
    """The model in a folder or on the hub, in eval mode: one of ours, or a public checkpoint (docs/models.md).

    The weights are read from safetensors files straight into their place, one tensor at a time; no code of a
    repository is run.

    Args:
        path_or_id: a folder with config.json and safetensors files, or "owner/name" on the Hugging Face hub.
        dtype: of the parameters; None keeps the dtype they were saved in.
        device: where to put the model.
        block_length: makes attention block-causal with blocks of this length; None is what the checkpoint was trained
            with (full attention for LLaDA and Dream).
        attn_implementation: sdpa, flex_attention or flash_attention_2.
        hub: revision, cache_dir, token, local_files_only, for a hub id.
    Returns:
        A MaskedDecoder: model(input_ids, attention_mask, position_ids).logits as the released code has them,
        model.hidden(…) and model.head_weight apart.
    Raises:
        FileNotFoundError: no such folder, or files missing in it.
        ValueError: another kind of model, or weights that are missing, unknown or of another shape.
    """
    folder = folder_of(path_or_id, **hub)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = values.get("model_type")
    if kind != MaskedDecoderConfig.model_type:
        family_of(values)
    config_class, cls = CLASSES[kind]
    config = config_class.from_dict(values)
    if block_length is not None:
        config.block_length = block_length
        config._check_rotation()
    return storage.load(
        cls, folder, config=config, dtype=dtype, device=device, attn_implementation=attn_implementation,
        name=path_or_id,
    )  # fmt: skip
