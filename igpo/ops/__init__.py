"""Fused kernels for RL on masked-diffusion language models. This list of names is the op list (OPS contract)."""

from ._dispatch import OPS, BackendError, use_backend
from .merge_hints import merge_hints

__all__ = [
    "OPS",
    "BackendError",
    "merge_hints",
    "use_backend",
]
