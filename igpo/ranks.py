"""Training on several processes, one device each: who computes which rows, and how results come together.

Every process holds the whole step: the same prompts, canvases, verdicts, advantages and draws. What costs time is split
by rows (denoising, scoring, forward and backward) and gathered, so that a run on N processes is the run on one, up to
the order in which gradients are added. Weights are replicated; float32 masters and moments are shared out (Updater).

    torchrun --nproc-per-node 8 -m igpo train configs/llada-8b-igpo.yaml
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(hours=1)  # chosen: the longest a process waits for another (judges may be slow)


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; alone, nothing is communicated. All methods but `own` and `parts` are collective:
    every process must call them, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of `rows` (N,): every size-th, at most one more than any other's."""
        return rows[self.rank :: self.size]

    def parts(self, rows: Tensor, size: int) -> Sequence[Tensor]:
        """The share in pieces of at most `size`; none when it is empty."""
        own = self.own(rows)
        return own.split(size) if own.numel() else ()

    def by_rows(
        self, work: Callable[[Tensor], Sequence[Tensor]], rows: Tensor, size: int
    ) -> list[Tensor]:
        """What `work` makes of all rows, at most `size` at a time, put together. A process whose share is empty does
        one row, to know what to put there."""
        own = self.own(rows)
        parts = [work(part) for part in (own if own.numel() else rows[:1]).split(size)]
        return self.together(
            [torch.cat(found)[: own.numel()] for found in zip(*parts, strict=True)], len(rows)
        )

    def together(self, own: Sequence[Tensor], total: int) -> list[Tensor]:
        """Tensors of all `total` rows, in order, of which every process gives those of its share (dimension 0)."""
        if self.size == 1:
            return list(own)
        return [self._together(x, total) for x in own]

    def _together(self, own: Tensor, total: int) -> Tensor:
        most = -(-total // self.size)
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return torch.stack(found, 1).flatten(0, 1)[:total]

    def all(self, value: Any) -> list[Any]:
        """A Python object of every process, in order of rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def added(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Key by key, the sum over the processes that have the key; in float64, in order of rank."""
        total: dict[str, float] = {}
        for part in self.all(dict(numbers)):
            for key, value in part.items():
                total[key] = total.get(key, 0.0) + value
        return total

    def add_to(self, owner: int, tensor: Tensor) -> None:
        """In place, the sum over all processes at `owner`; elsewhere the tensor is of no use afterwards."""
        if self.size > 1:
            dist.reduce(tensor, owner)

    def spread(self, owner: int, tensor: Tensor) -> None:
        """In place, what `owner` holds."""
        if self.size > 1:
            dist.broadcast(tensor, owner)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()
_current: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def ranks() -> Ranks:
    """Of the program that runs; ALONE outside `process_group`."""
    return _current.get()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """What torchrun started, for as long as the context lasts: joins the others, and takes the device LOCAL_RANK.

    Without torchrun's environment (WORLD_SIZE unset or 1) this process is alone, as it is outside the context even
    where the caller's own torch.distributed is set up: code that uses igpo as a library splits nothing unasked.
    """
    if (
        int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks().size > 1
    ):  # alone, or inside another such context
        yield ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT
    )
    token = _current.set(Ranks(dist.get_rank(), dist.get_world_size()))
    try:
        yield ranks()
    finally:
        _current.reset(token)
        dist.destroy_process_group()
