"""Every algorithm as one composition: explorer x advantage x likelihood x objective.

A new paper is a function in the component file where it differs, and a line in ALGORITHMS. Nothing outside this file
asks for the name of an algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from igpo.config import AlgorithmConfig, InpaintConfig, RolloutConfig
from igpo.rollout import pseudo_order
from igpo.types import Graded, Prompt, Rollouts

from .advantage import centred, leave_one_out, z_score
from .explorer import Explorer, InpaintingExplorer, TraceExplorer, no_exploration, original_layout
from .likelihood import DrawFunction, Likelihood, mean_field, random_mask, step_map
from .objective import LOSS_TYPES, Objective
from .released_layout import scaled_layout

Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]
DrawBuilder = Callable[[AlgorithmConfig, RolloutConfig], DrawFunction]

UNIGRPO_LEVELS = 1000  # noise levels T of the mask schedule (arXiv:2505.15809)
RELEASED_FIRST_LEVEL = 30  # smallest t_0 of the released IGPO code's schedule, of diffusion_steps


@dataclass(frozen=True)
class Algorithm:
    """What a training step calls, in this order.

    explorer(policy, prompts, graded, seed) -> graded
    advantage(graded) -> (B,)
    likelihood.prepare(policy, graded, seed, reference) -> batch;   likelihood(policy, batch, inner) -> (B, L)
    rows = objective.rows(advantages);   objective.divisor(batch, rows, inner)
    objective(logprob, batch, advantages, inner, divisor) -> (loss, metrics)
    """

    explorer: Explorer
    advantage: Callable[[Graded], Tensor]
    likelihood: Likelihood
    objective: Objective


def build_algorithm(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, *, pad_id: int
) -> Algorithm:
    """The algorithm cfg names, with cfg's choices of advantage, likelihood and objective.

    Raises:
        ValueError: an option is unknown or out of range, or two options contradict each other; the message says
            which to change.
    """
    _require(cfg.algorithm in ALGORITHMS, "algorithm", _one_of(ALGORITHMS), cfg.algorithm)
    _check_options(cfg)
    _check_inpaint(cfg.inpaint)
    return ALGORITHMS[cfg.algorithm](cfg, rollout, grade, pad_id)


def grpo(cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int) -> Algorithm:
    """GRPO on a fixed canvas; with p_mask_prompt, token ratio and mask_after_eos it is diffu-GRPO (d1)."""
    return _compose(cfg, rollout, no_exploration)


def grpo_resample(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Algorithm:
    """Sample-matched GRPO: IGPO's second rollout without hints (eta = 0)."""
    without = replace(cfg.inpaint, eta_low=0.0, eta_high=0.0)
    return _compose(cfg, rollout, InpaintingExplorer(without, rollout, grade, original_layout))


def igpo(cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int) -> Algorithm:
    """IGPO as in the paper (arXiv:2509.10396)."""
    _check_hints(cfg)
    explorer = InpaintingExplorer(cfg.inpaint, rollout, grade, LAYOUTS[cfg.inpaint.layout])
    return _compose(cfg, rollout, explorer)


