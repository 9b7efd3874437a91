"""The feed-forward half of a layer: one SwiGLU, or a mixture of them of which each token takes a few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder_config import MaskedDecoderConfig
from .layout import MIN_ROWS


class SwiGLU(nn.Module):
    def __init__(self, config: MaskedDecoderConfig, width: int | None = None) -> None:
        super().__init__()
        width = config.intermediate_size if width is None else width
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Which experts a token takes, and the weight of each; in float32, for ties in bfloat16 are common.

    softmax: the scores are probabilities over all experts. sigmoid: an expert's score stands alone, and a bias per
    expert takes part in the choice but not in the weight (loss-free balancing, arXiv:2408.15664); RL leaves it alone.
    """

    expert_bias: Tensor | None

    def __init__(self, config: MaskedDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> weights (N, K) in x's dtype, chosen (N, K) int64."""
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = logits.softmax(-1) if c.router == "softmax" else logits.sigmoid()
        choice = scores if self.expert_bias is None else scores + self.expert_bias.to(wide)
        chosen = self._within_groups(choice).topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return (weights * c.routed_scaling_factor).to(x.dtype), chosen

    def _within_groups(self, choice: Tensor) -> Tensor:
        """-inf outside the best groups; a group is as good as its two best experts together (DeepSeek-V3)."""
        c = self.config
        if c.topk_group == c.num_expert_groups:
            return choice
        grouped = choice.unflatten(-1, (c.num_expert_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(outside[..., None], float("-inf")).flatten(-2)


class Experts(nn.Module):
    """E SwiGLUs as two stacked matrices: gate_up_proj (E, 2 I, D), gate rows first, and down_proj (E, D, I)."""

    def __init__(self, config: MaskedDecoderConfig) -> None:
        super().__init__()
        experts, width, hidden = (
            config.num_experts, config.moe_intermediate_size, config.hidden_size
        )  # fmt: skip
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x (N, D), weights and chosen (N, K) -> (N, D); experts in ascending order, each on its own tokens."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.down_proj)).tolist()
        result, start = torch.zeros_like(x), 0
        for expert, count in enumerate(counts):
            picked = order[start : start + count]
            start += count
            if count:
                rows = picked // chosen.shape[1]
                y = self._expert(expert, x[rows]) * weights.flatten()[picked, None]
                result = result.index_add(0, rows, y)
        return result

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        count = len(x)
        if x.device.type == "cpu" and count < MIN_ROWS:
            x = F.pad(x, (0, 0, 0, MIN_ROWS - count))
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[expert])[:count]


class MixtureOfExperts(nn.Module):
    def __init__(self, config: MaskedDecoderConfig) -> None:
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        shared = config.shared_intermediate_size
        self.shared_experts = SwiGLU(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        result = self.experts(flat, *self.gate(flat)).view_as(x)
        return result if self.shared_experts is None else result + self.shared_experts(x)
