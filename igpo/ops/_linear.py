"""The LM head a few rows at a time: logits in float32 without the (N, V) tensor, and the gradients through them.

Rows that do not count are left out before the first product. The products are torch's; a float32 result from bfloat16
or float16 factors comes from widening both (the weight block by block, so that no widened copy of it exists): on a CPU
torch offers no mm with a wider output, and its 16-bit mm rounds the logits (kernels/README.md has the times).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check, _rows, token_logprob

CHUNK_BYTES = 256 << 20  # of float32 logits at a time: 530 rows at V = 126464 (chosen)
MIN_ROWS = 64  # below 60 rows MKL's product has half the throughput (kernels/README.md)
BLOCK_BYTES = 4 << 20  # of widened weight at a time (0.5-8 MiB measured equal)


@dataclass(frozen=True)
class RowOp:
    """token_logprob of one backend on a chunk of logits, which `backward` may overwrite with its result."""

    forward: Callable
    backward: Callable


REFERENCE = RowOp(token_logprob.reference_forward, token_logprob.reference_backward)
CPU = RowOp(token_logprob.cpu_forward, lambda *args: token_logprob.cpu_backward(*args, out=args[2]))


def check(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int | None
) -> None:
    _check.logits(op, hidden, argument="hidden")
    _check.tensor(op, "weight", weight, dtype=hidden.dtype, device=hidden.device)
    _check.require(
        weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[-1], op,
        "weight", f"have shape (V, {hidden.shape[-1]}) with V > 0", weight,
    )  # fmt: skip
    if bias is not None:
        _check.tensor(
            op, "bias", bias, dtype=hidden.dtype, shape=weight.shape[:1], device=hidden.device
        )
    _check.require(
        chunk_rows is None or chunk_rows > 0, op, "chunk_rows", "be None or > 0", chunk_rows
    )


def default_chunk_rows(rows: int, vocab: int) -> int:
    """A tenth of the rows (with the widened weight less than an eighth of the logits), but at least 64 and at most
    256 MiB of logits."""
    return max(1, min(max(MIN_ROWS, -(-rows // 10)), CHUNK_BYTES // (4 * vocab)))


class Head:
    """hidden (…, D) through weight (V, D) and bias (V,), for the rows where keep (…,)."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, chunk_rows: int
    ) -> None:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.weight = weight
        self.wide = _rows.wide(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.wide)
        self.index = keep.reshape(-1).nonzero()[:, 0]
        self.chunk_rows = chunk_rows or default_chunk_rows(len(self.index), len(weight))
        # the part of the weight that is widened at the moment; one buffer, as fresh pages cost more than the copy
        rows = 0 if weight.dtype == self.wide else self.block_rows()
        self.block = weight.new_empty((rows, weight.shape[1]), dtype=self.wide)

    def block_rows(self) -> int:
        """Of weight widened at a time: an eighth of the chunk's bytes, at most BLOCK_BYTES."""
        vocab, width = self.weight.shape
        chunk = 4 * vocab * min(self.chunk_rows, len(self.index))
        return min(vocab, max(1, min(BLOCK_BYTES, chunk // 8) // (4 * width)))

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(row numbers (C,), their hidden states (C, D), their logits (C, V)), the last two in float32.

        The logits live in one buffer, which the next chunk overwrites.
        """
        rows = min(self.chunk_rows, len(self.index))
        buffer = self.hidden.new_empty((rows, len(self.weight)), dtype=self.wide)
        for index in self.index.split(self.chunk_rows):
            hidden = self.hidden[index].to(self.wide)
            logits = buffer[: len(index)]
            for part, weight in self.weight_blocks():
                if self.bias is None:
                    torch.mm(hidden, weight.t(), out=logits[:, part])
                else:
                    torch.addmm(self.bias[part], hidden, weight.t(), out=logits[:, part])
            yield index, hidden, logits

    def weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the weight, those rows in float32): the weight itself when it is float32 already."""
        vocab, rows = len(self.weight), len(self.block)
        if rows == 0:
            yield slice(0, vocab), self.weight
            return
        for begin in range(0, vocab, rows):
            part = slice(begin, min(begin + rows, vocab))
            yield part, self.block[: part.stop - begin].copy_(self.weight[part])


class HeadGradient:
    """Gradients of hidden, weight and bias, summed over chunks in float32; those not needed are empty tensors."""

    def __init__(self, head: Head, hidden: bool, weight: bool, bias: bool) -> None:
        def zeros(like: Tensor, needed: bool) -> Tensor:
            return like.new_zeros(like.shape if needed else (0,), dtype=head.wide)

        self.head = head
        self.needs = hidden, weight, bias
        self.hidden = zeros(head.hidden, hidden)
        self.weight = zeros(head.weight, weight)
        self.bias = zeros(head.weight[:, 0], bias)

    def add(self, index: Tensor, hidden: Tensor, grad_logits: Tensor) -> None:
        """index, hidden: of the chunk, as Head.chunks gave them."""
        needs_hidden, needs_weight, needs_bias = self.needs
        if needs_hidden:
            grad_hidden = torch.zeros_like(hidden)
            for part, weight in self.head.weight_blocks():
                grad_hidden.addmm_(grad_logits[:, part], weight)
            self.hidden[index] = grad_hidden
        if needs_weight:
            self.weight.addmm_(grad_logits.t(), hidden)
        if needs_bias:
            self.bias += grad_logits.sum(0)


def empty_gradients(
    hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What the fake implementations return: the shapes of HeadGradient."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    sized = [shape if need else (0,) for shape, need in zip(shapes, needs, strict=True)]
    return (
        hidden.new_empty(sized[0], dtype=dtype),
        hidden.new_empty(sized[1], dtype=dtype),
        hidden.new_empty(sized[2], dtype=dtype),
    )
