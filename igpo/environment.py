"""What a result depends on beside its configuration: versions, machine, backends. Needs torch and numpy only."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import igpo

PACKAGES = (
    "torch", "numpy", "transformers", "tokenizers", "safetensors", "peft", "rich", "PyYAML", "tensorboard", "triton"
)  # fmt: skip


def versions() -> dict[str, str]:
    """Package -> installed version, of those that are installed."""
    found = {"igpo": igpo.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Platform, processor, threads, CUDA devices and the CUDA version torch was built with."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """The commit of igpo's checkout, with "+changes" where tracked files differ; None when it is installed."""
    root = Path(igpo.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def backends() -> list[str]:
    """The rows of `python -m igpo.ops`: "op backend: runs here | why not"."""
    from .ops import OPS
    from .ops.__main__ import rows

    return [f"{op} {name}: {here}" for item in OPS.values() for op, name, here, _ in rows(item)]


def report() -> dict[str, Any]:
    return {
        "versions": versions(),
        "machine": machine(),
        "git_commit": git_commit(),
        "backends": backends(),
    }
