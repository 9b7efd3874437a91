"""Which masked positions of a block the policy has stopped changing its mind about (KLASS)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.types import Policy

from .guidance import predicted

CHUNK = 1 << 24  # logits of the step before that exist at once; chosen: 64 MiB in float32


@dataclass
class Stability:
    """The divergences between consecutive steps of each position of the rows' current blocks.

    KL(p_t || p_{t-1}), p = softmax(logits) over the tokens that may be drawn, before filters and temperature. The step
    before is kept as hidden states, (B, block_length, D), and goes through the head a second time: V / D times less
    memory than its distributions (LLaDA-8B: 1/31; a block of 32 takes 256 KiB a row in bfloat16 instead of 15 MiB in
    float32) for as many products as the head of the step itself takes.

    Source: KLASS (arXiv:2511.05664).
    """

    policy: Policy
    cfg: RolloutConfig
    banned: Tensor  # (S,) int64, ids in [0, V) that are never drawn
    size: int  # B
    block: Tensor = field(init=False)  # (B,) the block a row was last asked about
    divergence: Tensor = field(init=False)  # (B, block_length, kl_history), the newest last
    before: list[Tensor] = field(init=False, default_factory=list)  # (B, block_length, D) each

    def __post_init__(self) -> None:
        device, shape = self.banned.device, (self.size, self.cfg.block_length, self.cfg.kl_history)
        self.block = torch.full((self.size,), -1, device=device)
        self.divergence = torch.empty(shape, device=device)

    @classmethod
    def of(cls, policy: Policy, cfg: RolloutConfig, banned: Tensor, size: int) -> Stability | None:
        """None where no rule asks."""
        asked = cfg.kl_threshold is not None and cfg.kl_history > 0
        return cls(policy, cfg, banned, size) if asked else None

    def update(
        self, rows: Tensor, blocks: Tensor, places: Tensor, states: list[Tensor], logits: Tensor
    ) -> Tensor:
        """(M,) bool: the last kl_history divergences, of this block alone, are all below kl_threshold.

        Args:
            rows, blocks, places: (M,) int64 of each masked position: its row, the row's block and the place in it.
            states: (M, D) hidden states of this step; a second one without what was given, with guidance.
            logits: (M, V) of them.
        """
        assert self.cfg.kl_threshold is not None, "made where it is set"
        if not self.before:
            shape = *self.divergence.shape[:2], states[0].shape[-1]
            self.before = [x.new_zeros(shape) for x in states]
        at, begins = (rows, places), self.block[rows] != blocks
        newest = self._divergences(logits, [x[at] for x in self.before])
        past = torch.cat((self.divergence[at][:, 1:], newest[:, None]), 1)
        past = past.masked_fill(begins[:, None], torch.inf)
        self.divergence[at], self.block[rows] = past, blocks
        for kept, new in zip(self.before, states, strict=True):
            kept[at] = new
        return (past < self.cfg.kl_threshold).all(-1)

    def _divergences(self, logits: Tensor, before: list[Tensor]) -> Tensor:
        """(M,) float32, nats."""
        size = max(1, CHUNK // logits.shape[1])
        found = [
            self._divergence(now, list(then))
            for now, *then in zip(logits.split(size), *(x.split(size) for x in before), strict=True)
        ]
        return torch.cat(found)

    def _divergence(self, logits: Tensor, before: list[Tensor]) -> Tensor:
        old = predicted(self.policy, before, self.cfg.cfg_scale)
        now, then = (
            x.float().index_fill(-1, self.banned, -torch.inf).log_softmax(-1) for x in (logits, old)
        )
        # a token of probability 0 adds 0, whatever it was
        return (now.exp() * (now - then)).masked_fill_(now == -torch.inf, 0).sum(-1)


def check_stability(cfg: RolloutConfig) -> None:
    """Raises ValueError for a bound that is none, or one without a threshold of confidence."""
    if cfg.kl_history < 0:
        raise ValueError(f"denoise: kl_history must be >= 0, got {cfg.kl_history}.")
    if cfg.kl_threshold is None:
        return
    if not cfg.kl_threshold > 0:
        raise ValueError(
            f"denoise: kl_threshold must be positive, inf for no bound, got {cfg.kl_threshold}."
        )
    if cfg.threshold is None:
        raise ValueError(
            f"denoise: kl_threshold must come with threshold, the confidence KLASS asks for as well, got kl_threshold="
            f"{cfg.kl_threshold} alone. Set threshold (KLASS: 0.9)."
        )
