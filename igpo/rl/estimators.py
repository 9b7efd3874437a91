"""The likelihoods by name, built from the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from igpo.config import AlgorithmConfig, RolloutConfig
from igpo.rollout import pseudo_order, steps_per_block

from .likelihood import (
    DrawFunction,
    InnerUpdate,
    block_exact,
    by_count,
    by_ratio,
    complements,
    coupled,
    elbo,
    in_block,
    in_pairs,
    mean_field,
    predicted,
    random_mask,
    slices,
    step_map,
    step_mc,
    two_mean_field,
)

UNIGRPO_LEVELS = 1000  # noise levels T of the mask schedule (arXiv:2505.15809)
RELEASED_FIRST_LEVEL = 30  # smallest t_0 of the released IGPO code's schedule, of diffusion_steps


@dataclass(frozen=True)
class Estimator:
    """A likelihood by name. level: "token" when its values are log-probs of tokens, "sequence" when only their sum over
    the completion has a meaning.   recorded: it needs the step map of a rollout, so hints have no place in it but those
    that hint_mode gives them.   block_causal: it needs a policy whose attention is, in the blocks of the rollout.
    replays: what must be set for tokens to be scored on the very canvases they were drawn on ("" when it is); None when
    nothing can be.   filtered: whether what it scores was drawn with top_k, top_p and min_p."""

    build: Callable[[AlgorithmConfig, RolloutConfig], DrawFunction]
    level: str = "token"
    recorded: bool = False
    apart: bool = False
    predictions: bool = False
    block_causal: bool = False
    replays: Callable[[AlgorithmConfig, RolloutConfig], str] | None = None
    filtered: bool = True
    ordered: bool = False


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


def _always(cfg: AlgorithmConfig, rollout: RolloutConfig) -> str:
    return ""


def _of_slices(cfg: AlgorithmConfig, rollout: RolloutConfig) -> str:
    return "" if cfg.draws.shrink == 1 else "shrink=1"


def _of_step_map(cfg: AlgorithmConfig, rollout: RolloutConfig) -> str:
    """A slice for every step; a block-causal policy may need those of one more block."""
    most = rollout.diffusion_steps + steps_per_block(rollout.max_completion_length, rollout)
    if cfg.hint_mode == "replay":
        return "hint_mode=score"
    return "" if cfg.draws.num_slices >= most else f"num_slices={most}"


def _shared(
    draw: Callable[..., Sequence[InnerUpdate]], cfg: AlgorithmConfig, **options
) -> DrawFunction:
    return partial(draw, num_iterations=cfg.num_iterations, hint_mode=cfg.hint_mode, **options)


LIKELIHOODS = {
    "mean_field": Estimator(_mean_field),
    "random_mask": Estimator(_random_mask),
    "coupled": Estimator(_coupled),
    "elbo": Estimator(_elbo, "sequence"),
    "elbo_pairs": Estimator(_elbo_pairs, "sequence"),
    "elbo_complements": Estimator(_elbo_complements, "sequence"),
    "elbo_blocks": Estimator(_elbo_blocks, "sequence"),
    "step_map": Estimator(_step_map, recorded=True, replays=_of_step_map),
    "slices": Estimator(_slices, recorded=True, replays=_of_slices, ordered=True),
    "block_exact": Estimator(_block_exact, recorded=True, block_causal=True, replays=_always),
    "step_mc": Estimator(_step_mc, recorded=True, apart=True, replays=_always),
    "two_mean_field": Estimator(_two_mean_field, recorded=True),
    "predicted": Estimator(_predicted, recorded=True, apart=True, predictions=True, filtered=False),
    "predicted_steps": Estimator(
        _predicted_steps, recorded=True, apart=True, predictions=True, filtered=False
    ),
    "predicted_blocks": Estimator(_predicted_blocks, recorded=True, apart=True, predictions=True),
}
RELEASED_LIKELIHOODS = LIKELIHOODS | {"random_mask": Estimator(_released_random_mask)}
