"""Fused kernels for RL on masked-diffusion language models. This list of names is the op list (OPS contract)."""

from ._dispatch import OPS, BackendError, use_backend
from .masked_cross_entropy import masked_cross_entropy
from .merge_hints import merge_hints
from .token_logprob import token_logprob
from .unmask_step import UnmaskResult, unmask_step, unmask_step_

__all__ = [
    "OPS",
    "BackendError",
    "UnmaskResult",
    "masked_cross_entropy",
    "merge_hints",
    "token_logprob",
    "unmask_step",
    "unmask_step_",
    "use_backend",
]
