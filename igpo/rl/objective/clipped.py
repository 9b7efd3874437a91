"""The clipped policy objective of PPO, GRPO and GSPO, with a KL term.

    J = agg_k min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) - beta KL(pi || pi_ref),   loss = -J

A loss is a sum over rows divided by the `divisor` of the whole batch, so the losses of row micro-batches add up to the
loss of the batch, and so do its metrics: each is the batch's mean once its micro-batches are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igpo.ops import policy_loss
from igpo.types import Metrics, PolicyBatch

from .base import Divisor, Needs, all_rows, divergence, rows_with_advantage


@dataclass(frozen=True)
class Terms:
    """Means over a (micro-)batch; loss carries the gradient."""

    loss: Tensor
    clip_fraction: Tensor
    kl: Tensor
    ratio_mean: Tensor


@dataclass(frozen=True)
class Clipped:
    """The clipped policy objective with a KL term.

    epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high].   ratio: "token", or "sequence"
    (GSPO: the exponential of the mean log-ratio over the loss's tokens).   beta, kl: coefficient and estimator (k1, k2,
    k3) of the KL to the reference.   loss_type: a key of LOSS_TYPES.   kl_level: "token"; or "sequence", the estimate
    from the summed log-probs, divided by the number of tokens (ESPO, arXiv:2512.03759).   token_budget: of the loss
    type "budget" (C3PO, arXiv:2506.14731), tokens of an update.
    """

    epsilon: float
    epsilon_high: float
    ratio: str
    beta: float
    kl: str
    loss_type: str
    kl_level: str = "token"
    token_budget: int = 1

    @property
    def needs(self) -> Needs:
        return Needs(old=True, reference=self.beta > 0, level=self.ratio)

    def rows(self, advantages: Tensor) -> Tensor:
        """(N,) int64: the rows to evaluate. Without a KL term those of advantage 0 have neither loss nor gradient and
        are left out, but for one when all are: an update of gradient 0 is an update."""
        return all_rows(advantages) if self.beta > 0 else rows_with_advantage(advantages)

    def divisor(self, batch: PolicyBatch, rows: Tensor, inner: int) -> Divisor:
        """What the sums over `rows` of a batch are divided by, never less than 1: the loss by the size of the whole
        batch, the metrics by the number of tokens of `rows`."""
        mask = batch.token_mask[inner]
        kind = LOSS_TYPES[self.loss_type]
        size = float(self.token_budget) if kind.budget else kind.size(mask)
        used = float(mask.sum()) / max(1.0, size)
        return Divisor(max(1.0, size), max(1.0, float(mask[rows].sum())), used=used)

    def __call__(
        self, logprob: Tensor, batch: PolicyBatch, advantages: Tensor, inner: int, divisor: Divisor
    ) -> tuple[Tensor, Metrics]:
        """The loss of these rows, and its metrics.

        Args:
            logprob: (B, L) of inner update `inner`, with gradient.   batch: the same rows.
            advantages: (B,), or (B, L) for each token its own (with a token ratio).
            divisor: `self.divisor` of all rows that are evaluated, of which these are a part.
        Returns:
            loss: scalar.   metrics: floats; like the loss they add up over micro-batches.
        """
        kind, mask = LOSS_TYPES[self.loss_type], batch.token_mask[inner]
        old, ref = batch.old_logprob[inner], batch.ref_logprob[inner]
        old = logprob.detach() if old is None else old
        advantages = advantages.to(logprob.dtype)
        if advantages.dim() > 1:
            terms = _of_tokens(self, logprob, old, ref, advantages, mask)
        else:
            spec = self if self.kl_level == "token" else replace(self, beta=0.0)
            terms = kind.terms(spec, logprob, old, ref, advantages, mask)
        if self.kl_level == "sequence" and ref is not None:
            kl = _sequence_kl(self, logprob, ref, mask)
            terms = replace(terms, loss=terms.loss + self.beta * kl, kl=kl)
        share, of_tokens = kind.size(mask) / divisor.size, float(mask.sum()) / divisor.tokens
        hints = batch.canvas.frozen & mask
        metrics = {
            "clip_ratio/region_mean": float(terms.clip_fraction.detach()) * of_tokens,
            "kl": float(terms.kl.detach()) * of_tokens,
            "logp/ratio_mean": float(terms.ratio_mean.detach()) * of_tokens,
            "inpaint/tokens_kept_entropy": float(hints.sum()),
        }
        if kind.budget:
            metrics["budget/used"] = divisor.used * of_tokens
        return terms.loss * share, metrics


def _fused(aggregate: str) -> Callable[..., Terms]:
    """The terms by ops.policy_loss, whose own mean (`aggregate`) is over the rows it is given."""

    def terms(
        spec: Clipped,
        logprob: Tensor,
        old: Tensor,
        ref: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
    ) -> Terms:
        result = policy_loss(
            logprob, old, advantages, mask, clip=(spec.epsilon, spec.epsilon_high), ratio=spec.ratio,
            ref_logprob=ref, kl_coef=spec.beta, kl=spec.kl, aggregate=aggregate,
        )  # fmt: skip
        return Terms(result.loss, result.clip_fraction, result.kl, result.ratio_mean)

    return terms


def _of_tokens(
    spec: Clipped,
    logprob: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
) -> Terms:
    """(B, L) advantages: every token is a row of its own, weighted as the loss type says."""
    count = mask.sum(1, keepdim=True).clamp(min=1).to(logprob.dtype)
    if spec.loss_type == "grpo":
        share = 1.0 / (count * len(mask))
    else:
        total = mask.numel() if spec.loss_type == "dr_grpo" else int(mask.sum())
        share = torch.full_like(count, 1.0 / max(1, total))
    token = replace(spec, ratio="token", beta=0.0)
    x, x_old, of_mask = (value.reshape(-1, 1) for value in (logprob, old, mask))
    surrogate = _fused("sum")(token, x, x_old, None, (advantages * share).flatten(), of_mask)
    kl = torch.zeros_like(logprob) if ref is None else divergence(spec.kl, logprob, ref)
    kl = (kl.masked_fill(~mask, 0.0) * share).sum()
    return replace(surrogate, loss=surrogate.loss + spec.beta * kl, kl=kl)


def _sequence_kl(spec: Clipped, logprob: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows of the estimate from the summed log-probs, by the number of tokens."""
    total, other = (x.masked_fill(~mask, 0.0).sum(1) for x in (logprob, ref))
    return (divergence(spec.kl, total, other) / mask.sum(1).clamp(min=1)).mean()


