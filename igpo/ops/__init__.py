"""Fused kernels for RL on masked-diffusion language models. This list of names is the op list (OPS contract)."""

from ._dispatch import OPS, BackendError, use_backend
from .masked_cross_entropy import masked_cross_entropy
from .merge_hints import merge_hints
from .token_logprob import token_logprob

__all__ = [
    "OPS",
    "BackendError",
    "masked_cross_entropy",
    "merge_hints",
    "token_logprob",
    "use_backend",
]
