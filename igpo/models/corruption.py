"""Forward processes: what noise does to a sequence. [MASK] for the models here; uniform tokens for those to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from igpo.ops import _philox, forward_mask


class Corruption(Protocol):
    """q(z_t | x): each token independently stays with probability 1 - t, else is replaced by noise."""

    def corrupt(
        self,
        tokens: Tensor,
        corruptible: Tensor,
        t: Tensor,
        *,
        seed: int,
        step: int = 0,
        row_ids: Tensor | None = None,
        exact: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Noises tokens.

        Args:
            tokens: (B, L) int64. Not modified.
            corruptible: (B, L) bool, which positions may be noised.
            t: (B,) float32 | float64 in [0, 1], the share of noise per sequence.
            seed, step, row_ids, exact: as igpo.ops.forward_mask.
        Returns:
            noisy: (B, L) int64.   corrupted: (B, L) bool, the positions that got noise. Those of all processes are the
            same for the same seed. A position depends on (seed, step, row id, position) only.
        Raises:
            TypeError, ValueError: as igpo.ops.forward_mask.
        """
        ...


@dataclass(frozen=True)
class Absorbing:
    """Noise is [MASK]: a noised position shows that it is. Source: arXiv:2502.09992 (LLaDA), equation 1."""

    mask_id: int

    def corrupt(
        self, tokens: Tensor, corruptible: Tensor, t: Tensor, *, seed: int, step: int = 0,
        row_ids: Tensor | None = None, exact: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return forward_mask(
            tokens, corruptible, t, mask_id=self.mask_id, seed=seed, step=step, row_ids=row_ids, exact=exact
        )  # fmt: skip


@dataclass(frozen=True)
class Uniform:
    """Noise is any token of the vocabulary, the one that was there included; special tokens can be left out.

    Source: arXiv:2107.03006 (D3PM), section 3.1, in continuous time: q(z_t | x) = (1 - t) x + t / V.
    """

    vocab_size: int
    excluded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wrong = [token for token in self.excluded if not 0 <= token < self.vocab_size]
        if wrong or len(set(self.excluded)) >= self.vocab_size:
            raise ValueError(
                f"Uniform: excluded must be ids in [0, {self.vocab_size}), not all of them, got {self.excluded}."
            )

    def corrupt(
        self, tokens: Tensor, corruptible: Tensor, t: Tensor, *, seed: int, step: int = 0,
        row_ids: Tensor | None = None, exact: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        _, corrupted = forward_mask(
            tokens, corruptible, t, mask_id=0, seed=seed, step=step, row_ids=row_ids, exact=exact
        )
        noise = self._noise(tokens, _philox.key(seed, step, _philox.STREAM_NOISE), row_ids)
        return torch.where(corrupted, noise, tokens), corrupted

    def _noise(self, tokens: Tensor, key: int, row_ids: Tensor | None) -> Tensor:
        rows, columns = tokens.shape
        if row_ids is None:
            row_ids = torch.arange(rows, device=tokens.device)
        position = torch.arange(columns, device=tokens.device)
        # index 0 decides which positions are noised (forward_mask), index 1 by what
        high, low, *_ = _philox.philox(key, position[None, :], 1, row_ids[:, None])
        allowed = torch.ones(self.vocab_size, dtype=torch.bool, device=tokens.device)
        allowed[list(self.excluded)] = False
        allowed = allowed.nonzero()[:, 0]
        place = (_philox.uniform53(high, low) * len(allowed)).long()
        return allowed[place]
