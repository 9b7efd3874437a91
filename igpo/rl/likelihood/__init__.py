"""Likelihoods: which canvases are forwarded, and which tokens are read, to score a completion.

A masked-diffusion model has no left-to-right factorisation; every method scores log p(o^k | canvas) on canvases of its
choice. A draw function (`draws`, `elbo`, `trajectory`) makes those choices; `Likelihood` (`evaluate`) evaluates the
same draws under the old policy, the reference and the policy; `combine` makes of them the value an objective sees.
"""

from .combine import add_up, bounds, halves, keep_apart
from .draws import DrawFunction, InnerUpdate, coupled, mask_schedule, mean_field, random_mask
from .elbo import by_count, by_ratio, complements, elbo, in_block, in_pairs
from .evaluate import Likelihood, evaluate
from .trajectory import block_exact, predicted, slices, step_map, step_mc, two_mean_field

__all__ = [
    "DrawFunction",
    "InnerUpdate",
    "Likelihood",
    "add_up",
    "block_exact",
    "bounds",
    "by_count",
    "by_ratio",
    "complements",
    "coupled",
    "elbo",
    "evaluate",
    "halves",
    "in_block",
    "in_pairs",
    "keep_apart",
    "mask_schedule",
    "mean_field",
    "predicted",
    "random_mask",
    "slices",
    "step_map",
    "step_mc",
    "two_mean_field",
]
