"""The compiled module igpo._C, or the sentence that says why it is not there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

try:
    from igpo import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None
    _reason: str | None = (
        f"igpo._C is not built ({error}); run `pip install --no-build-isolation -e .`"
    )
else:
    _reason = None

DTYPE_TAG = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/simd.h


def _source_id() -> str | None:
    """The build id of the sources beside the package, None when there are none (an installed wheel)."""
    root = Path(__file__).resolve().parents[2]
    csrc, gpu = root / "csrc", root / "kernels" / "gpu"
    if not (csrc / "bindings.cpp").exists():
        return None
    headers = sorted([*csrc.glob("*.h"), *gpu.glob("*.cuh")])
    sources = [*sorted(csrc.glob("*.cpp")), *sorted(gpu.glob("*.cu")), *headers]  # setup.py's order
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sources)).hexdigest()[
        :12
    ]


if _C is not None and _source_id() not in (None, _C.build_id):
    _reason = (
        f"igpo._C was built from other sources (build {_C.build_id}, sources {_source_id()}); "
        "run `pip install --no-build-isolation -e .` again"
    )


def why_not() -> str | None:
    """None when the compiled CPU kernels can be used, else the reason."""
    return _reason


def module() -> ModuleType:
    assert _C is not None, "a backend called igpo._C without asking why_not()"
    return _C


def num_threads() -> int:
    return torch.get_num_threads()


CUDA_DEVICES = ["cuda"]  # tests add "cpu" when they run the CUDA sources on a CPU (tests/cuda)
_cuda: ModuleType | None = getattr(_C, "cuda", None)


@cache
def cuda_why_not() -> str | None:
    """None when the compiled CUDA kernels can be used, else the reason."""
    if _reason is not None:
        return _reason
    if _cuda is None:
        return "igpo._C was built without CUDA (IGPO_BUILD=cuda needs nvcc)"
    return _cuda.unavailable() or None


def addresses(args: Iterable[object]) -> tuple:
    """Arguments as igpo._C takes them: tensors as addresses, None as 0."""
    return tuple(
        x.data_ptr() if isinstance(x, torch.Tensor) else 0 if x is None else x for x in args
    )


def cuda(kernel: str, device: torch.device, *args: object) -> Any:
    """Launches igpo._C.cuda.<kernel> on the current stream of `device`; its result, which only host functions have."""
    index = device.index or 0
    stream = torch._C._cuda_getCurrentRawStream(index) if device.type == "cuda" else 0
    return getattr(_cuda, kernel)(*addresses(args), index, stream)
