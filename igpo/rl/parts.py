"""The named parts that algorithms are composed of, built from the configuration: name -> builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from igpo.config import AlgorithmConfig, RolloutConfig
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
from .critique import Critique, Discriminator, ThresholdCritique, ValueCritique
from .explorer import Explorer, InpaintingExplorer, TraceExplorer, no_exploration, original_layout
from .likelihood import (
    Likelihood,
    add_up,
    bounds,
    halves,
    keep_apart,
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
CritiqueBuilder = Callable[[AlgorithmConfig, RolloutConfig, Likelihood, int], Critique]


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


def _value(
    cfg: AlgorithmConfig, rollout: RolloutConfig, likelihood: Likelihood, pad_id: int
) -> Critique:
    critic = cfg.critic
    return ValueCritique(
        critic.gamma, critic.gae_lambda, critic.value_epsilon, rollout.rollout_batch_size
    )


def _discriminator(
    cfg: AlgorithmConfig, rollout: RolloutConfig, likelihood: Likelihood, pad_id: int
) -> Critique:
    critic = cfg.critic
    return Discriminator(
        likelihood, rollout, critic.gamma, critic.step_reward_weight, critic.num_candidates, pad_id,
        rollout.rollout_batch_size,
    )  # fmt: skip


def _threshold(
    cfg: AlgorithmConfig, rollout: RolloutConfig, likelihood: Likelihood, pad_id: int
) -> Critique:
    critic, advantage = cfg.critic, ADVANTAGES[cfg.scale_rewards]
    return ThresholdCritique(
        critic.bound_std,
        critic.step_cost,
        cfg.epsilon,
        rollout.diffusion_steps,
        advantage,
        rollout.rollout_batch_size,
    )


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
CRITIQUES: dict[str, CritiqueBuilder] = {
    "value": _value, "discriminator": _discriminator, "threshold": _threshold,
}  # fmt: skip
ASKING_OLD = ("discriminator",)  # critiques that ask for log-probs under the old policy
