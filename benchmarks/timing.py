"""How long a call takes: several providers in turn, so that what the machine does meanwhile meets all of them alike.

On a GPU a call's time is that between two CUDA events. Before each call a buffer of three times the L2 cache is read:
the call finds the cache cold and with nothing left to write back. It is read often enough for the host to have queued
the whole call before the GPU begins with it, so the time is the GPU's unless a provider waits for results in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

L2_FACTOR = 3
MOST_FLUSHES = 40  # before one call: about 2 ms; slower hosts show in the time
CALL_SECONDS = 2e-4  # CPU: calls of a few microseconds are timed in groups that last this long


@dataclass(frozen=True)
class Run:
    """What is timed: call(prepare()). prepare, untimed, makes what call may destroy."""

    call: Callable[..., object]
    prepare: Callable[[], object] | None = None

    def arguments(self) -> tuple[object, ...]:
        return () if self.prepare is None else (self.prepare(),)

    def __call__(self) -> object:
        return self.call(*self.arguments())


@dataclass(frozen=True)
class Timing:
    """Seconds. host: wall time of one call from an idle machine to its last result."""

    median: float
    p20: float
    p80: float
    least: float
    rounds: int
    host: float

    def milliseconds(self) -> dict[str, float]:
        names = ("median", "p20", "p80", "least", "host")
        return {f"{name}_ms": getattr(self, name) * 1e3 for name in names}


def summary(seconds: list[float], host: float) -> Timing:
    """Quantiles by the nearest rank."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Timing(at(0.5), at(0.2), at(0.8), ordered[0], len(ordered), host)


class L2Flush:
    """Reads three times the L2 cache of the current GPU."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self.buffer = torch.ones(L2_FACTOR * size // 4, device="cuda")
        self.out = torch.empty((), device="cuda")
        self()
        self.seconds = min(event_seconds(self) for _ in range(5))

    def __call__(self, times: int = 1) -> None:
        for _ in range(times):
            torch.sum(self.buffer, dim=0, out=self.out)


def event_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(runs: Mapping[str, Run], device: str, seconds: float) -> dict[str, Timing]:
    """Times every run for about `seconds` each, one call of each per round, the order turning from round to round."""
    return (_cuda if device == "cuda" else _cpu)(runs, seconds)


def in_turn(runs: Mapping[str, Run], device: str, rounds: int) -> dict[str, Timing]:
    """Times calls of seconds, which were made before: from an idle machine to the last result, the order turning."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in _turns(list(runs), rounds):
        times[name].append(wall(runs[name], device))
    return {name: summary(found, summary(found, 0.0).median) for name, found in times.items()}


def _turns(names: list[str], rounds: int):
    for i in range(rounds):
        first = i % len(names)
        yield from names[first:] + names[:first]


def wall(run: Run, device: str, calls: int = 1) -> float:
    """Seconds per call. With one CPU thread those of the processor: what other programs take of it does not count."""
    arguments = run.arguments()
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        run.call(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / calls


def _cpu(runs: Mapping[str, Run], seconds: float) -> dict[str, Timing]:
    first = {name: wall(run, "cpu") for name, run in runs.items()}
    calls = {
        name: 1 if runs[name].prepare else max(1, int(CALL_SECONDS / max(t, 1e-7)))
        for name, t in first.items()
    }
    total = sum(first[name] * calls[name] for name in runs)
    rounds = int(min(50, max(3, seconds * len(runs) / max(total, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in _turns(list(runs), rounds):
        times[name].append(wall(runs[name], "cpu", calls[name]))
    return {name: summary(found, summary(found, 0.0).median) for name, found in times.items()}


def _cuda(runs: Mapping[str, Run], seconds: float) -> dict[str, Timing]:
    flush = L2Flush()
    host = {name: sorted(wall(run, "cuda") for _ in range(5))[2] for name, run in runs.items()}
    covers = {name: min(MOST_FLUSHES, 1 + int(1.5 * t / flush.seconds)) for name, t in host.items()}
    total = sum(t + covers[name] * flush.seconds for name, t in host.items())
    rounds = int(min(100, max(10, seconds * len(runs) / total)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in _turns(list(runs), rounds):
        arguments = runs[name].arguments()
        flush(covers[name])
        times[name].append(event_seconds(lambda: runs[name].call(*arguments)))  # noqa: B023
    return {name: summary(found, host[name]) for name, found in times.items()}
