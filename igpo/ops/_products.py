"""Products with an LM head's weight that keep their float32 sums: 16-bit factors, float32 result.

On CUDA torch.mm writes them (`out_dtype`). Elsewhere both factors are widened, the weight block by block, so that no
widened copy of it exists: a CPU's 16-bit mm rounds its result (kernels/README.md has the times).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from . import _rows

BLOCK_BYTES = 4 << 20  # of widened weight at a time on a CPU (0.5-8 MiB measured equal)
WIDE_RESULTS = ["cuda"]  # device types whose mm takes out_dtype; tests add theirs
# before 2.10 addmm(out_dtype=float32) wants its first argument in 16 bits too
ADDS_TO_WIDE = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b; out is wider than the factors, or of their dtype."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_mm(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or total = a @ b if first: what total holds is not read then."""
    if first:
        mm(a, b, total)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif ADDS_TO_WIDE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


class Products:
    """Products with weight (V, D), in `wide`: float32, or float64 of float64.

    logits_bytes: of the logits held at a time; a widened block of the weight takes an eighth of that at most.
    """

    def __init__(self, weight: Tensor, logits_bytes: int) -> None:
        self.weight, self.logits_bytes = weight, logits_bytes
        self.wide = _rows.wide(weight.dtype)
        self.direct = weight.dtype == self.wide or weight.device.type in WIDE_RESULTS

    def factor(self, hidden: Tensor) -> Tensor:
        """hidden in the dtype that `logits` and `add_weight_gradient` take it in."""
        return hidden if self.direct else hidden.to(self.wide)

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (C, V) = hidden (C, D) @ weight.T + bias; hidden as from `factor`, bias wide."""
        if self.direct and (bias is None or hidden.dtype != self.wide):
            mm(hidden, self.weight.t(), out)
            if bias is not None:
                out += bias
            return
        for part, weight in self.blocks():
            if bias is None:
                torch.mm(hidden, weight.t(), out=out[:, part])
            else:
                torch.addmm(bias[part], hidden, weight.t(), out=out[:, part])

    def hidden_gradient(self, grad: Tensor) -> Tensor:
        """grad (C, V), wide or as the weight, @ weight -> (C, D), wide."""
        out = grad.new_empty((len(grad), self.weight.shape[1]), dtype=self.wide)
        if self.direct and grad.dtype == self.weight.dtype:
            return mm(grad, self.weight, out)
        for part, weight in self.blocks():
            add_mm(out, grad[:, part].to(self.wide), weight, first=part.start == 0)
        return out

    def add_weight_gradient(
        self, total: Tensor, grad: Tensor, hidden: Tensor, *, first: bool
    ) -> None:
        """total (V, D) += grad.T @ hidden, or total = that if first; hidden as from `factor`."""
        if grad.dtype == hidden.dtype:
            add_mm(total, grad.t(), hidden, first=first)
            return
        hidden = hidden.to(self.wide)
        for part in self.parts():
            add_mm(total[part], grad[:, part].t().to(self.wide), hidden, first=first)

    @cached_property
    def block(self) -> Tensor:
        """The part of the weight that is widened at the moment: one buffer, as fresh pages cost more than the copy."""
        return self.weight.new_empty((self.block_rows, self.weight.shape[1]), dtype=self.wide)

    @cached_property
    def block_rows(self) -> int:
        vocab, width = self.weight.shape
        if self.weight.dtype == self.wide:
            return vocab
        limit = BLOCK_BYTES if self.weight.device.type == "cpu" else self.logits_bytes
        return min(vocab, max(1, min(limit, self.logits_bytes // 8) // (4 * width)))

    def parts(self) -> Iterator[slice]:
        vocab, rows = len(self.weight), self.block_rows
        for begin in range(0, vocab, rows):
            yield slice(begin, min(begin + rows, vocab))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the weight, those rows in `wide`): the weight itself when it is wide already."""
        for part in self.parts():
            if self.weight.dtype == self.wide:
                yield part, self.weight
            else:
                yield part, self.block[: part.stop - part.start].copy_(self.weight[part])


def half_scale(dtype: torch.dtype, bound: Tensor) -> Tensor | None:
    """() a power of two that brings gradients of at most `bound` near the top of float16; None for other dtypes.

    The probabilities of a flat row over 10^5 tokens lie below float16's smallest normal number; bfloat16 has the
    exponents of float32.
    """
    if dtype != torch.float16:
        return None
    largest = bound.abs().amax() if bound.numel() else bound.new_zeros(())
    usable = largest.isfinite() & (largest > 0)
    exponent = 14 - largest.where(usable, 1.0).log2().ceil()
    return exponent.clamp(-100, 100).exp2().where(usable, 1.0)
