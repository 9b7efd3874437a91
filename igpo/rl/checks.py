"""Which options fit together. Every refusal says what to change."""

from __future__ import annotations

from collections.abc import Iterable

from igpo.config import AlgorithmConfig, InpaintConfig, RolloutConfig

from .objective import LOSS_TYPES, Needs
from .parts import LAYOUTS, RELEASED_FIRST_LEVEL


def nothing(cfg: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """An algorithm without conditions of its own."""


def name(option: str, value: object, names: Iterable[str]) -> None:
    """Raises ValueError unless value is one of names."""
    require(value in names, option, one_of(names), value)


def fit(cfg: AlgorithmConfig, level: str, needs: Needs) -> None:
    """Whether the objective can take what the likelihood gives."""
    require(
        level == "token" or needs.level == "sequence", "importance_sampling_level",
        f"be 'sequence' with likelihood {cfg.likelihood!r}, whose terms are no log-probs of single tokens", "token",
        "Set importance_sampling_level=sequence, or use a likelihood of tokens such as mean_field.",
    )  # fmt: skip


def require(condition: bool, option: str, rule: str, got: object, advice: str = "") -> None:
    if not condition:
        raise ValueError(f"algorithm: {option} must {rule}, got {got!r}. {advice}".rstrip())


def one_of(names) -> str:
    return f"be one of {', '.join(names)}"


def options(cfg: AlgorithmConfig) -> None:
    for option, names in (
        ("importance_sampling_level", ("token", "sequence")),
        ("kl_estimator", ("k1", "k2", "k3")),
        ("loss_type", LOSS_TYPES),
        ("hint_mode", ("score", "condition", "replay")),
    ):
        require(getattr(cfg, option) in names, option, one_of(names), getattr(cfg, option))
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
        require(holds, option, rule, getattr(cfg, option))
    _inpaint(cfg.inpaint)
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