def igpo_released(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Algorithm:
    """IGPO as in the authors' released code; fixes layout, exclude_answer, trigger, replace_order and loss_type."""
    released = replace(
        cfg.inpaint, layout="scaled", exclude_answer=False, trigger="correctness", replace_order="first"
    )  # fmt: skip
    cfg = replace(cfg, inpaint=released, loss_type="released")
    _check_hints(cfg)
    _check_released(cfg, rollout)
    explorer = InpaintingExplorer(released, rollout, grade, scaled_layout)
    return _compose(cfg, rollout, explorer, LIKELIHOODS | {"random_mask": _released_random_mask})


def trace_in_group(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Algorithm:
    """GRPO with the reference trace itself among the completions of an all-wrong group."""
    return _compose(cfg, rollout, TraceExplorer(cfg.inpaint, rollout, grade, pad_id))


def trace_as_hints(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Algorithm:
    """trace_in_group with IGPO's entropy filter: what the policy did not write is a hint, here all of it."""
    _check_hints(cfg)
    explorer = TraceExplorer(cfg.inpaint, rollout, grade, pad_id, as_hints=True)
    return _compose(cfg, rollout, explorer)


ALGORITHMS = {
    "grpo": grpo,
    "grpo_resample": grpo_resample,
    "igpo": igpo,
    "igpo_released": igpo_released,
    "trace_in_group": trace_in_group,
    "trace_as_hints": trace_as_hints,
}


def _mean_field(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return partial(
        mean_field,
        num_iterations=cfg.num_iterations,
        p_mask_prompt=cfg.p_mask_prompt,
        hint_mode=cfg.hint_mode,
    )


def _random_mask(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    lowest = max(1, math.ceil(cfg.min_mask_ratio * UNIGRPO_LEVELS))
    return partial(
        random_mask,
        num_iterations=cfg.num_iterations,
        num_levels=UNIGRPO_LEVELS,
        first_level=(lowest, UNIGRPO_LEVELS - 1),
        hint_mode=cfg.hint_mode,
    )


def _released_random_mask(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return partial(
        random_mask,
        num_iterations=cfg.num_iterations,
        num_levels=rollout.diffusion_steps,
        first_level=(RELEASED_FIRST_LEVEL, rollout.diffusion_steps - 2),
        exact=False,
        score_visible=True,
    )


def _step_map(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return partial(
        step_map,
        num_iterations=cfg.num_iterations,
        num_slices=cfg.num_slices,
        hint_mode=cfg.hint_mode,
        hint_order=pseudo_order(rollout.max_completion_length, rollout),
    )


ADVANTAGES = {"none": centred, "group": z_score, "loo": leave_one_out}
LAYOUTS = {"original": original_layout, "scaled": scaled_layout}
LIKELIHOODS = {"mean_field": _mean_field, "random_mask": _random_mask, "step_map": _step_map}


def _compose(
    cfg: AlgorithmConfig,
    rollout: RolloutConfig,
    explorer: Explorer,
    likelihoods: dict[str, DrawBuilder] = LIKELIHOODS,
) -> Algorithm:
    """The parts that algorithms share; they differ in what they pass here."""
    likelihood = Likelihood(
        draw=likelihoods[cfg.likelihood](cfg, rollout),
        num_iterations=cfg.num_iterations,
        needs_reference=cfg.beta > 0,
        entropy_filter=cfg.inpaint.entropy_filter,
        mask_after_eos=cfg.mask_after_eos,
        batch_size=rollout.rollout_batch_size,
    )
    objective = Objective(
        epsilon=cfg.epsilon,
        epsilon_high=cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high,
        ratio=cfg.importance_sampling_level,
        beta=cfg.beta,
        kl=cfg.kl_estimator,
        loss_type=cfg.loss_type,
    )
    return Algorithm(explorer, ADVANTAGES[cfg.scale_rewards], likelihood, objective)


def _require(condition: bool, option: str, rule: str, got: object, advice: str = "") -> None:
    if not condition:
        raise ValueError(f"algorithm: {option} must {rule}, got {got!r}. {advice}".rstrip())


def _one_of(names) -> str:
    return f"be one of {', '.join(names)}"


def _check_options(cfg: AlgorithmConfig) -> None:
    for option, names in (
        ("scale_rewards", ADVANTAGES),
        ("likelihood", LIKELIHOODS),
        ("importance_sampling_level", ("token", "sequence")),
        ("kl_estimator", ("k1", "k2", "k3")),
        ("loss_type", LOSS_TYPES),
        ("hint_mode", ("score", "condition", "replay")),
    ):
        _require(getattr(cfg, option) in names, option, _one_of(names), getattr(cfg, option))
    high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    for option, rule, holds in (
        ("num_generations", "be at least 2 (a group of one has no baseline)", cfg.num_generations > 1),
        ("num_iterations", "be at least 1", cfg.num_iterations >= 1),
        ("num_slices", "be at least 1", cfg.num_slices >= 1),
        ("p_mask_prompt", "lie in [0, 1)", 0 <= cfg.p_mask_prompt < 1),
        ("min_mask_ratio", "lie in [0, 1)", 0 <= cfg.min_mask_ratio < 1),
        ("epsilon", "lie in (0, 1]", 0 < cfg.epsilon <= 1),
        ("epsilon_high", "be positive", high > 0),
        ("beta", "not be negative", cfg.beta >= 0),
    ):  # fmt: skip
        _require(holds, option, rule, getattr(cfg, option))
    _require(
        cfg.hint_mode != "replay" or cfg.likelihood == "step_map", "hint_mode",
        f"be score or condition with likelihood {cfg.likelihood!r}, which has no steps", cfg.hint_mode,
        "Set hint_mode='score' or use likelihood='step_map'.",
    )  # fmt: skip
    _require(
        cfg.p_mask_prompt == 0 or cfg.likelihood == "mean_field", "p_mask_prompt",
        f"be 0 with likelihood {cfg.likelihood!r}, which never masks the prompt", cfg.p_mask_prompt,
        "Set it to 0 or use likelihood='mean_field'.",
    )  # fmt: skip


def _check_inpaint(cfg: InpaintConfig) -> None:
    for option, names in (
        ("layout", LAYOUTS),
        ("trigger", ("correctness", "total_reward")),
        ("replace_order", ("random", "first")),
    ):
        _require(getattr(cfg, option) in names, option, _one_of(names), getattr(cfg, option))
    for option, rule, holds in (
        ("eta_low", "lie in [0, eta_high]", 0 <= cfg.eta_low <= cfg.eta_high),
        ("eta_high", "be at most 1", cfg.eta_high <= 1),
        ("chunk_min", "lie in [1, chunk_max]", 1 <= cfg.chunk_min <= cfg.chunk_max),
        ("replace_fraction", "lie in [0, 1]", 0 <= cfg.replace_fraction <= 1),
        ("entropy_filter", "lie in (0, 1]", 0 < cfg.entropy_filter <= 1),
    ):
        _require(holds, option, rule, getattr(cfg, option))


def _check_hints(cfg: AlgorithmConfig) -> None:
    _require(
        cfg.hint_mode != "condition" or cfg.inpaint.entropy_filter == 1, "entropy_filter",
        "be 1 with hint_mode 'condition', which never scores a hint", cfg.inpaint.entropy_filter,
        "Set inpaint.entropy_filter=1 or hint_mode='score'.",
    )  # fmt: skip


def _check_released(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """What the released code does not have is refused rather than guessed."""
    for option, rule, holds in (
        ("hint_mode", "be 'score': the released code masks and scores hints", cfg.hint_mode == "score"),
        ("mask_after_eos", "be False: the released code scores the whole canvas", not cfg.mask_after_eos),
        ("kl_estimator", "be 'k3', the released code's only one", cfg.kl_estimator == "k3"),
        (
            "likelihood",
            "be 'mean_field' or 'random_mask', the released code's two",
            cfg.likelihood in ("mean_field", "random_mask"),
        ),
    ):  # fmt: skip
        _require(holds, option, rule, getattr(cfg, option), "Or use algorithm='igpo'.")
    needed = RELEASED_FIRST_LEVEL + 2
    _require(
        cfg.likelihood == "mean_field" or rollout.diffusion_steps >= needed, "diffusion_steps",
        f"be at least {needed} for the released mask schedule", rollout.diffusion_steps,
    )  # fmt: skip
