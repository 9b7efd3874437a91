"""Safetensors files: read into a model one tensor at a time, written back under the names they came with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .names import Table

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_SAMPLES, _SAMPLE_BYTES = 64, 2**16  # of a file's fingerprint; chosen: 4 MiB, all of a small file
_NAMED = 8  # names an error lists of each kind


class Header(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


def headers(folder: Path) -> dict[str, Header]:
    """What the weight files of a folder hold, without reading it. Raises FileNotFoundError."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    else:
        files = [SINGLE]
    found: dict[str, Header] = {}
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"load_model: {str(folder)!r} must hold {name}, got no such file. Weights are read from safetensors "
                "files only."
            )
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(key)
                found[key] = Header(folder / name, tuple(part.get_shape()), part.get_dtype())
    return found


def fingerprint(folder: Path) -> str:
    """Tells checkpoints apart in a moment: a digest of what describes them, and of samples of every weight file."""
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(size * sample // _SAMPLES)
                found.update(stream.read(_SAMPLE_BYTES))
    for file in sorted(folder.glob("*config.json")):
        found.update(file.read_bytes())
    return found.hexdigest()


def saved_dtype(found: Mapping[str, Header], folder: Path) -> torch.dtype:
    """The one floating dtype of a checkpoint's parameters. Raises ValueError when there are several."""
    kinds = {h.dtype for name, h in found.items() if not name.endswith("expert_bias")}
    if len(kinds) != 1 or not kinds <= FLOATS.keys():
        raise ValueError(
            f"load_model: the weights in {str(folder)!r} must be of one dtype to be kept as saved, got "
            f"{', '.join(sorted(kinds))}. Give dtype."
        )
    return FLOATS[kinds.pop()]


def check(
    found: Mapping[str, Header], table: Table, parameters: Mapping[str, Tensor], folder: Path
) -> None:
    """Raises ValueError, one for all differences: the files hold every parameter, nothing else, in its shape."""
    wrong = [
        f"{name} {list(found[name].shape)} for {list(shape)}"
        for name, shape in ((n, _shape(table, n, parameters)) for n in table if n in found)
        if found[name].shape != shape
    ]
    differences = {
        "missing": sorted(table.keys() - found.keys()),
        "unknown": sorted(found.keys() - table.keys()),
        "of another shape": sorted(wrong),
    }
    listed = "; ".join(
        f"{kind}: {', '.join(names[:_NAMED])}"
        + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        for kind, names in differences.items()
        if names
    )
    if listed:
        raise ValueError(
            f"load_model: the weights in {str(folder)!r} must be exactly those config.json describes, got {listed}."
        )


def _shape(table: Table, name: str, parameters: Mapping[str, Tensor]) -> tuple[int, ...]:
    views = [piece.view(parameters) for piece in table[name]]
    return (sum(len(view) for view in views), *views[0].shape[1:])


@torch.no_grad()
def read(found: Mapping[str, Header], table: Table, parameters: Mapping[str, Tensor]) -> None:
    """Copies every tensor into its place, casting to the place's dtype; one tensor is in memory beside the model."""
    for path in sorted({header.file for header in found.values()}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor, start = file.get_tensor(name), 0
                for piece in table[name]:
                    view = piece.view(parameters)
                    view.copy_(tensor[start : start + len(view)])
                    start += len(view)


def write(
    folder: Path, table: Table, parameters: Mapping[str, Tensor], max_shard_size: int | str
) -> None:
    """model.safetensors, or shards of at most max_shard_size (one tensor at least) and their index.

    A shard is held in memory while it is written. Weight files that were in the folder are removed first.
    """
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    sizes = {name: _bytes(pieces, parameters) for name, pieces in table.items()}
    shards = list(_shards(sizes, as_bytes(max_shard_size)))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _joined(table[name], parameters) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": places,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _bytes(pieces: tuple, parameters: Mapping[str, Tensor]) -> int:
    return sum(view.numel() * view.element_size() for view in (p.view(parameters) for p in pieces))


def _joined(pieces: tuple, parameters: Mapping[str, Tensor]) -> Tensor:
    views = [piece.view(parameters).detach().cpu() for piece in pieces]
    # a clone of its own: safetensors refuses tensors that share memory, as stacked experts do
    return (
        views[0].clone(memory_format=torch.contiguous_format)
        if len(views) == 1
        else torch.cat(views)
    )


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def as_bytes(size: int | str) -> int:
    """5000, "5GB", "200MB" -> bytes. Raises ValueError."""
    if isinstance(size, int):
        return size
    parsed = re.fullmatch(r"(\d+) ?(KB|MB|GB)", size)
    if parsed is None:
        raise ValueError(
            f"save_pretrained: max_shard_size must be bytes or like '5GB' or '200MB', got {size!r}."
        )
    return int(parsed[1]) * _UNITS[parsed[2]]
