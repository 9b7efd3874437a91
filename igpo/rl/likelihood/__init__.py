"""Likelihoods: which canvases are forwarded, and which tokens are read, to score a completion.

A masked-diffusion model has no left-to-right factorisation; every method scores log p(o^k | canvas) on canvases of its
choice. A draw function (`draws`, `trajectory`) makes those choices; `Likelihood` (`evaluate`) evaluates the same draws
under the old policy, the reference and the policy, and combines them into the value that an objective sees.
"""

from .draws import DrawFunction, InnerUpdate, mask_schedule, mean_field, random_mask
from .evaluate import Likelihood, add_up, evaluate, keep_apart
from .trajectory import step_map

__all__ = [
    "DrawFunction",
    "InnerUpdate",
    "Likelihood",
    "add_up",
    "evaluate",
    "keep_apart",
    "mask_schedule",
    "mean_field",
    "random_mask",
    "step_map",
]
