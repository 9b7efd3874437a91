"""Fused kernels for RL on masked-diffusion language models. This list of names is the op list (OPS contract)."""

from ._dispatch import OPS, BackendError, use_backend
from .forward_mask import forward_mask
from .keep_top_entropy import keep_top_entropy
from .merge_hints import merge_hints
from .policy_loss import PolicyLoss, policy_loss
from .sample_hint_mask import sample_hint_mask

__all__ = [
    "OPS",
    "BackendError",
    "PolicyLoss",
    "forward_mask",
    "keep_top_entropy",
    "merge_hints",
    "policy_loss",
    "sample_hint_mask",
    "use_backend",
]
