"""Fused kernels for RL on masked-diffusion language models. This list of names is the op list (OPS contract)."""

from ._dispatch import OPS, BackendError, use_backend
from .merge_hints import merge_hints
from .unmask_step import UnmaskResult, unmask_step, unmask_step_

__all__ = [
    "OPS",
    "BackendError",
    "UnmaskResult",
    "merge_hints",
    "unmask_step",
    "unmask_step_",
    "use_backend",
]
