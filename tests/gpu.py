"""Backends under test: forced, on the device they run on. Without a GPU, Triton is interpreted and CUDA emulated."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from igpo.ops import OPS, _native, use_backend

DEVICE = torch.device(os.environ.get("IGPO_TEST_DEVICE", "cpu"))


def is_slow(backend: str) -> bool:
    """Whether the backend is interpreted or emulated here: tests then take few and short rows."""
    return backend in ("triton", "cuda") and DEVICE.type == "cpu"


def on_cpu_tensors() -> tuple[str, ...]:
    """Backends for property tests whose tensors are on the CPU: the emulated CUDA sources among them."""
    if DEVICE.type != "cpu":
        return ("reference", "cpu")
    emulate()
    return ("reference", "cpu", "cuda")


@contextmanager
def on_backend(name: str, about: str) -> Iterator[None]:
    """Forces backend `name`; `about`: the op, or a longer name that begins with it. Skips where it cannot run."""
    op = max((op for op in OPS if about.startswith(op)), key=len)
    rows = {row.name: row for row in OPS[op].backends}
    assert name in rows, f"{op} has no {name} row"
    if name == "cuda" and DEVICE.type == "cpu":
        emulate()
    made_there = nullcontext() if name == "cpu" or DEVICE.type == "cpu" else DEVICE
    if name == "cpu" and _native.why_not():
        pytest.fail(f"the CPU kernels cannot be tested: {_native.why_not()}")
    if reason := rows[name].unavailable():
        pytest.skip(reason)
    with use_backend(name), made_there:
        yield


@cache
def emulate() -> None:
    """From here on the cuda rows take CPU tensors and run on the emulator (tests/cuda)."""
    _native._cuda = emulated()
    _native.CUDA_DEVICES.append("cpu")
    _native.cuda_why_not.cache_clear()


@cache
def emulated() -> ModuleType:
    path = Path(__file__).parent / "cuda" / "build.py"
    spec = importlib.util.spec_from_file_location("emulated_build", path)
    assert spec
    assert spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.load()
