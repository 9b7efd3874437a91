"""What is made of advantages once the batch's log-probs under the old policy and the reference are known.

A reweighing is a function (graded, batch, advantages, inner) -> advantages of inner update `inner`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpo.types import Graded, PolicyBatch

from .advantage import group_softmax


def unchanged(graded: Graded, batch: PolicyBatch, advantages: Tensor, inner: int) -> Tensor:
    """The advantages, whatever the log-probs."""
    return advantages


def target_weights(
    graded: Graded,
    batch: PolicyBatch,
    advantages: Tensor,
    inner: int,
    *,
    alpha: float,
    baseline: str,
) -> Tensor:
    """w_i - b_i with w = softmax_i(log p_ref - log q + r/alpha) within the group, q the policy that rolled out.

    baseline: "negative", b = softmax_i(log p_ref - log q - r/alpha); "group", b = 1/G; "none", b = 0. The log-probs are
    those of the first inner update's draws; advantages are the rewards.

    Source: arXiv:2510.08233 (DMPO), section 3 and its released code.
    """
    old, ref = batch.old_logprob[0], batch.ref_logprob[0]
    assert old is not None, "always_old"
    assert ref is not None, "needs.reference"
    change = (ref - old).flatten(1).double().sum(1)
    _, group = batch.canvas.group_ids.unique(return_inverse=True)
    tilt = advantages.double() / alpha
    weights = group_softmax(change + tilt, group)
    if baseline == "negative":
        weights = weights - group_softmax(change - tilt, group)
    elif baseline == "group":
        weights = weights - 1.0 / torch.bincount(group).double()[group]
    return weights.float()


def behaviour(
    graded: Graded, batch: PolicyBatch, advantages: Tensor, inner: int, *, cap: float
) -> Tensor:
    """(B, L): A_i min(pi_old(o^k) / p(o^k at its commit), cap), pi_old the likelihood's estimate under the old policy.

    Corrects for completions that come from the real sampler while the objective differentiates an estimate of it.
    Tokens the sampler did not draw (hints, EOS fill) keep their advantage.

    Source: arXiv:2510.02212 (DiFFPO), its equation 12; token level and the truncation at a cap are our reading.
    """
    old, rollouts = batch.old_logprob[inner], graded.rollouts
    assert old is not None, "always_old"
    drawn = (rollouts.step_map >= 0) & (rollouts.step_map < rollouts.num_steps[:, None])
    weight = (old - rollouts.commit_logprob).exp().clamp(max=cap)
    return advantages[:, None] * torch.where(drawn, weight, 1.0).to(advantages.dtype)
