"""Top-k, top-p and min-p filtering of the distribution a token is drawn from."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from igpo.config import RolloutConfig


def is_filtered(cfg: RolloutConfig) -> bool:
    return cfg.top_k > 0 or cfg.top_p < 1 or cfg.min_p > 0


def check_filters(cfg: RolloutConfig) -> None:
    """Raises ValueError for values outside their range, or a support without a bound."""
    for name, good, rule in (
        ("top_k", cfg.top_k >= 0, "not be negative, 0 for no limit"),
        ("top_p", 0 < cfg.top_p <= 1, "be in (0, 1], 1 for no limit"),
        ("min_p", 0 <= cfg.min_p <= 1, "be in [0, 1], 0 for no limit"),
    ):
        if not good:
            raise ValueError(f"denoise: {name} must {rule}, got {getattr(cfg, name)}.")
    if cfg.record_support and not cfg.top_k:
        raise ValueError(
            "denoise: record_support must come with top_k, which bounds what is stored per token, got top_k=0. Set "
            "top_k (AGRPO: 150)."
        )


def filtered(logits: Tensor, banned: Tensor, cfg: RolloutConfig) -> tuple[Tensor, Tensor]:
    """The logits with -inf where a token is filtered out, and the tokens that are left.

    Every filter looks at q = softmax(logits / temperature) (temperature 1 when it is 0) over the tokens that are not
    banned: top_p keeps the most probable ones until their mass reaches top_p, min_p those of at least min_p times
    the largest probability, top_k the k most probable. What is kept satisfies all three; the most probable token does.

    Args:
        logits: (n, c, V).   banned: (S,) int64 ids in [0, V) that are never drawn.
    Returns:
        logits of the same dtype, and (n, c, K) int64 ids, most probable first, -1 where fewer are left; K is top_k
        (more than V, too), or V without one. A row with NaN stays as it is.
    Source: top-p arXiv:1904.09751, min-p arXiv:2407.01082; in Dream's order (temperature, top-p, top-k).
    """
    x = logits.float().index_fill(-1, banned, -torch.inf) / (cfg.temperature or 1.0)
    total = x.logsumexp(-1, keepdim=True)
    if cfg.top_k:
        highest, ids = x.topk(min(cfg.top_k, x.shape[-1]), dim=-1)
    else:
        highest, ids = x.sort(dim=-1, descending=True, stable=True)
    logq = highest - total
    before = logq.exp().cumsum(-1) - logq.exp()
    kept = (before < cfg.top_p) & (highest > -torch.inf)
    if cfg.min_p:
        kept &= highest >= highest[..., :1] + log(cfg.min_p)
    kept[..., 0] = True
    # what is kept is a prefix of the order: one value per row, of which ties are cut by the order
    left = torch.full_like(logits, -torch.inf).scatter_(
        -1, ids, torch.where(kept, logits.gather(-1, ids), -torch.inf)
    )
    ids = ids.masked_fill(~kept, -1)
    more = max(0, cfg.top_k - ids.shape[-1])
    return torch.where(total.isnan(), logits, left), torch.nn.functional.pad(
        ids, (0, more), value=-1
    )
