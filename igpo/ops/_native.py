"""The compiled module igpo._C, or the sentence that says why it is not there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

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
