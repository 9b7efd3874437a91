"""The named parts that algorithms are composed of, built from the configuration: name -> builder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from igpo.config import AlgorithmConfig, RolloutConfig
from igpo.rollout import pseudo_order, steps_per_block
from igpo.types import Draw, Graded, PolicyBatch, Prompt, Rollouts

from .advantage import (
    best_and_worst,
    centred,
    leave_one_out,
    of_predictions,
    of_tokens,
    reward,
    softmax_difference,
    z_score,
)
from .explorer import Explorer, InpaintingExplorer, TraceExplorer, no_exploration, original_layout
from .likelihood import (
    DrawFunction,
    InnerUpdate,
    add_up,
    block_exact,
    bounds,
    by_count,
    by_ratio,
    complements,
    coupled,
    elbo,
    halves,
    in_block,
    in_pairs,
    keep_apart,
    mean_field,
    predicted,
    random_mask,
    slices,
    step_map,
    step_mc,
    two_mean_field,
)
from .objective import (
    BellmanResidual,
    Boundary,
    Clipped,
    ClippedDraws,
    Objective,
    Preference,
    Sandwich,
    WeightedLikelihood,
)
from .predictions import PredictionExplorer, StepRewardExplorer
from .released_layout import scaled_layout
from .reweigh import behaviour, target_weights, unchanged
from .values import CandidateExplorer, VineExplorer

Grade = Callable[[Rollouts, Sequence[Prompt]], Graded]
Advantage = Callable[[Graded], Tensor]
Reweigh = Callable[[Graded, PolicyBatch, Tensor, int], Tensor]
Combine = Callable[[Tensor, Sequence[Draw]], Tensor]
ExplorerBuilder = Callable[[AlgorithmConfig, RolloutConfig, Grade, int], Explorer]

UNIGRPO_LEVELS = 1000  # noise levels T of the mask schedule (arXiv:2505.15809)
RELEASED_FIRST_LEVEL = 30  # smallest t_0 of the released IGPO code's schedule, of diffusion_steps


@dataclass(frozen=True)
class Estimator:
    """A likelihood by name. level: "token" when its values are log-probs of tokens, "sequence" when only their sum over
    the completion has a meaning.   recorded: it needs the step map of a rollout, so hints have no place in it but those
    that hint_mode gives them.   block_causal: it needs a policy whose attention is, in the blocks of the rollout."""

    build: Callable[[AlgorithmConfig, RolloutConfig], DrawFunction]
    level: str = "token"
    recorded: bool = False
    apart: bool = False
    predictions: bool = False
    block_causal: bool = False


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


def _predictions(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Explorer:
    return PredictionExplorer(rollout, cfg.method.num_predictions)


def _step_rewards(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Explorer:
    method = cfg.method
    return StepRewardExplorer(rollout, method.num_predictions, method.kept_predictions, grade)


def _vine(cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int) -> Explorer:
    return VineExplorer(rollout, grade, cfg.method.num_values)


def _candidates(
    cfg: AlgorithmConfig, rollout: RolloutConfig, grade: Grade, pad_id: int
) -> Explorer:
    return CandidateExplorer(rollout, grade, cfg.method.num_values, cfg.method.value_temperature)


def _mean_field(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return _shared(mean_field, cfg, p_mask_prompt=cfg.p_mask_prompt)


def _random_mask(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    lowest = max(1, math.ceil(cfg.min_mask_ratio * UNIGRPO_LEVELS))
    first_level = (lowest, UNIGRPO_LEVELS - 1)
    return _shared(random_mask, cfg, num_levels=UNIGRPO_LEVELS, first_level=first_level)


def _released_random_mask(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return partial(
        random_mask,
        num_iterations=cfg.num_iterations,
        num_levels=rollout.diffusion_steps,
        first_level=(RELEASED_FIRST_LEVEL, rollout.diffusion_steps - 2),
        exact=False,
        score_visible=True,
    )


def _coupled(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return _shared(coupled, cfg)


def _elbo(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    sampler = {"L/l": by_count, "1/t": by_ratio}[cfg.draws.elbo_weighting]
    return _shared(elbo, cfg, num_draws=cfg.draws.num_draws, sampler=sampler)


def _elbo_pairs(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return _shared(elbo, cfg, num_draws=cfg.draws.num_draws, sampler=in_pairs)


def _elbo_complements(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return _shared(elbo, cfg, num_draws=cfg.draws.num_draws, sampler=complements)


def _elbo_blocks(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    sampler = partial(in_block, block_length=rollout.block_length, p_mask=cfg.draws.p_mask_clean)
    return _shared(elbo, cfg, num_draws=cfg.draws.num_draws, sampler=sampler)


def _step_map(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    order = pseudo_order(rollout.max_completion_length, rollout)
    return _shared(step_map, cfg, num_slices=cfg.draws.num_slices, hint_order=order)


def _slices(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    steps = steps_per_block(rollout.max_completion_length, rollout)
    return _shared(slices, cfg, shrink=cfg.draws.shrink, steps_per_block=steps)


def _block_exact(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    steps = steps_per_block(rollout.max_completion_length, rollout)
    return _shared(block_exact, cfg, steps_per_block=steps)


def _step_mc(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return partial(
        step_mc, num_iterations=cfg.num_iterations, num_draws=cfg.draws.num_draws, proposal=cfg.draws.step_proposal
    )  # fmt: skip


def _two_mean_field(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return _shared(two_mean_field, cfg)


def _predicted(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return partial(predicted, num_iterations=cfg.num_iterations, weighting="likelihood")


def _predicted_steps(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    return partial(predicted, num_iterations=cfg.num_iterations, weighting="confidence")


def _predicted_blocks(cfg: AlgorithmConfig, rollout: RolloutConfig) -> DrawFunction:
    reach = steps_per_block(rollout.max_completion_length, rollout)
    return partial(predicted, num_iterations=cfg.num_iterations, reach=reach)


def _shared(
    draw: Callable[..., Sequence[InnerUpdate]], cfg: AlgorithmConfig, **options
) -> DrawFunction:
    return partial(draw, num_iterations=cfg.num_iterations, hint_mode=cfg.hint_mode, **options)


def _clipped(cfg: AlgorithmConfig) -> Objective:
    return Clipped(
        epsilon=cfg.epsilon,
        epsilon_high=cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high,
        ratio=cfg.importance_sampling_level,
        beta=cfg.beta,
        kl=cfg.kl_estimator,
        loss_type=cfg.loss_type,
        kl_level=cfg.kl_level,
        token_budget=cfg.method.token_budget,
    )


def _clipped_draws(cfg: AlgorithmConfig) -> Objective:
    high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    return ClippedDraws(cfg.epsilon, high, cfg.beta, cfg.kl_estimator, cfg.kl_to)


def _bounds(cfg: AlgorithmConfig) -> Combine:
    return partial(bounds, power=cfg.method.upper_power)


def _target(cfg: AlgorithmConfig) -> Reweigh:
    return partial(target_weights, alpha=cfg.method.alpha, baseline=cfg.method.target_baseline)


def _behaviour(cfg: AlgorithmConfig) -> Reweigh:
    return partial(behaviour, cap=cfg.method.behaviour_cap)


def _wd1(cfg: AlgorithmConfig) -> Advantage:
    return partial(softmax_difference, psi=cfg.method.psi)


EXPLORERS: dict[str, ExplorerBuilder] = {
    "none": _plain,
    "inpainting": _inpainting,
    "resampling": _resampling,
    "trace": _trace,
    "trace_as_hints": _trace_as_hints,
    "predictions": _predictions,
    "step_rewards": _step_rewards,
    "vine": _vine,
    "candidates": _candidates,
}
PREDICTING = ("predictions", "step_rewards", "candidates")  # explorers that make predictions
# scale_rewards -> advantage
ADVANTAGES: dict[str, Advantage] = {"none": centred, "group": z_score, "loo": leave_one_out}
# advantages that an algorithm brings itself
OWN_ADVANTAGES: dict[str, Callable[[AlgorithmConfig], Advantage]] = {
    "reward": lambda cfg: reward,
    "softmax_difference": _wd1,
    "best_and_worst": lambda cfg: best_and_worst,
    "of_predictions": lambda cfg: of_predictions,
    "of_tokens": lambda cfg: of_tokens,
}
LAYOUTS = {"original": original_layout, "scaled": scaled_layout}
LIKELIHOODS = {
    "mean_field": Estimator(_mean_field),
    "random_mask": Estimator(_random_mask),
    "coupled": Estimator(_coupled),
    "elbo": Estimator(_elbo, "sequence"),
    "elbo_pairs": Estimator(_elbo_pairs, "sequence"),
    "elbo_complements": Estimator(_elbo_complements, "sequence"),
    "elbo_blocks": Estimator(_elbo_blocks, "sequence"),
    "step_map": Estimator(_step_map, recorded=True),
    "slices": Estimator(_slices, recorded=True),
    "block_exact": Estimator(_block_exact, recorded=True, block_causal=True),
    "step_mc": Estimator(_step_mc, recorded=True, apart=True),
    "two_mean_field": Estimator(_two_mean_field, recorded=True),
    "predicted": Estimator(_predicted, recorded=True, apart=True, predictions=True),
    "predicted_steps": Estimator(_predicted_steps, recorded=True, apart=True, predictions=True),
    "predicted_blocks": Estimator(_predicted_blocks, recorded=True, apart=True, predictions=True),
}
RELEASED_LIKELIHOODS = LIKELIHOODS | {"random_mask": Estimator(_released_random_mask)}
OBJECTIVES: dict[str, Callable[[AlgorithmConfig], Objective]] = {
    "clip": _clipped,
    "clip_draws": _clipped_draws,
    "boundary": lambda cfg: Boundary(),
    "likelihood": lambda cfg: WeightedLikelihood(),
    "cross_entropy": lambda cfg: WeightedLikelihood(per_length=True),
    "sandwich": lambda cfg: Sandwich(cfg.method.upper_mixture),
    "preference": lambda cfg: Preference(cfg.beta),
    "bellman": lambda cfg: BellmanResidual(cfg.beta),
}
# needs.draws of an objective -> how the likelihood combines draws
COMBINES: dict[str, Callable[[AlgorithmConfig], Combine]] = {
    "sum": lambda cfg: add_up,
    "apart": lambda cfg: keep_apart,
    "halves": lambda cfg: halves,
    "bounds": _bounds,
}
REWEIGHS: dict[str, Callable[[AlgorithmConfig], Reweigh]] = {
    "none": lambda cfg: unchanged,
    "target": _target,
    "behaviour": _behaviour,
}
