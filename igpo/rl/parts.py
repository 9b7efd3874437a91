"""The named parts that algorithms are composed of, built from the configuration: name -> builder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from igpo.config import AlgorithmConfig, RolloutConfig
from igpo.rollout import pseudo_order
from igpo.types import Graded, Prompt, Rollouts

from .advantage import centred, leave_one_out, z_score
from .explorer import Explorer, InpaintingExplorer, TraceExplorer, no_exploration, original_layout
from .likelihood import DrawFunction, add_up, mean_field, random_mask, step_map
from .objective import Clipped, Objective
from .released_layout import scaled_layout

Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]
ExplorerBuilder = Callable[[AlgorithmConfig, RolloutConfig, Grade, int], Explorer]

UNIGRPO_LEVELS = 1000  # noise levels T of the mask schedule (arXiv:2505.15809)
RELEASED_FIRST_LEVEL = 30  # smallest t_0 of the released IGPO code's schedule, of diffusion_steps


@dataclass(frozen=True)
class Estimator:
    """A likelihood by name. level: "token" when its values are log-probs of tokens, "sequence" when only their sum over
    the completion has a meaning.   recorded: it needs the step map of a rollout, so hints have no place in it but those
    that hint_mode gives them."""

    build: Callable[[AlgorithmConfig, RolloutConfig], DrawFunction]
    level: str = "token"
    recorded: bool = False


def _plain(cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int) -> Explorer:
    return no_exploration


def _inpainting(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Explorer:
    return InpaintingExplorer(cfg.inpaint, rollout, grade, LAYOUTS[cfg.inpaint.layout])


def _resampling(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Explorer:
    without = replace(cfg.inpaint, eta_low=0.0, eta_high=0.0)
    return InpaintingExplorer(without, rollout, grade, original_layout)


def _trace(cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int) -> Explorer:
    return TraceExplorer(cfg.inpaint, rollout, grade, pad_id)


def _trace_as_hints(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Explorer:
    return TraceExplorer(cfg.inpaint, rollout, grade, pad_id, as_hints=True)


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


def _clipped(cfg: AlgorithmConfig) -> Objective:
    return Clipped(
        epsilon=cfg.epsilon,
        epsilon_high=cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high,
        ratio=cfg.importance_sampling_level,
        beta=cfg.beta,
        kl=cfg.kl_estimator,
        loss_type=cfg.loss_type,
    )


EXPLORERS: dict[str, ExplorerBuilder] = {
    "none": _plain,
    "inpainting": _inpainting,
    "resampling": _resampling,
    "trace": _trace,
    "trace_as_hints": _trace_as_hints,
}
ADVANTAGES = {"none": centred, "group": z_score, "loo": leave_one_out}
LAYOUTS = {"original": original_layout, "scaled": scaled_layout}
LIKELIHOODS = {
    "mean_field": Estimator(_mean_field),
    "random_mask": Estimator(_random_mask),
    "step_map": Estimator(_step_map, recorded=True),
}
RELEASED_LIKELIHOODS = LIKELIHOODS | {"random_mask": Estimator(_released_random_mask)}
OBJECTIVES: dict[str, Callable[[AlgorithmConfig], Objective]] = {"clip": _clipped}
COMBINES = {"sum": add_up}  # needs.draws of an objective -> how the likelihood combines draws
