"""Which options fit together. Every refusal says what to change."""

from __future__ import annotations

from collections.abc import Iterable

from igpo.config import (
    AlgorithmConfig,
    CriticConfig,
    DrawsConfig,
    InpaintConfig,
    MethodConfig,
    RolloutConfig,
)
from igpo.rollout import is_filtered

from .estimators import RELEASED_FIRST_LEVEL, Estimator
from .objective import LOSS_TYPES, Objective
from .parts import LAYOUTS, PREDICTING


def nothing(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """An algorithm without conditions of its own."""


def name(option: str, value: str | None, names: Iterable[str]) -> None:
    """Raises ValueError unless value is one of names."""
    require(value in set(names), option, one_of(names), value)


def fit(
    cfg: AlgorithmConfig, estimator: Estimator, objective: Objective, advantage: str | None, explorer: str
) -> None:  # fmt: skip
    """Whether the objective can take what the likelihood and the advantages give."""
    needs, likelihood = objective.needs, cfg.likelihood
    _of_explorer(cfg, estimator, objective, advantage, explorer)
    require(
        advantage is None or cfg.scale_rewards == "none", "scale_rewards",
        f"be 'none' with algorithm {cfg.algorithm!r}, which has weights of its own", cfg.scale_rewards,
        "Set scale_rewards=none.",
    )  # fmt: skip
    require(
        estimator.level == "token" or needs.level == "sequence", "likelihood",
        f"be one of tokens with the token ratio of objective {cfg.objective!r}: the terms of an ELBO are no log-probs "
        "of single tokens", likelihood, "Set importance_sampling_level=sequence, or likelihood=mean_field.",
    )  # fmt: skip
    require(
        not estimator.apart or needs.draws == "apart", "objective",
        f"keep draws apart with likelihood {likelihood!r}, in which a token may be in several of them", cfg.objective,
        "Set objective=clip_draws, or likelihood=slices.",
    )  # fmt: skip
    require(
        needs.draws != "bounds" or estimator.level == "sequence", "likelihood",
        "be an ELBO with objective 'sandwich', whose two bounds are of random draws", likelihood,
        "Set likelihood=elbo_blocks or elbo.",
    )  # fmt: skip
    require(
        needs.draws != "halves" or (cfg.draws.num_draws % 2 == 0 and likelihood == "elbo"), "num_draws",
        "be even, with likelihood 'elbo', for objective 'bellman', which multiplies two independent estimates",
        (cfg.draws.num_draws, likelihood), "Set num_draws=2 and likelihood=elbo.",
    )  # fmt: skip
    require(
        cfg.objective not in ("preference", "bellman") or cfg.beta > 0, "beta",
        f"be positive with objective {cfg.objective!r}", cfg.beta, "It scales the log-ratio to the reference.",
    )  # fmt: skip


def _of_explorer(
    cfg: AlgorithmConfig, estimator: Estimator, objective: Objective, advantage: str | None, explorer: str
) -> None:  # fmt: skip
    """What an explorer gives, somebody must take; what is taken, it must give."""
    needs, likelihood = objective.needs, cfg.likelihood
    require(
        not estimator.predictions or explorer in PREDICTING, "likelihood",
        f"not need predictions with algorithm {cfg.algorithm!r}, whose explorer makes none", likelihood,
        "Use algorithm=mdpo, wd1pp or linvit.",
    )  # fmt: skip
    require(
        advantage != "of_predictions" or estimator.predictions, "likelihood",
        f"score predictions with algorithm {cfg.algorithm!r}, whose advantages are of them", likelihood,
        "Leave likelihood to the algorithm.",
    )  # fmt: skip
    require(
        advantage != "of_tokens" or needs.draws == "apart", "objective",
        f"keep draws apart with algorithm {cfg.algorithm!r}, whose advantages are of tokens", cfg.objective,
        "Leave objective to the algorithm.",
    )  # fmt: skip


def replayed(cfg: AlgorithmConfig, rollout: RolloutConfig, estimator: Estimator) -> None:
    """A step map rebuilds the canvases of a rollout only where no token was taken back."""
    require(
        not estimator.recorded or rollout.remasking not in ("remdm_conf", "rcr"), "remasking",
        f"keep committed tokens with likelihood {cfg.likelihood!r}, which replays the rollout", rollout.remasking,
        "Use remasking=low_confidence or another likelihood.",
    )  # fmt: skip


def scored_over_support(cfg: AlgorithmConfig, rollout: RolloutConfig, estimator: Estimator) -> bool:
    """Whether log-probs are over the tokens that top_k, top_p and min_p left. Refuses what cannot be."""
    name("filtered_scoring", cfg.draws.filtered_scoring, ("support", "ignore"))
    if not (is_filtered(rollout) and estimator.filtered) or cfg.draws.filtered_scoring == "ignore":
        return False
    filters = {key: getattr(rollout, key) for key in ("top_k", "top_p", "min_p")}
    otherwise = "Or draw from all tokens (top_k=0 top_p=1 min_p=0), or score over all (filtered_scoring=ignore)."
    change = None if estimator.replays is None else estimator.replays(cfg, rollout)
    able = "likelihood=step_mc, block_exact, or slices with shrink=1"
    require(
        change == "", "likelihood",
        f"score tokens where they were drawn, to be over the tokens that {filters} kept there", cfg.likelihood,
        f"Set {change or able}. {otherwise}",
    )  # fmt: skip
    require(
        rollout.record_support, "record_support", f"be true, to score over the tokens that {filters} kept",
        rollout.record_support, f"Set record_support=true{'' if rollout.top_k else ' and top_k'}. {otherwise}",
    )  # fmt: skip
    return True


def sampled(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """Rollouts are of the policy that is trained, unless somebody said otherwise."""
    require(
        cfg.approximate_rollouts or rollout.approximate_cache == "none", "approximate_cache",
        "be 'none': its rollouts are of another policy than the one that is trained", rollout.approximate_cache,
        "Set approximate_cache=none. Set approximate_rollouts=true to train on them all the same.",
    )  # fmt: skip


def critic(
    cfg: AlgorithmConfig, estimator: Estimator, objective: Objective, critique: str | None
) -> None:
    """A critic values the steps of a trajectory, one after the other; or the whole of it (threshold)."""
    of_steps = critique in ("value", "discriminator")
    require(
        not of_steps or estimator.ordered, "likelihood",
        f"be one of a trajectory's steps with algorithm {cfg.algorithm!r}, whose critic values them", cfg.likelihood,
        "Set likelihood=slices.",
    )  # fmt: skip
    needs = objective.needs
    require(
        not of_steps or (needs.draws == "apart" and needs.level == "token"), "objective",
        f"take advantages of tokens with algorithm {cfg.algorithm!r}, whose critic gives them", cfg.objective,
        "Set objective=clip_draws.",
    )  # fmt: skip
    require(
        critique == "discriminator" or cfg.critic.num_candidates == 1, "num_candidates",
        f"be 1 with algorithm {cfg.algorithm!r}, which has no reward of steps to search with",
        cfg.critic.num_candidates, "Set num_candidates=1, or algorithm=airl_s.",
    )  # fmt: skip


def bounded(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """A trained bound needs the sampler it belongs to, and a place to start."""
    bound = rollout.entropy_bound
    require(
        bound is not None and bound > 0, "entropy_bound",
        f"be positive with algorithm {cfg.algorithm!r}, which trains it from there", bound,
        "Set entropy_bound=0.1, or algorithm=diffpo.",
    )  # fmt: skip


def budget(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """C3PO is its aggregation."""
    require(
        cfg.loss_type == "budget", "loss_type", "be 'budget' with algorithm 'c3po'", cfg.loss_type,
        "Set loss_type=budget, or algorithm=grpo.",
    )  # fmt: skip


def fits_budget(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """A completion that exceeds the budget by itself would never be trained on."""
    most, budget = rollout.max_completion_length, cfg.method.token_budget
    require(
        cfg.loss_type != "budget" or budget >= most, "token_budget",
        f"be at least max_completion_length={most}", budget,
        "It is the number of completion tokens an update is made of.",
    )  # fmt: skip


def require(condition: bool, option: str, rule: str, got: object, advice: str = "") -> None:
    if not condition:
        raise ValueError(f"algorithm: {option} must {rule}, got {got!r}. {advice}".rstrip())


def one_of(names) -> str:
    return f"be one of {', '.join(names)}"


def options(cfg: AlgorithmConfig) -> None:
    for option, names in (
        ("importance_sampling_level", ("token", "sequence")),
        ("kl_estimator", ("k1", "k2", "k3", "k3_ratio")),
        ("kl_level", ("token", "sequence")),
        ("kl_to", ("reference", "old")),
        ("loss_type", LOSS_TYPES),
        ("hint_mode", ("score", "condition", "replay")),
    ):
        require(getattr(cfg, option) in names, option, one_of(names), getattr(cfg, option))
    high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    for option, rule, holds in (
        ("num_generations", "be at least 2 (a group of one has no baseline)", cfg.num_generations > 1),
        ("num_iterations", "be at least 1", cfg.num_iterations >= 1),
        ("p_mask_prompt", "lie in [0, 1)", 0 <= cfg.p_mask_prompt < 1),
        ("min_mask_ratio", "lie in [0, 1)", 0 <= cfg.min_mask_ratio < 1),
        ("epsilon", "lie in (0, 1]", 0 < cfg.epsilon <= 1),
        ("epsilon_high", "be positive", high > 0),
        ("beta", "not be negative", cfg.beta >= 0),
    ):  # fmt: skip
        require(holds, option, rule, getattr(cfg, option))
    _inpaint(cfg.inpaint)
    _draws(cfg.draws)
    _method(cfg.method)
    _critic(cfg.critic)
    _kl(cfg)
    require(
        cfg.hint_mode != "replay" or cfg.likelihood == "step_map", "hint_mode",
        f"be score or condition with likelihood {cfg.likelihood!r}, which has no steps", cfg.hint_mode,
        "Set hint_mode='score' or use likelihood='step_map'.",
    )  # fmt: skip
    require(
        cfg.p_mask_prompt == 0 or cfg.likelihood == "mean_field", "p_mask_prompt",
        f"be 0 with likelihood {cfg.likelihood!r}, which never masks the prompt", cfg.p_mask_prompt,
        "Set it to 0 or use likelihood='mean_field'.",
    )  # fmt: skip


def _inpaint(cfg: InpaintConfig) -> None:
    for option, names in (
        ("layout", LAYOUTS),
        ("trigger", ("correctness", "total_reward")),
        ("replace_order", ("random", "first")),
    ):
        require(getattr(cfg, option) in names, option, one_of(names), getattr(cfg, option))
    for option, rule, holds in (
        ("eta_low", "lie in [0, eta_high]", 0 <= cfg.eta_low <= cfg.eta_high),
        ("eta_high", "be at most 1", cfg.eta_high <= 1),
        ("chunk_min", "lie in [1, chunk_max]", 1 <= cfg.chunk_min <= cfg.chunk_max),
        ("replace_fraction", "lie in [0, 1]", 0 <= cfg.replace_fraction <= 1),
        ("entropy_filter", "lie in (0, 1]", 0 < cfg.entropy_filter <= 1),
    ):
        require(holds, option, rule, getattr(cfg, option))


def hints(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    require(
        cfg.hint_mode != "condition" or cfg.inpaint.entropy_filter == 1, "entropy_filter",
        "be 1 with hint_mode 'condition', which never scores a hint", cfg.inpaint.entropy_filter,
        "Set inpaint.entropy_filter=1 or hint_mode='score'.",
    )  # fmt: skip


def released(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """What the released IGPO code does not have is refused rather than guessed."""
    hints(cfg, rollout)
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
        require(holds, option, rule, getattr(cfg, option), "Or use algorithm='igpo'.")
    needed = RELEASED_FIRST_LEVEL + 2
    require(
        cfg.likelihood == "mean_field" or rollout.diffusion_steps >= needed, "diffusion_steps",
        f"be at least {needed} for the released mask schedule", rollout.diffusion_steps,
    )  # fmt: skip


def _draws(cfg: DrawsConfig) -> None:
    name("elbo_weighting", cfg.elbo_weighting, ("L/l", "1/t"))
    name("step_proposal", cfg.step_proposal, ("uniform", "entropy"))
    for option in ("num_draws", "num_slices", "shrink"):
        require(getattr(cfg, option) >= 1, option, "be at least 1", getattr(cfg, option))
    require(0 <= cfg.p_mask_clean < 1, "p_mask_clean", "lie in [0, 1)", cfg.p_mask_clean)
    heat = cfg.likelihood_temperature
    require(heat > 0, "likelihood_temperature", "be positive", heat)


def _method(cfg: MethodConfig) -> None:
    name("target_baseline", cfg.target_baseline, ("negative", "group", "none"))
    for option in (
        "psi",
        "alpha",
        "behaviour_cap",
        "token_budget",
        "upper_power",
        "num_values",
        "value_temperature",
    ):
        require(getattr(cfg, option) > 0, option, "be positive", getattr(cfg, option))
    kept, made = cfg.kept_predictions, cfg.num_predictions
    require(1 <= kept <= made, "kept_predictions", f"lie in [1, num_predictions={made}]", kept)
    require(0 <= cfg.upper_mixture <= 1, "upper_mixture", "lie in [0, 1]", cfg.upper_mixture)


def _critic(cfg: CriticConfig) -> None:
    for option, rule, holds in (
        ("critic_num_layers", "be at least 1, or none", cfg.critic_num_layers is None or cfg.critic_num_layers >= 1),
        ("critic_learning_rate", "be positive", cfg.critic_learning_rate > 0),
        ("gamma", "lie in (0, 1]", 0 < cfg.gamma <= 1),
        ("gae_lambda", "lie in [0, 1]", 0 <= cfg.gae_lambda <= 1),
        ("value_epsilon", "be positive", cfg.value_epsilon > 0),
        ("step_reward_weight", "not be negative", cfg.step_reward_weight >= 0),
        ("bound_std", "be positive", cfg.bound_std > 0),
        ("step_cost", "not be negative", cfg.step_cost >= 0),
        ("num_candidates", "be at least 1", cfg.num_candidates >= 1),
    ):  # fmt: skip
        require(holds, option, rule, getattr(cfg, option))


def _kl(cfg: AlgorithmConfig) -> None:
    """What the clipped objectives can do with a KL term."""
    apart = cfg.objective == "clip_draws"
    for option, plain in (
        ("kl_estimator", cfg.kl_estimator != "k3_ratio"),
        ("kl_to", cfg.kl_to == "reference"),
    ):
        require(
            plain or apart, option, f"be another with objective {cfg.objective!r}", getattr(cfg, option),
            "It is of objective=clip_draws.",
        )  # fmt: skip
    whole = cfg.importance_sampling_level == "sequence" and cfg.loss_type == "grpo"
    require(
        cfg.kl_level == "token" or (whole and cfg.objective == "clip"), "kl_level",
        "be 'token' but for a sequence ratio with loss_type 'grpo' and objective 'clip'", cfg.kl_level,
        "Set kl_level=token, or importance_sampling_level=sequence and loss_type=grpo.",
    )  # fmt: skip
