"""Which positions a denoise step commits: the published rules, each a score and a choice among the scored positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.ops import _philox, _sampling
from igpo.ops.unmask_step import UnmaskResult

from .remask import Revise, least_confident, ranks, remdm_conf
from .schedule import DREAM_EPS
from .stability import check_stability


class Moment(NamedTuple):
    """Where in the rollout a choice is made."""

    quota: int  # commits of each row at this step by the schedule
    step: int  # of the block
    steps: int  # of a block
    seed: int
    tick: int  # step of the whole rollout
    row_ids: Tensor
    stable: Tensor | None = None  # (n, c) bool, cfg.kl_threshold: the others join no run
    bound: Tensor | None = None  # (n,) Canvas.entropy_bound

    def noise(self, shape: torch.Size) -> tuple[int, Tensor, Tensor]:
        """(key, position, row id) of one random number per column, each in a stream of its own."""
        count = shape[0] * shape[1]
        position = torch.arange(shape[1], device=self.row_ids.device).repeat(shape[0])
        key = _philox.key(self.seed, self.tick, _philox.STREAM_GUMBEL)
        return key, position, self.row_ids[:, None].expand(shape).reshape(count)


Choose = Callable[[UnmaskResult, Moment], Tensor]  # -> (n, c) bool, among result.committed


@dataclass(frozen=True)
class Remasking:
    """A value of cfg.remasking.

    score: of unmask_step.   tempered: it is taken from the distribution that is drawn from (Dream), not from
    softmax(logits) (LLaDA).   choose: its own choice; None: the highest scores, as many as the schedule says.
    """

    score: str
    tempered: bool = False
    choose: Choose | None = None
    revise: Revise | None = None
    scheduled: bool = True


def prefix(score: Tensor, valid: Tensor, fits: Callable[[Tensor], Tensor], quota: int) -> Tensor:
    """The longest run of the most confident valid columns that all fit, at least one and at least the quota.

    fits: (n, c) indices of columns, most confident first -> (n, c) bool.
    """
    rank = ranks(score, valid)
    order = rank.argsort(1)
    free = valid & (score > -torch.inf)  # deferred ones join no run
    run = (fits(order) & free.gather(1, order)).byte().cumprod(1).sum(1, keepdim=True)
    return valid & (rank < run.clamp_min(max(1, quota)))


def top_quota(alg_temp: float) -> Choose:
    """The schedule's number of highest scores; with alg_temp a draw without replacement, softmax(score / alg_temp).

    Source: Dream (its generation code); Gumbel top-k is that draw (arXiv:1903.06059).
    """

    def choose(result: UnmaskResult, at: Moment) -> Tensor:
        score = result.score.double()
        if alg_temp:
            noise = _sampling.gumbel(*at.noise(score.shape), 1)
            score = score / alg_temp + noise.view_as(score)
        return result.committed & (ranks(score, result.committed) < at.quota)

    return choose


def above_threshold(threshold: float) -> Choose:
    """Every stable column of at least this score; those of highest score besides, up to the quota.

    Source: Fast-dLLM (arXiv:2505.22618, section 3.3); where stable is asked for, KLASS (arXiv:2511.05664).
    """

    def choose(result: UnmaskResult, at: Moment) -> Tensor:
        ready = result.committed & (result.score >= threshold)
        if at.stable is not None:
            ready &= at.stable
        score = result.score.masked_fill(ready, torch.inf)
        return ready | result.committed & (ranks(score, result.committed) < max(1, at.quota))

    return choose


def by_factor(factor: float) -> Choose:
    """The longest run c_1 >= c_2 >= … with (n + 1)(1 - c_n) <= factor (Fast-dLLM, arXiv:2505.22618)."""

    def choose(result: UnmaskResult, at: Moment) -> Tensor:
        score = result.score.double()
        room = torch.arange(2, score.shape[1] + 2, device=score.device)

        def fits(order: Tensor) -> Tensor:
            return room * (1 - score.gather(1, order)) <= factor

        return prefix(score, result.committed, fits, at.quota)

    return choose


def entropy_bounded(bound: float) -> Choose:
    """The longest run whose entropies sum to at most bound beyond the largest of them (arXiv:2505.24857, eq. for U)."""

    def choose(result: UnmaskResult, at: Moment) -> Tensor:
        entropy = result.entropy.double()

        def fits(order: Tensor) -> Tensor:
            sorted_ = entropy.gather(1, order)
            limit = bound if at.bound is None else at.bound[:, None]
            return sorted_.cumsum(1) - sorted_.cummax(1).values <= limit

        return prefix(result.score, result.committed, fits, at.quota)

    return choose


def deferring(choose: Choose, tokens: tuple[int, ...]) -> Choose:
    """The choice with positions whose candidate is one of `tokens` after all others."""

    def late(result: UnmaskResult, at: Moment) -> Tensor:
        # compared one by one: ids on the device would be a copy that the host waits for
        deferred = torch.stack([result.tokens == token for token in tokens]).any(0)
        score = result.score.masked_fill(deferred, -torch.inf)
        return choose(result._replace(score=score), at)

    return late


def independently(result: UnmaskResult, at: Moment) -> Tensor:
    """Each column with probability 1 - s/t on Dream's grid from t = 1 to 1e-3, all at the last step of the block."""
    last = at.step == at.steps - 1
    now, then = (1 - (at.step + i) * (1 - DREAM_EPS) / at.steps for i in (0, 1))
    return result.committed if last else result.committed & (result.score < 1 - then / now)


