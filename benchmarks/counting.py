"""A policy that counts what it is asked."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igpo.models import MaskedDecoder


@dataclass
class Counting:
    """Counts the sequences `model` is given (sequences x calls), by whether they leave a graph; otherwise the model."""

    model: MaskedDecoder
    plain: int = 0
    with_graph: int = 0

    def hidden(self, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        self.count(len(tokens))
        return self.model.hidden(tokens, *args, **options)

    def hidden_of_blocks(self, noisy: Tensor, *args: Any, **options: Any) -> Tensor:
        """Counted as one forward, of twice the tokens."""
        self.count(len(noisy))
        return self.model.hidden_of_blocks(noisy, *args, **options)

    def count(self, sequences: int) -> None:
        if torch.is_grad_enabled():
            self.with_graph += sequences
        else:
            self.plain += sequences

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedDecoder:
        """A critic is a copy of the policy: of the model alone, which counts nothing."""
        return copy.deepcopy(self.model, memo)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
