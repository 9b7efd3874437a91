"""keep_top_entropy: IGPO's entropy filter on hint tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _native
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register


def reference_forward(entropy: Tensor, candidates: Tensor, fraction: float) -> Tensor:
    count = candidates.sum(1)
    keep = torch.where(count > 0, (count.double() * fraction).floor().long().clamp(min=1), 0)
    known = torch.where(entropy.isnan(), -torch.inf, entropy)
    # candidates first (stable: lower position first among equals), each group by entropy
    order = known.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~candidates).gather(1, order).long().argsort(dim=1, stable=True))
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return candidates & (rank < keep[:, None])


def _cpu_forward(entropy: Tensor, candidates: Tensor, fraction: float) -> Tensor:
    entropy, candidates = entropy.contiguous(), candidates.contiguous()
    out = torch.empty_like(candidates)
    _native.module().keep_top_entropy(
        entropy.data_ptr(), candidates.data_ptr(), out.data_ptr(), entropy.shape[0], entropy.shape[1],
        fraction, _native.num_threads(),
    )  # fmt: skip
    return out


def _cuda_forward(entropy: Tensor, candidates: Tensor, fraction: float) -> Tensor:
    entropy, candidates = entropy.contiguous(), candidates.contiguous()
    out = torch.empty_like(candidates)
    _native.cuda("keep_top_entropy", out.device, entropy, candidates, out, *out.shape, fraction)
    return out


def _refuses(entropy: Tensor, *_: object) -> str | None:
    return None if entropy.dtype == torch.float32 else "it takes float32 entropies, not float64"


OP = Op(
    "keep_top_entropy",
    (
        cuda(forward=_cuda_forward, refuses=_refuses),
        triton("keep_top_entropy", "forward", refuses=_refuses),
        cpu(forward=_cpu_forward, refuses=_refuses),
        reference(forward=reference_forward),
    ),
)

_op = register(
    "keep_top_entropy(Tensor entropy, Tensor candidates, float fraction) -> Tensor",
    lambda entropy, *args: OP("forward", entropy.device, entropy, *args),
    lambda entropy, candidates, fraction: candidates.new_empty(candidates.shape),
)


def keep_top_entropy(entropy: Tensor, candidates: Tensor, fraction: float) -> Tensor:
    """The candidates of highest entropy in each row: which hint tokens enter the loss.

        kept = the max(1, floor(fraction n)) candidates of highest entropy, n = candidates in the row; none if n = 0

    Args:
        entropy: (B, L) float32, nats; read only at candidates in effect. NaN ranks below everything. float64: the
            reference alone.
        candidates: (B, L) bool, e.g. hint positions.
        fraction: tau in (0, 1].
    Returns:
        (B, L) bool, a subset of candidates. Equal entropies: the lower position first.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, or fraction outside (0, 1].
    Source: arXiv:2509.10396, section 3 (entropy-based gradient filtering, tau).
    """
    op = OP.name
    _check.tensor(op, "entropy", entropy, dtype=(torch.float32, torch.float64))
    _check.require(entropy.dim() == 2, op, "entropy", "have shape (B, L)", entropy)
    _check.tensor(
        op, "candidates", candidates, dtype=torch.bool, shape=entropy.shape, device=entropy.device
    )
    _check.require(0 < fraction <= 1, op, "fraction", "lie in (0, 1]", fraction)
    return _op(entropy.detach(), candidates, float(fraction))