def evenly(result: UnmaskResult, at: Moment) -> Tensor:
    """Each column with probability (alpha_s - alpha_t) / (1 - alpha_t), alpha = 1 - t, t from 1 to 0 over the block."""
    return result.committed & (result.score < 1 / (at.steps - at.step))


def everything(result: UnmaskResult, at: Moment) -> Tensor:
    return result.committed


REMASKING = {
    "low_confidence": Remasking("prob"),
    "random": Remasking("random"),
    "maskgit_plus": Remasking("prob", tempered=True),
    "topk_margin": Remasking("margin", tempered=True),
    "entropy": Remasking("entropy", tempered=True),
    "origin": Remasking("random", choose=independently, scheduled=False),
    "remdm_conf": Remasking("random", choose=evenly, revise=remdm_conf, scheduled=False),
    "rcr": Remasking("prob", choose=everything, revise=least_confident),
}


@dataclass(frozen=True)
class Rule:
    """What a step does beside calling the policy.

    choose: None: unmask_step itself commits the highest scores.   counted: the schedule alone says how many positions
    a step leaves masked, so that the host need not ask.   revise: positions masked again after it.
    """

    score: str
    tempered: bool
    choose: Choose | None
    counted: bool
    revise: Revise | None


def build_rule(cfg: RolloutConfig) -> Rule:
    """The rule of cfg. Raises ValueError for unknown names and options that contradict each other."""
    if cfg.remasking not in REMASKING:
        raise ValueError(
            f"denoise: remasking must be one of {sorted(REMASKING)}, got {cfg.remasking!r}."
        )
    base = REMASKING[cfg.remasking]
    options = {
        "threshold": (cfg.threshold, above_threshold),
        "factor": (cfg.factor, by_factor),
        "entropy_bound": (cfg.entropy_bound, entropy_bounded),
        "alg_temp": (cfg.alg_temp or None, top_quota),
    }
    given = {name: value for name, (value, _) in options.items() if value is not None}
    _check(cfg.remasking, base, given)
    check_stability(cfg)
    _check_deferred(cfg, base)
    if cfg.unmask_schedule != "even" and not base.scheduled:
        raise ValueError(
            f"denoise: unmask_schedule must be even with remasking={cfg.remasking}, which draws its numbers, got "
            f"{cfg.unmask_schedule!r}."
        )
    choose, counted = base.choose, base.scheduled
    if given:
        ((name, value),) = given.items()
        choose, counted = options[name][1](value), name == "alg_temp"
    if cfg.defer_tokens:
        choose = deferring(choose or top_quota(0.0), cfg.defer_tokens)
    return Rule(base.score, base.tempered, choose, counted, base.revise)


def _check(remasking: str, base: Remasking, given: dict[str, float]) -> None:
    if len(given) > 1:
        raise ValueError(f"denoise: at most one of {', '.join(given)} may be set, got {given}.")
    for name, value in given.items():
        if base.score == "random" or base.choose is not None:
            raise ValueError(
                f"denoise: {name} must be unset with remasking={remasking}, which has its own choice, got {value}. "
                "Use low_confidence, maskgit_plus, topk_margin or entropy."
            )
        if not -float("inf") < value < float("inf") or (name != "threshold" and value < 0):
            rule = "be finite" if name == "threshold" else "be finite and >= 0"
            raise ValueError(f"denoise: {name} must {rule}, got {value}.")
        if name == "factor" and base.score == "entropy":
            raise ValueError(
                f"denoise: factor must be unset with remasking={remasking}, whose scores are no probabilities, got "
                f"{value}. Use entropy_bound."
            )


def _check_deferred(cfg: RolloutConfig, base: Remasking) -> None:
    both = sorted(set(cfg.defer_tokens) & set(cfg.suppress_tokens))
    if both:
        raise ValueError(
            f"denoise: defer_tokens must not be suppressed too, got {both} in both. Keep one of the two."
        )
    if cfg.defer_tokens and base.choose is not None:
        raise ValueError(
            f"denoise: defer_tokens must be empty with remasking={cfg.remasking}, which has no order, got "
            f"{cfg.defer_tokens}. Use suppress_tokens."
        )
