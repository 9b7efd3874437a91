"""The one place where an op's backend is chosen.

An op is a name and a list of rows, best first, the reference last. A row runs, or answers with a sentence saying why
not. `auto` takes, of the rows that were checked on this class of device and do not refuse, the one measured fastest
there (_checked.py); a forced row (`use_backend("triton")`, `IGPO_BACKEND=triton`) runs, or raises BackendError with its
reason; nothing falls back unasked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from . import _checked, _native, _triton


class BackendError(RuntimeError):
    """A forced backend cannot run; the message says which, for which op, and why."""


def _never(*args: object) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    run: phase ("forward", "backward", …) -> function of the op's positional arguments.
    devices: torch device types it serves.
    unavailable: why it cannot run on this machine, or None.
    refuses: why it cannot take these arguments (those of the phase), or None.
    checked: where its results were last held against the reference; "" = see checked.json, by class of device. `auto`
        leaves out what was checked nowhere.
    """

    name: str
    run: Mapping[str, Callable]
    devices: Collection[str]
    checked: str
    unavailable: Callable[[], str | None] = _never
    refuses: Callable[..., str | None] = _never

    def why_not(self, device: torch.device, phase: str, args: tuple) -> str | None:
        if device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, the tensors are on {device.type}"
        if phase not in self.run:
            return f"it has no {phase}"
        return self.unavailable() or self.refuses(*args)


OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Op:
    """An op and its rows. Creating one lists it in `python -m igpo.ops`."""

    name: str
    backends: tuple[Backend, ...]
    chosen: list[str] = field(default_factory=list)  # the row of the last call, for tests
    ranked: dict[torch.device, tuple[Backend, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def __call__(self, phase: str, device: torch.device, *args):
        row = self.choose(phase, device, args)
        self.chosen[:] = [row.name]
        return row.run[phase](*args)

    def choose(self, phase: str, device: torch.device, args: tuple) -> Backend:
        forced = _forced()
        if forced is None:
            for row in self.ranked.get(device) or self.rank(device):
                if row.why_not(device, phase, args) is None:
                    return row
            raise BackendError(
                f"{self.name}: no backend runs on {device}. See `python -m igpo.ops`."
            )
        for row in self.backends:
            if row.name == forced:
                reason = row.why_not(device, phase, args)
                if reason is None:
                    return row
                raise BackendError(f"{self.name}: backend {forced!r} was forced, but {reason}.")
        names = ", ".join(row.name for row in self.backends)
        raise BackendError(f"{self.name}: there is no backend {forced!r}. It has: {names}.")

    def rank(self, device: torch.device) -> tuple[Backend, ...]:
        """The checked rows in the order `auto` tries them; asked once per device, then kept."""
        named = {row.name: row for row in self.backends}
        order = _checked.fastest_first(self.name, _checked.device_class(device))
        fast = [
            named[name] for name in order if name in named and device.type in named[name].devices
        ]
        rest = [row for row in self.backends if row.checked and row not in fast]
        self.ranked[device] = tuple(fast + rest)
        return self.ranked[device]


_override: list[str] = []


def _forced() -> str | None:
    name = _override[-1] if _override else os.environ.get("IGPO_BACKEND", "auto")
    return None if name == "auto" else name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op runs on backend `name`, or raises BackendError with the reason.

    Process-wide (backward passes may run on other threads), and it binds what *runs* inside the block: a backward pass
    called after it chooses anew. "auto" undoes an outer choice.
    """
    known = {"auto"} | {row.name for op in OPS.values() for row in op.backends}
    if name not in known:
        raise BackendError(f"use_backend: name must be one of {sorted(known)}, got {name!r}.")
    _override.append(name)
    try:
        yield
    finally:
        _override.pop()


ANY_DEVICE = ("cpu", "cuda", "xpu", "mps")
CHECKED_CPU = "x86-64 (AVX-512, AVX2, portable)"


def reference(**run: Callable) -> Backend:
    """The last row of every op: plain torch, on any device."""
    return Backend("reference", run, ANY_DEVICE, checked="definition")


def cpu(*, refuses: Callable[..., str | None] = _never, **run: Callable) -> Backend:
    """The C++ row of an op."""
    return Backend("cpu", run, ("cpu",), CHECKED_CPU, _native.why_not, refuses)


def triton(
    op: str, *phases: str, refuses: Callable[..., str | None] = _never, **run: Callable
) -> Backend:
    """The Triton row of an op: the functions of kernels/gpu/<op>.py named like the phases, or those given."""
    run |= {phase: _triton.launcher(op, phase) for phase in phases}
    return Backend("triton", run, _triton.DEVICES, "", _triton.why_not, refuses)


def cuda(*, refuses: Callable[..., str | None] = _never, **run: Callable) -> Backend:
    """The CUDA row of an op."""
    return Backend("cuda", run, _native.CUDA_DEVICES, "", _native.cuda_why_not, refuses)
