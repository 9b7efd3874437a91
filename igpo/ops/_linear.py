"""The LM head a few rows at a time: logits in float32 without the (N, V) tensor, and the gradients through them.

Rows that do not count are left out before the first product. On a GPU their number is known on the device alone, so
the host waits for it once; where it may not wait (while a CUDA graph is captured, under torch.compile) all rows are
computed, and the row ops skip those that do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check, _rows, _triton, token_logprob
from ._products import Products, half_scale
from .masked_cross_entropy import cuda_forward_with_gradient

CHUNK_BYTES = 256 << 20  # of float32 logits at a time on a CPU: 530 rows at V = 126464 (chosen)
MIN_ROWS = 64  # below 60 rows MKL's product has half the throughput (kernels/README.md)
# of logits and their gradient on a GPU: 1024 rows of float32 logits and 2048 of their bfloat16 gradient at V = 126464
WORKSPACE_BYTES = 1 << 30
MOST_ROWS = 4096  # of logits on a GPU: more rows make no product faster
TILE_ROWS = 128  # rows of a matrix product's tile on a GPU

Rows = Tensor | slice  # numbers of the rows in a chunk (C,), or the rows from … to …


@dataclass(frozen=True)
class RowOp:
    """The row ops of one backend on a chunk of logits (C, V).

    forward, backward: token_logprob's; backward takes `out` too, for the gradient: in the logits' dtype or, if narrow,
    in that of the LM head; logits itself where the two are the same; None allocates.
    fused: masked_cross_entropy's losses and gradient in one kernel, where there is one.
    default_rows: (rows that count, vocabulary) -> rows of logits at a time.
    """

    forward: Callable
    backward: Callable
    narrow: bool
    default_rows: Callable[[int, int], int]
    fused: Callable | None = None

    def loss_gradient(
        self, logits: Tensor, targets: Tensor, weights: Tensor, ignore_index: int, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(weights * cross-entropies (C,), the gradient of their sum (C, V))."""
        if self.fused is not None:
            losses, _, _, grad = self.fused(logits, targets, weights, ignore_index, None, out)
            return losses, grad
        logprob, *stats = self.forward(logits, targets, 1.0, ignore_index)
        zeros = torch.zeros_like(weights)
        grad = self.backward(-weights, zeros, logits, targets, *stats, 1.0, ignore_index, out)
        return -weights * logprob, grad


