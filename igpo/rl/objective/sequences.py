"""Objectives of whole sequences: the sandwich of two bounds, preference pairs, the Bellman residual of a group.

Values are (B, 2, L) for the sandwich ("bounds") and the residual ("halves"), (B, L) for pairs; token masks (B, L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from igpo.types import Metrics, PolicyBatch

from .base import Divisor, Needs, all_rows, rows_with_advantage


@dataclass(frozen=True)
class Sandwich:
    """loss = -sum_i A_i sum_k bound_ik / (tokens of the batch): the ELBO where A >= 0; where A < 0 mixture times the
    upper bound plus (1 - mixture) times the ELBO. No ratio, no old policy, no KL.

    Source: arXiv:2510.09541 (SPG), section 3.
    """

    mixture: float

    @property
    def needs(self) -> Needs:
        return Needs(old=False, reference=False, level="sequence", draws="bounds")

    def rows(self, advantages: Tensor) -> Tensor:
        return rows_with_advantage(advantages)

    def divisor(self, batch: PolicyBatch, rows: Tensor, inner: int) -> Divisor:
        mask = batch.token_mask[inner]
        return Divisor(max(1.0, float(mask.sum())), max(1.0, float(mask[rows].sum())))

    def __call__(
        self, logprob: Tensor, batch: PolicyBatch, advantages: Tensor, inner: int, divisor: Divisor
    ) -> tuple[Tensor, Metrics]:
        mask, advantages = batch.token_mask[inner], advantages.to(logprob.dtype)[:, None]
        lower, upper = logprob.unbind(1)
        mixed = torch.lerp(lower, upper, self.mixture)
        bound = torch.where(advantages >= 0, lower, mixed).masked_fill(~mask, 0.0)
        loss = -(bound * advantages).sum() / divisor.size
        elbo = float(lower.detach().masked_fill(~mask, 0.0).sum()) / divisor.tokens
        return loss, {"logp/elbo_per_token": elbo}


@dataclass(frozen=True)
class Preference:
    """DPO with estimated log-likelihoods: loss = -log sigmoid(beta [d(chosen) - d(rejected)]), d = log pi - log pi_ref.

    Advantages say who is who: > 0 chosen, < 0 rejected, 0 neither; a group's chosen and rejected rows meet in every
    combination, and the loss is the mean over pairs.

    Source: arXiv:2305.18290 (DPO), equation 7; arXiv:2505.19223 (VRPO), section 3.1.
    """

    beta: float

    @property
    def needs(self) -> Needs:
        return Needs(old=False, reference=True, level="sequence", groups=True)

    def rows(self, advantages: Tensor) -> Tensor:
        return rows_with_advantage(advantages)

    def divisor(self, batch: PolicyBatch, rows: Tensor, inner: int) -> Divisor:
        return Divisor(1.0, max(1.0, len(rows)))

    def __call__(
        self, logprob: Tensor, batch: PolicyBatch, advantages: Tensor, inner: int, divisor: Divisor
    ) -> tuple[Tensor, Metrics]:
        mask, ref = batch.token_mask[inner], batch.ref_logprob[inner]
        assert ref is not None, "needs.reference"
        change = (logprob - ref).masked_fill(~mask, 0.0).sum(1)
        group = batch.canvas.group_ids
        pairs = (group[:, None] == group) & (advantages > 0)[:, None] & (advantages < 0)
        chosen, rejected = pairs.nonzero(as_tuple=True)
        margin = self.beta * (change[chosen] - change[rejected])
        loss = -F.logsigmoid(margin).sum() / max(1, len(chosen)) + 0.0 * change.sum()
        right = float((margin.detach() > 0).sum()) / max(1, len(chosen))
        mean = float(margin.detach().sum()) / max(1, len(chosen))
        return loss, {"dpo/accuracy": right, "dpo/margin": mean, "dpo/pairs": float(len(chosen))}


@dataclass(frozen=True)
class BellmanResidual:
    """loss = mean over rows of e1 e2, where e = d - r/beta minus its mean over the group, d = log pi - log pi_ref.

    The mean over the group stands for the value of the prompt. e1 and e2 come from two independent estimates of d, so
    that the product is an unbiased square; they are the same when the likelihood is exact. Advantages are the rewards.

    Source: arXiv:2505.15311 (TBRM), equation 6; the group mean and the two estimates are ours.
    """

    beta: float

    @property
    def needs(self) -> Needs:
        return Needs(old=False, reference=True, level="sequence", draws="halves", groups=True)

    def rows(self, advantages: Tensor) -> Tensor:
        return all_rows(advantages)

    def divisor(self, batch: PolicyBatch, rows: Tensor, inner: int) -> Divisor:
        return Divisor(max(1.0, len(batch.targets)), max(1.0, len(rows)))

    def __call__(
        self, logprob: Tensor, batch: PolicyBatch, advantages: Tensor, inner: int, divisor: Divisor
    ) -> tuple[Tensor, Metrics]:
        mask, ref = batch.token_mask[inner], batch.ref_logprob[inner]
        assert ref is not None, "needs.reference"
        change = (logprob - ref).masked_fill(~mask[:, None], 0.0).sum(-1)  # (B, 2)
        gap = change - advantages.to(change.dtype)[:, None] / self.beta
        residual = gap - _group_mean(gap, batch.canvas.group_ids)
        loss = residual.prod(1).sum() / divisor.size
        return loss, {"kl": float(change.detach().mean(1).sum()) / divisor.tokens}


def _group_mean(values: Tensor, group_ids: Tensor) -> Tensor:
    """(B, …) the mean over each row's group."""
    _, group = group_ids.unique(return_inverse=True)
    size = torch.bincount(group).to(values.dtype)
    total = values.new_zeros(len(size), *values.shape[1:]).index_add(0, group, values)
    return (total / size[:, None])[group]
