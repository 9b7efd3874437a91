"""Objectives that are sums over draws: each draw's forward and backward stand alone.

Values, token masks and old values are (B, J, L); advantages (B,), or anything that broadcasts to (B, J, L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from igpo.ops import policy_loss
from igpo.types import Metrics, PolicyBatch

from .base import Divisor, Needs, all_rows, divergence, rows_with_advantage


@dataclass(frozen=True)
class ClippedDraws:
    """The clipped policy objective with a token ratio, each draw a sample of its own.

        loss = -(1/B) sum_{i,j} w_ij sum_k [min(rho A, clip(rho) A) - beta KL],   w: batch.weight

    kl: k1, k2, k3; or k3_ratio, k3 times the ratio to the old policy, whose gradient is unbiased off policy.   kl_to:
    "reference" or "old".

    Source: arXiv:2510.04019 (AGRPO), arXiv:2509.06949 (TraceRL), arXiv:2508.13148 (MDPO).
    """

    epsilon: float
    epsilon_high: float
    beta: float
    kl: str
    kl_to: str = "reference"

    @property
    def needs(self) -> Needs:
        reference = self.beta > 0 and self.kl_to == "reference"
        return Needs(old=True, reference=reference, draws="apart", separable=True)

    def rows(self, advantages: Tensor) -> Tensor:
        return all_rows(advantages) if self.beta > 0 else rows_with_advantage(advantages)

    def divisor(self, batch: PolicyBatch, rows: Tensor, inner: int) -> Divisor:
        mask = batch.token_mask[inner][rows]
        return Divisor(max(1.0, len(batch.targets)), max(1.0, float(mask.sum())))

    def __call__(
        self, logprob: Tensor, batch: PolicyBatch, advantages: Tensor, inner: int, divisor: Divisor
    ) -> tuple[Tensor, Metrics]:
        mask, old = batch.token_mask[inner], batch.old_logprob[inner]
        old = logprob.detach() if old is None else old
        weight = batch.weight[inner] if batch.weight else None
        weight = torch.ones_like(logprob[..., :1]) if weight is None else weight.to(logprob.dtype)
        while advantages.dim() < 3:
            advantages = advantages[..., None]
        # weights are not negative, so they may go into the advantage; each token is a row of its own
        scaled = (advantages.to(logprob.dtype) * weight).expand_as(logprob)
        found = policy_loss(
            logprob.reshape(-1, 1), old.reshape(-1, 1), scaled.reshape(-1), mask.reshape(-1, 1),
            clip=(self.epsilon, self.epsilon_high), aggregate="sum",
        )  # fmt: skip
        other = old if self.kl_to == "old" else batch.ref_logprob[inner]
        kl = self._divergence(logprob, old, other).masked_fill(~mask, 0.0)
        loss = (found.loss + self.beta * (kl * weight).sum()) / divisor.size
        share = float(mask.sum()) / divisor.tokens
        return loss, {
            "clip_ratio/region_mean": float(found.clip_fraction) * share,
            "kl": float(kl.detach().sum()) / divisor.tokens,
            "logp/ratio_mean": float(found.ratio_mean) * share,
        }

    def _divergence(self, logprob: Tensor, old: Tensor, other: Tensor | None) -> Tensor:
        if other is None or self.beta == 0:
            return torch.zeros_like(logprob)
        if self.kl == "k3_ratio":
            return divergence("k3", logprob, other) * (logprob - old).exp()
        return divergence(self.kl, logprob, other)


@dataclass(frozen=True)
class Boundary:
    """A lower bound of exp(mean_j d_j) A that is a sum over draws, d_j the change of draw j's estimate since the old
    policy:

        A >= 0: A mean_j (1 + d_j);   A < 0: A mean_j exp(d_j);   loss = -mean over rows

    On the old policy its value and gradient are those of exp(mean_j d_j) A.

    Source: arXiv:2510.11683 (BGPO), section 3.2.
    """

    @property
    def needs(self) -> Needs:
        return Needs(old=True, reference=False, level="sequence", draws="apart", separable=True)

    def rows(self, advantages: Tensor) -> Tensor:
        return rows_with_advantage(advantages)

    def divisor(self, batch: PolicyBatch, rows: Tensor, inner: int) -> Divisor:
        draws = len(batch.draws[inner])
        return Divisor(max(1.0, len(batch.targets)) * draws, max(1.0, len(rows)) * draws, draws)

    def __call__(
        self, logprob: Tensor, batch: PolicyBatch, advantages: Tensor, inner: int, divisor: Divisor
    ) -> tuple[Tensor, Metrics]:
        mask, old = batch.token_mask[inner], batch.old_logprob[inner]
        old = logprob.detach() if old is None else old
        # the weights of J draws hold 1/J, the estimate of one draw does not
        change = (logprob - old).masked_fill(~mask, 0.0).sum(-1) * divisor.draws  # (B, J)
        advantages = advantages.to(logprob.dtype)[:, None]
        bound = torch.where(advantages >= 0, 1.0 + change, change.exp()) * advantages
        ratio = float(change.detach().exp().sum()) / divisor.tokens
        return -bound.sum() / divisor.size, {"logp/ratio_mean": ratio}


@dataclass(frozen=True)
class WeightedLikelihood:
    """loss = -sum_i A_i log pi(o_i), by the number of groups ("groups": a sum within each), rows or tokens.

    log pi is the sum over draws and tokens; A may be weights of any kind. No ratio, no old policy. per_length: log pi
    by the length of the completion.

    Source: REINFORCE; arXiv:2507.08838 (wd1), equation 8; arXiv:2510.08233 (DMPO), WDCE.
    """

    size: str = "groups"
    per_length: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(old=False, reference=False, level="sequence", draws="apart", separable=True)

    def rows(self, advantages: Tensor) -> Tensor:
        return rows_with_advantage(advantages)

    def divisor(self, batch: PolicyBatch, rows: Tensor, inner: int) -> Divisor:
        sizes = {
            "groups": batch.canvas.group_ids.unique().numel(),
            "rows": len(batch.targets),
            "tokens": int(batch.token_mask[inner].any(1).sum()),
        }
        return Divisor(max(1.0, sizes[self.size]), max(1.0, len(rows)))

    def __call__(
        self, logprob: Tensor, batch: PolicyBatch, advantages: Tensor, inner: int, divisor: Divisor
    ) -> tuple[Tensor, Metrics]:
        while advantages.dim() < 3:
            advantages = advantages[..., None]
        terms = logprob.masked_fill(~batch.token_mask[inner], 0.0) * advantages.to(logprob.dtype)
        if self.per_length:
            terms = terms / logprob.shape[-1]
        loglik = float(logprob.detach().sum()) / divisor.tokens
        return -terms.sum() / divisor.size, {"logp/sequence_mean": loglik}
