"""Sequences of different length without padding: which of them share a row, and a policy that sees the row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity` tokens: the longest first, each into the first row it fits.

    Deterministic; of equal lengths the lower index goes first. At most 11/9 of the fewest rows possible, plus 6/9.

    >>> first_fit_decreasing([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]

    Raises:
        ValueError: a length that is not in [1, capacity].
    Source: Dosa, "The tight bound of first fit decreasing bin-packing algorithm", 2007 (the bound).
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(
                f"first_fit_decreasing: lengths must be in [1, {capacity}], got {length} at {index}. "
                "Raise the capacity; sequences are never cut."
            )
        row = next((row for row, left in enumerate(free) if length <= left), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(index)
        free[row] -= length
    return rows


class WithoutPadding:
    """A MaskedDecoder as a Policy that computes a padded batch as one row of documents, without the padding.

    Same results and gradients as the model's own on real tokens; zeros on padding. Anything else is the model's.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden(self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """As MaskedDecoder.hidden."""
        return _packed(self.model.hidden, (tokens,), attention_mask, position_ids)

    def hidden_of_blocks(
        self, noisy: Tensor, clean: Tensor, attention_mask: Tensor | None, position_ids: Tensor
    ) -> Tensor:
        """As MaskedDecoder.hidden_of_blocks."""
        return _packed(self.model.hidden_of_blocks, (noisy, clean), attention_mask, position_ids)


def _packed(
    hidden: Callable[..., Tensor], tokens: tuple[Tensor, ...], mask: Tensor | None, position_ids: Tensor
) -> Tensor:  # fmt: skip
    first = tokens[0]
    real = torch.ones_like(first, dtype=torch.bool) if mask is None else mask.bool()
    rows = torch.arange(len(first), device=first.device)[:, None].expand_as(real)
    flat = [x[real][None] for x in (*tokens, position_ids, rows)]
    states = hidden(*flat[:-2], None, flat[-2], document_ids=flat[-1])[0]
    return states.new_zeros(*real.shape, states.shape[-1]).index_put((real,), states)