def cpu_rows(rows: int, vocab: int) -> int:
    """A tenth of the rows (with the widened weight less than an eighth of the logits), but at least 64 and at most
    256 MiB of logits."""
    return max(1, min(max(MIN_ROWS, -(-rows // 10)), CHUNK_BYTES // (4 * vocab)))


def gpu_rows(rows: int, vocab: int) -> int:
    """Chunks of about equal size, of whole tiles, whose logits take half of the workspace.

    A chunk reads the whole weight, which takes as long as the product of 184 rows (kernels/README.md).
    """
    most = WORKSPACE_BYTES // 2 // (4 * vocab) // TILE_ROWS * TILE_ROWS
    most = min(max(most, TILE_ROWS), MOST_ROWS)
    share = -(-rows // max(1, -(-rows // most)))
    return max(1, -(-share // TILE_ROWS)) * TILE_ROWS


REFERENCE = RowOp(
    token_logprob.reference_forward, lambda *args: token_logprob.reference_backward(*args[:-1]),
    False, cpu_rows,
)  # fmt: skip
CPU = RowOp(token_logprob.cpu_forward, token_logprob.cpu_backward, False, cpu_rows)
TRITON = RowOp(
    _triton.launcher("token_logprob", "forward"), _triton.launcher("token_logprob", "backward"),
    True, gpu_rows,
)  # fmt: skip
CUDA = RowOp(
    token_logprob.cuda_forward, token_logprob.cuda_backward, True, gpu_rows,
    cuda_forward_with_gradient,
)  # fmt: skip


def check(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int | None
) -> None:
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        _check.require(
            not hasattr(value, "full_tensor"), op, name, "be a local tensor", value,
            "Call .full_tensor() (a sharded parameter) or .to_local() (a replicated one) first.",
        )  # fmt: skip
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


def may_wait(device: torch.device) -> bool:
    """Whether the host may ask the device how many rows count: not under torch.compile, nor in a CUDA graph."""
    if device.type == "cpu":
        return True
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


class Head:
    """hidden (…, D) through weight (V, D) and bias (V,), for the rows where keep (…,).

    targets: (…,) -> (N,), ignore_index where not keep.   compact: leave those rows out before the first product.
    """

    def __init__(
        self, row_op: RowOp, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        keep: Tensor, ignore_index: int, chunk_rows: int, compact: bool,
    ) -> None:  # fmt: skip
        self.row_op, self.weight = row_op, weight
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.keep = keep.reshape(-1)
        self.targets = targets.reshape(-1).masked_fill(~self.keep, ignore_index)
        compact = compact and may_wait(hidden.device)
        self.index = self.keep.nonzero()[:, 0] if compact else None
        self.count = len(self.keep if self.index is None else self.index)
        vocab = len(weight)
        self.chunk_rows = chunk_rows or row_op.default_rows(self.count, vocab)
        self.wide = _rows.wide(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.wide)
        self.products = Products(weight, 4 * vocab * min(self.chunk_rows, self.count))
        left = WORKSPACE_BYTES - 4 * vocab * self.chunk_rows
        # a weight gradient is read and written once per group of chunks; a chunk_rows that was asked for is kept to
        group = 1 if chunk_rows or not row_op.narrow else left // (2 * vocab * self.chunk_rows)
        self.gradient_chunks = max(1, group)

    def chunks(self) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """(rows, their hidden states (C, D) as products take them, their logits (C, V), float32 or wider).

        The logits live in one buffer, which the next chunk overwrites.
        """
        rows = min(self.chunk_rows, self.count)
        buffer = self.hidden.new_empty((rows, len(self.weight)), dtype=self.wide)
        for begin in range(0, self.count, max(1, rows)):
            chosen = self.rows(begin, min(begin + rows, self.count))
            hidden = self.hidden[chosen]
            if self.index is None:  # NaN times a gradient of 0 would reach the weight's
                hidden = hidden.masked_fill(~self.keep[chosen][:, None], 0.0)
            hidden = self.products.factor(hidden)
            logits = buffer[: len(hidden)]
            self.products.logits(hidden, self.bias, logits)
            yield chosen, hidden, logits

    def rows(self, begin: int, end: int) -> Rows:
        return slice(begin, end) if self.index is None else self.index[begin:end]


class HeadGradient:
    """Gradients of hidden, weight and bias, summed over chunks in float32; those not needed are empty tensors.

    bound: (N,) >= 0, no less than the gradient of the logits in a row that counts (only float16 asks).
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], bound: Tensor) -> None:
        self.head, self.needs = head, needs
        hidden, weight, bias = needs
        self.hidden = head.hidden.new_zeros(head.hidden.shape if hidden else (0,), dtype=head.wide)
        self.weight = head.weight.new_empty(head.weight.shape if weight else (0,), dtype=head.wide)
        self.bias = head.weight.new_zeros(len(head.weight) if bias else (0,), dtype=head.wide)
        self.scale = None
        if head.row_op.narrow:
            self.scale = half_scale(head.weight.dtype, bound.masked_fill(~head.keep, 0.0))
        self.buffer: Tensor | None = None
        self.waiting: list[Tensor] = []  # hidden states whose weight gradient is not summed yet
        self.first = True

    def scaled(self, factors: Tensor) -> Tensor:
        """factors of a chunk's gradient, as the row op shall take them."""
        return factors if self.scale is None else factors * self.scale

    def room(self, logits: Tensor) -> Tensor | None:
        """Where the row op may write the gradient of the next chunk of logits."""
        head = self.head
        if not head.row_op.narrow or logits.dtype == head.weight.dtype:
            return logits
        chunks = head.gradient_chunks if self.needs[1] else 1
        if self.buffer is None:
            rows = min(chunks * head.chunk_rows, head.count)
            self.buffer = logits.new_empty((rows, logits.shape[1]), dtype=head.weight.dtype)
        begin = len(self.waiting) * head.chunk_rows
        return self.buffer[begin : begin + len(logits)]

    def add(self, rows: Rows, hidden: Tensor, grad_logits: Tensor) -> None:
        """rows, hidden: of the chunk, as Head.chunks gave them; grad_logits: of the row op."""
        if self.needs[0]:
            self.hidden[rows] = self.unscaled(self.head.products.hidden_gradient(grad_logits))
        if self.needs[2]:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)
        if not self.needs[1]:
            return
        self.waiting.append(hidden)
        if self.buffer is None:
            self.add_to_weight(grad_logits)
        elif len(self.waiting) == self.head.gradient_chunks:
            self.add_to_weight(self.buffer)

    def add_to_weight(self, grad_logits: Tensor) -> None:
        hidden = self.waiting[0] if len(self.waiting) == 1 else torch.cat(self.waiting)
        self.head.products.add_weight_gradient(
            self.weight, grad_logits[: len(hidden)], hidden, first=self.first
        )
        self.waiting.clear()
        self.first = False

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums over all chunks: hidden (N, D), weight (V, D), bias (V,)."""
        if self.waiting:
            assert self.buffer is not None
            self.add_to_weight(self.buffer)
        if self.first:
            self.weight.zero_()
        if self.scale is not None:
            self.weight /= self.scale
            self.bias /= self.scale
        return self.hidden, self.weight, self.bias

    def unscaled(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x.div_(self.scale)


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
