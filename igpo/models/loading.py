"""Reading a saved model back, completely or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .decoder import MaskedDecoder
from .decoder_config import MaskedDecoderConfig


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> MaskedDecoder:
    """The model in a folder that save_pretrained wrote, in eval mode.

    Args:
        path: a folder with config.json and safetensors files.
        dtype: of the parameters; None keeps the dtype they were saved in.
        device: where to put the model.
    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: another kind of model, or weights that are missing, unknown or of another shape.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        what = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"load_model: path must be a folder written by save_pretrained, got {str(folder)!r}: {what}."
        )
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != MaskedDecoderConfig.model_type:
        raise ValueError(
            f"load_model: model_type of {str(folder)!r} must be {MaskedDecoderConfig.model_type!r}, got {kind!r}."
        )
    loaded: Any = MaskedDecoder.from_pretrained(
        folder,
        dtype=dtype or "auto",
        local_files_only=True,
        ignore_mismatched_sizes=True,  # they are refused below, with every other difference
        output_loading_info=True,
    )
    model, info = loaded
    differences = {
        name: sorted(map(str, info[key]))
        for name, key in (
            ("missing", "missing_keys"),
            ("unknown", "unexpected_keys"),
            ("of another shape", "mismatched_keys"),
        )
        if info[key]
    }
    if differences:
        listed = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in differences.items())
        raise ValueError(
            f"load_model: the weights in {str(folder)!r} must be exactly those config.json describes, got {listed}."
        )
    return model.to(device).eval()
