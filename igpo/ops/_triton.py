"""The Triton kernels (kernels/gpu/<op>.py, installed as igpo.kernels), imported when first used: triton is optional."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache

# with TRITON_INTERPRET=1 (set before triton is imported) kernels run in Python, on CPU tensors too: slow, for tests
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")


@cache
def why_not() -> str | None:
    """None when Triton can be imported, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def launcher(op: str, phase: str) -> Callable:
    """The function `phase` of igpo.kernels.<op>."""

    def run(*args):
        return getattr(importlib.import_module(f"igpo.kernels.{op}"), phase)(*args)

    return run
