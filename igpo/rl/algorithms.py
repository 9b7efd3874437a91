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
from .critique import Critique
from .estimators import LIKELIHOODS, RELEASED_LIKELIHOODS, Estimator
from .explorer import Explorer
from .likelihood import Likelihood
from .objective import Objective
from .parts import (
    ADVANTAGES,
    ASKING_OLD,
    COMBINES,
    CRITIQUES,
    EXPLORERS,
    OBJECTIVES,
    OWN_ADVANTAGES,
    REWEIGHS,
    Grade,
    Reweigh,
)
from .reweigh import unchanged

__all__ = ["ALGORITHMS", "LIKELIHOODS", "Algorithm", "Composition", "Grade", "build_algorithm"]


@dataclass(frozen=True)
class Algorithm:
    """What a training step calls, in this order.

    critique.roll_out(network, policy, canvas, cfg, seed) -> rollouts, where there is one: instead of denoise
    explorer(policy, prompts, graded, seed) -> graded
    advantage(graded) -> (B,)
    likelihood.prepare(policy, graded, seed, reference) -> batch
    critique.judge(network, policy, prompts, graded, batch, advantages, seed) -> advantages, lessons, metrics
    reweigh(graded, batch, advantages, inner) -> advantages of that inner update
    gradient.accumulate(algorithm, policy, batch, advantages, inner, objective.rows(advantages), size): in it
    likelihood(policy, batch, inner) -> value;   objective(value, batch, advantages, inner, divisor) -> (loss, metrics)
    """

    explorer: Explorer
    advantage: Callable[[Graded], Tensor]
    likelihood: Likelihood
    objective: Objective
    constant_memory: bool = True  # gradient.py
    reweigh: Reweigh = unchanged
    critique: Critique | None = (
        None  # of the run's critic (igpo.critic.build_critic); None: it has none
    )


