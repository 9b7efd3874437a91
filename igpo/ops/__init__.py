"""Fused kernels for RL on masked-diffusion language models. This list of names is the op list (OPS contract)."""

from ._dispatch import OPS, BackendError, use_backend
from .forward_mask import forward_mask
from .keep_top_entropy import keep_top_entropy
from .linear_logprob import linear_logprob
from .linear_masked_cross_entropy import linear_masked_cross_entropy
from .masked_cross_entropy import masked_cross_entropy
from .merge_hints import merge_hints
from .policy_loss import PolicyLoss, policy_loss
from .sample_hint_mask import sample_hint_mask
from .token_logprob import token_logprob
from .unmask_step import UnmaskResult, unmask_step, unmask_step_

__all__ = [
    "OPS",
    "BackendError",
    "PolicyLoss",
    "UnmaskResult",
    "forward_mask",
    "keep_top_entropy",
    "linear_logprob",
    "linear_masked_cross_entropy",
    "masked_cross_entropy",
    "merge_hints",
    "policy_loss",
    "sample_hint_mask",
    "token_logprob",
    "unmask_step",
    "unmask_step_",
    "use_backend",
]
