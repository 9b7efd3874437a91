"""Every algorithm as one composition: explorer x advantage x likelihood x objective.

A new paper is a function in the component file where it differs, its name in parts.py, and a line in ALGORITHMS.
Nothing outside this file asks for the name of an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from igpo.config import AlgorithmConfig, RolloutConfig
from igpo.types import Graded

from . import checks
from .explorer import Explorer
from .likelihood import Likelihood
from .objective import Objective
from .parts import (
    ADVANTAGES,
    COMBINES,
    EXPLORERS,
    LIKELIHOODS,
    OBJECTIVES,
    RELEASED_LIKELIHOODS,
    Estimator,
    Grade,
)

__all__ = ["ALGORITHMS", "LIKELIHOODS", "Algorithm", "Composition", "Grade", "build_algorithm"]


@dataclass(frozen=True)
class Algorithm:
    """What a training step calls, in this order.

    explorer(policy, prompts, graded, seed) -> graded
    advantage(graded) -> (B,)
    likelihood.prepare(policy, graded, seed, reference) -> batch
    gradient.accumulate(algorithm, policy, batch, advantages, inner, objective.rows(advantages), size): in it
    likelihood(policy, batch, inner) -> value;   objective(value, batch, advantages, inner, divisor) -> (loss, metrics)
    """

    explorer: Explorer
    advantage: Callable[[Graded], Tensor]
    likelihood: Likelihood
    objective: Objective
    constant_memory: bool = True  # gradient.py


@dataclass(frozen=True)
class Composition:
    """An algorithm as the names of its parts (parts.py): what the configuration leaves open is filled from it."""

    explorer: str
    likelihood: str
    objective: str
    check: Callable[[AlgorithmConfig, RolloutConfig], None] = checks.nothing
    likelihoods: dict[str, Estimator] | None = None  # None: LIKELIHOODS


ALGORITHMS: dict[str, Composition] = {
    # GRPO on a fixed canvas; with p_mask_prompt, token ratio and mask_after_eos it is diffu-GRPO (d1, arXiv:2504.12216)
    "grpo": Composition("none", "mean_field", "clip"),
    # sample-matched GRPO: IGPO's second rollout without hints (eta = 0)
    "grpo_resample": Composition("resampling", "mean_field", "clip"),
    # arXiv:2509.10396, as in the paper
    "igpo": Composition("inpainting", "mean_field", "clip", checks.hints),
    # as in the authors' released code
    "igpo_released": Composition("inpainting", "mean_field", "clip", checks.released, RELEASED_LIKELIHOODS),
    # GRPO with the reference trace itself among the completions of an all-wrong group
    "trace_in_group": Composition("trace", "mean_field", "clip"),
    # the same with IGPO's entropy filter: what the policy did not write is a hint, here all of it
    "trace_as_hints": Composition("trace_as_hints", "mean_field", "clip", checks.hints),
}  # fmt: skip


def build_algorithm(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, *, pad_id: int
) -> Algorithm:
    """The algorithm cfg names, with cfg's choices of advantage, likelihood and objective.

    Raises:
        ValueError: an option is unknown or out of range, or two options contradict each other; the message says
            which to change.
    """
    checks.name("algorithm", cfg.algorithm, ALGORITHMS)
    made = ALGORITHMS[cfg.algorithm]
    cfg = replace(
        _fixed(cfg), likelihood=cfg.likelihood or made.likelihood, objective=cfg.objective or made.objective
    )  # fmt: skip
    likelihoods = made.likelihoods or LIKELIHOODS
    for option, names in (
        ("scale_rewards", ADVANTAGES),
        ("likelihood", likelihoods),
        ("objective", OBJECTIVES),
    ):
        checks.name(option, getattr(cfg, option), names)
    checks.options(cfg)
    made.check(cfg, rollout)
    estimator, objective = likelihoods[str(cfg.likelihood)], OBJECTIVES[str(cfg.objective)](cfg)
    checks.fit(cfg, estimator.level, objective.needs)
    likelihood = Likelihood(
        draw=estimator.build(cfg, rollout),
        num_iterations=cfg.num_iterations,
        needs_reference=objective.needs.reference,
        entropy_filter=cfg.inpaint.entropy_filter,
        mask_after_eos=cfg.mask_after_eos,
        batch_size=rollout.rollout_batch_size,
        combine=COMBINES[objective.needs.draws],
        needs_old=objective.needs.old,
    )
    explorer = EXPLORERS[made.explorer](cfg, rollout, grade, pad_id)
    return Algorithm(
        explorer, ADVANTAGES[cfg.scale_rewards], likelihood, objective, cfg.constant_memory
    )


def _fixed(cfg: AlgorithmConfig) -> AlgorithmConfig:
    """What the released IGPO code cannot be told."""
    if cfg.algorithm != "igpo_released":
        return cfg
    released = replace(
        cfg.inpaint, layout="scaled", exclude_answer=False, trigger="correctness", replace_order="first"
    )  # fmt: skip
    return replace(cfg, inpaint=released, loss_type="released")