@dataclass(frozen=True)
class Composition:
    """An algorithm as the names of its parts (parts.py): what the configuration leaves open is filled from it."""

    explorer: str
    likelihood: str
    objective: str
    check: Callable[[AlgorithmConfig, RolloutConfig], None] = checks.nothing
    likelihoods: dict[str, Estimator] | None = None  # None: LIKELIHOODS
    advantage: str | None = None  # of OWN_ADVANTAGES; None: as scale_rewards says
    reweigh: str = "none"
    critique: str | None = None  # of CRITIQUES: the algorithm has a critic


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
    # arXiv:2510.04019: Monte Carlo over denoise steps, each with a token ratio
    "agrpo": Composition("none", "step_mc", "clip_draws"),
    # arXiv:2512.03759: sequence ratio of coupled ELBO draws, k2 of the sequence
    "espo": Composition("none", "elbo_pairs", "clip"),
    # arXiv:2510.11683: a bound of the ELBO ratio that is a sum over draws
    "bgpo": Composition("none", "elbo", "boundary"),
    # arXiv:2507.08838: likelihood weighted by softmax(A) - softmax(-A)
    "wd1": Composition("none", "mean_field", "likelihood", advantage="softmax_difference"),
    # arXiv:2510.08233: cross-entropy to the target p_ref exp(r/alpha) by importance weights
    "dmpo": Composition("none", "elbo_complements", "cross_entropy", advantage="reward", reweigh="target"),
    # arXiv:2510.09541: lower bound for good, mixture with an upper bound for bad completions
    "spg": Composition("none", "elbo_blocks", "sandwich"),
    # arXiv:2505.15809 (MMaDA): masked tokens at mask ratios spread over the inner updates
    "unigrpo": Composition("none", "random_mask", "clip"),
    # arXiv:2506.20639 (DiffuCoder): a random mask and its complement
    "coupled_grpo": Composition("none", "coupled", "clip"),
    # arXiv:2509.06949: every slice of the recorded trajectory
    "tracerl": Composition("none", "slices", "clip_draws"),
    # the same with its value model: advantages by GAE over the slices
    "tracerl_value": Composition("none", "slices", "clip_draws", critique="value"),
    # arXiv:2508.14313: the log-odds of a discriminator of traces and rollouts are the reward of a step
    "airl_s": Composition("none", "slices", "clip_draws", critique="discriminator"),
    # arXiv:2512.22234 (DiRL): the trajectory's own likelihood, a step of all blocks in one pass (block-causal models)
    "dipo": Composition("none", "block_exact", "clip"),
    # arXiv:2510.02212: two canvases, corrected for the real sampler
    "diffpo": Composition("none", "two_mean_field", "clip", reweigh="behaviour"),
    # the same with the bound of its entropy-bounded sampler, trained jointly
    "diffpo_joint": Composition("none", "two_mean_field", "clip", checks.bounded, None, None, "behaviour", "threshold"),
    # arXiv:2506.14731 (Ring-lite): GRPO whose loss is divided by a budget of tokens
    "c3po": Composition("none", "mean_field", "clip", checks.budget),
    # arXiv:2505.15311: squared trajectory Bellman residual
    "tbrm": Composition("none", "elbo", "bellman", advantage="reward"),
    # arXiv:2505.19223: DPO with ELBOs on shared draws; pairs of a dataset, or a group's best and worst completions
    "vrpo": Composition("none", "elbo", "preference", advantage="best_and_worst"),
    # arXiv:2507.08838: wd1 on the predictions made along the way
    "wd1pp": Composition("predictions", "predicted", "likelihood", advantage="softmax_difference"),
    # arXiv:2508.13148: every graded prediction has an advantage of its own
    "mdpo": Composition("step_rewards", "predicted_steps", "clip_draws", advantage="of_predictions"),
    # arXiv:2410.01679: Monte Carlo values at block boundaries
    "vineppo": Composition("vine", "slices", "clip_draws", advantage="of_tokens"),
    # arXiv:2402.16181: the fills of a block weighted by their values
    "linvit": Composition("candidates", "predicted_blocks", "likelihood", advantage="of_predictions"),
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
    checks.name("scale_rewards", cfg.scale_rewards, ADVANTAGES)
    checks.name("likelihood", cfg.likelihood, likelihoods)
    checks.name("objective", cfg.objective, OBJECTIVES)
    checks.options(cfg)
    made.check(cfg, rollout)
    estimator, objective = likelihoods[str(cfg.likelihood)], OBJECTIVES[str(cfg.objective)](cfg)
    checks.fit(cfg, estimator, objective, made.advantage, made.explorer)
    checks.replayed(cfg, rollout, estimator)
    checks.fits_budget(cfg, rollout)
    checks.sampled(cfg, rollout)
    checks.critic(cfg, estimator, objective, made.critique)
    likelihood = replace(
        _likelihood(cfg, rollout, estimator, objective, made),
        on_support=checks.scored_over_support(cfg, rollout, estimator),
    )
    return Algorithm(
        explorer=EXPLORERS[made.explorer](cfg, rollout, grade, pad_id),
        advantage=OWN_ADVANTAGES[made.advantage](cfg) if made.advantage else ADVANTAGES[cfg.scale_rewards],
        likelihood=likelihood,
        objective=objective,
        constant_memory=cfg.constant_memory,
        reweigh=REWEIGHS[made.reweigh](cfg),
        critique=CRITIQUES[made.critique](cfg, rollout, likelihood, pad_id) if made.critique else None,
    )  # fmt: skip


def _likelihood(
    cfg: AlgorithmConfig, rollout: RolloutConfig, estimator: Estimator, objective: Objective, made: Composition
) -> Likelihood:  # fmt: skip
    needs, targeted = objective.needs, made.reweigh == "target"
    asked = made.reweigh != "none" or made.critique in ASKING_OLD
    return Likelihood(
        draw=estimator.build(cfg, rollout),
        num_iterations=cfg.num_iterations,
        needs_reference=needs.reference or targeted,
        entropy_filter=cfg.inpaint.entropy_filter,
        mask_after_eos=cfg.mask_after_eos,
        batch_size=rollout.rollout_batch_size,
        combine=COMBINES[needs.draws](cfg),
        needs_old=needs.old or asked,
        always_old=asked,
        once=targeted,
        temperature=cfg.draws.likelihood_temperature,
        block_length=rollout.block_length if estimator.block_causal else None,
        token_budget=cfg.method.token_budget if cfg.loss_type == "budget" else None,
    )


def _fixed(cfg: AlgorithmConfig) -> AlgorithmConfig:
    """What the released IGPO code cannot be told."""
    if cfg.algorithm != "igpo_released":
        return cfg
    released = replace(
        cfg.inpaint, layout="scaled", exclude_answer=False, trigger="correctness", replace_order="first"
    )  # fmt: skip
    return replace(cfg, inpaint=released, loss_type="released")
