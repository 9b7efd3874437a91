"""Fused kernels for RL on masked-diffusion language models. This list of names is the op list (OPS contract)."""

from ._dispatch import OPS, BackendError, use_backend
from .linear_logprob import linear_logprob
from .linear_masked_cross_entropy import linear_masked_cross_entropy
from .masked_cross_entropy import masked_cross_entropy
from .merge_hints import merge_hints
from .token_logprob import token_logprob

__all__ = [
    "OPS",
    "BackendError",
    "linear_logprob",
    "linear_masked_cross_entropy",
    "masked_cross_entropy",
    "merge_hints",
    "token_logprob",
    "use_backend",
]