def _constant_mean(
    spec: Clipped,
    logprob: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
) -> Terms:
    """The sum over tokens divided by all positions, whatever the mask."""
    terms = _fused("sum")(spec, logprob, old, ref, advantages, mask)
    return replace(terms, loss=terms.loss / max(1, mask.numel()))


def _released(
    spec: Clipped,
    logprob: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
) -> Terms:
    """The released IGPO code's loss: the mean over the loss's tokens, with a sequence ratio over *all* L positions.

    So a hint token that the entropy filter dropped has no term of its own, and still gets gradient through the ratio.
    The KL is k3 per token. With a token ratio nothing differs from the token mean.
    """
    if spec.ratio == "token":
        return _fused("token-mean")(spec, logprob, old, ref, advantages, mask)
    tokens = mask.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.masked_fill(~mask, 0).sum() / tokens

    ratio = (logprob - old).mean(1, keepdim=True).exp().expand_as(logprob)
    unclipped = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - spec.epsilon, 1 + spec.epsilon_high) * advantages[:, None]
    kl = torch.zeros_like(logprob) if ref is None else divergence("k3", logprob, ref)
    per_token = -torch.minimum(unclipped, clipped) + spec.beta * kl
    return Terms(mean(per_token), mean((clipped < unclipped).to(kl.dtype)), mean(kl), mean(ratio))


@dataclass(frozen=True)
class LossType:
    """terms: the mean over some rows.   size: of a (B, L) mask, what that mean divides by.   budget: the loss of the
    whole batch is divided by a constant number of tokens instead."""

    terms: Callable[..., Terms]
    size: Callable[[Tensor], float]
    budget: bool = False


LOSS_TYPES = {
    # GRPO, IGPO eq. 5: mean over sequences of the mean over their tokens
    "grpo": LossType(_fused("sequence-mean"), lambda mask: float(mask.shape[0])),
    # DAPO, and d1's code per micro-batch: mean over all tokens of the batch
    "bnpo": LossType(_fused("token-mean"), lambda mask: float(mask.sum())),
    # Dr. GRPO: the sum over tokens by the constant B * L
    "dr_grpo": LossType(_constant_mean, lambda mask: float(mask.numel())),
    # C3PO: the sum over tokens by a constant budget of them, which the likelihood does not exceed
    "budget": LossType(_fused("token-mean"), lambda mask: float(mask.sum()), budget=True),
    "released": LossType(_released, lambda mask: float(mask.sum())),
}
