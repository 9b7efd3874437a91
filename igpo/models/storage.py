"""A folder or hub id becomes a model, and a model a folder: config.json, then weights under their own names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import weights
from .attention import why_not
from .decoder_config import MaskedDecoderConfig
from .hub import folder_of
from .names import Table, tensor_table
from .released import ReleasedConfig

if TYPE_CHECKING:
    from .decoder import MaskedDecoder

# what transformers' Auto classes pass along and is of no concern here
_IGNORED = {
    "_from_auto",
    "trust_remote_code",
    "adapter_kwargs",
    "proxies",
    "force_download",
    "_commit_hash",
}
_HUB = {"revision", "cache_dir", "token", "local_files_only"}


def load(
    cls: Any,
    path_or_id: str | Path,
    *,
    config: MaskedDecoderConfig | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    name: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """See MaskedDecoder.from_pretrained; name: how the model is called, where that is not path_or_id."""
    unknown = sorted(kwargs.keys() - _IGNORED - _HUB)
    if unknown:
        raise TypeError(f"from_pretrained: does not take {', '.join(unknown)}.")
    folder = folder_of(path_or_id, **{k: v for k, v in kwargs.items() if k in _HUB})
    if config is None:
        config = cls.config_class.from_pretrained(folder)
    assert config is not None
    attention = attn_implementation or config._attention or "sdpa"
    reason = why_not(attention, config)
    if reason is not None:
        raise ValueError(f"attn_implementation={attention!r} cannot be used: {reason}.")
    with torch.device("meta"):
        model = cls(config)
    model.attention = attention
    found, table = weights.headers(folder), table_of(model)
    weights.check(found, table, model.state_dict(), folder)
    wanted = dtype or torch_dtype
    if wanted is None or wanted == "auto":
        wanted = weights.saved_dtype(found, folder)
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted)
    nn.Module.to(model, dtype=wanted)  # transformers hides the signature
    _keep_router_bias_float32(model)
    model.to_empty(device=device)
    weights.read(found, table, model.state_dict())
    config.dtype = wanted
    # adapters name their base by it
    model.name_or_path = config._name_or_path = str(name or path_or_id)
    return model.eval()


def _keep_router_bias_float32(model: nn.Module) -> None:
    """Released in float32 or bfloat16; a choice between experts should not hang on its last bits."""
    for module in model.modules():
        bias = module._buffers.get("expert_bias")
        if bias is not None:
            module._buffers["expert_bias"] = bias.float()


def save(model: MaskedDecoder, folder: Path, max_shard_size: int) -> None:
    """See MaskedDecoder.save_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]  # a released config keeps its own
    config.save_pretrained(folder)
    weights.write(folder, table_of(model), model.state_dict(), max_shard_size)


def table_of(model: MaskedDecoder) -> Table:
    config = model.config
    names = config.family.names if isinstance(config, ReleasedConfig) else None
    return tensor_table(names, config, list(model.state_dict()))
