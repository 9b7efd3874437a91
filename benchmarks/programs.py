"""What the benchmarks of whole programs share: providers of seconds, each timed on as much of the problem as it says.

Times are per unit of work (a sequence and step, a sequence), so that a provider may do fewer units a call than another.
Stages of ours are providers too, timed in turn with the rest: "stage-…", bare calls of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import memory
import rates
import torch
from harness import Case, gated
from shapes import DEVICE
from timing import Run, in_turn

from igpo.ops import _native

CPU_ROUNDS, GPU_ROUNDS = 2, 3  # a call takes seconds


@dataclass(frozen=True)
class Provider:
    """units: of work a call does.   subset: what of the problem that is, in words.   gated: its result is looked at."""

    run: Run
    units: float
    subset: str = ""
    gated: bool = True


@dataclass(frozen=True)
class Program:
    """A program on one problem.

    unit, tokens: what times are per, and the tokens of one.   flops: of a unit, as igpo.work_plan counts them, which
    plans times from the rates.   held_mib: weights and states that are there before a call.   rounds: calls timed.
    """

    op: str
    axes: Mapping[str, object]
    providers: Mapping[str, Provider]
    gate: Callable[[object], None]
    unit: str
    tokens: int
    flops: int
    counted: str
    dtype: torch.dtype
    held_mib: float
    rounds: int = GPU_ROUNDS if DEVICE == "cuda" else CPU_ROUNDS

    def case(self, providers: Mapping[str, Run]) -> Case:
        ungated = frozenset(name for name, p in self.providers.items() if not p.gated)
        return Case(
            op=self.op, axes=self.axes, providers=providers, gate=self.gate, bytes=0, counted=self.counted,
            flops=self.flops, bound="matmul", dtype=self.dtype, ungated=ungated,
        )  # fmt: skip


def measure(benchmark, program: Program) -> None:
    """Gates every provider in a first call, whose memory is taken; then times them in turn.

    Raises RuntimeError on a CPU without the native library: ours would be timed on the reference rows.
    """
    if DEVICE == "cpu" and not benchmark.disabled and (reason := _native.why_not()):
        raise RuntimeError(f"{program.op}: nothing of ours would be native here: {reason}")
    peaks: dict[str, float] = {}

    def traced(name: str, run: Run) -> Run:
        def call() -> object:
            result, peaks[name] = memory.traced(run, DEVICE)
            return result

        return Run(call)

    runs = {name: traced(name, p.run) for name, p in program.providers.items()}
    passed, skipped = gated(program.case(runs))
    if benchmark.disabled:
        benchmark.pedantic(lambda: None)
        return
    timings = in_turn(
        {n: p.run for n, p in program.providers.items() if n in passed}, DEVICE, program.rounds
    )
    best = program.flops / rates.matmul_rate(DEVICE, program.dtype)
    case = program.case(runs)
    benchmark.group = case.name
    benchmark.extra_info |= {
        "op": case.op,
        "axes": dict(case.axes),
        "unit": program.unit,
        "tokens_per_unit": program.tokens,
        "bytes": 0,
        "flops": program.flops,
        "bound": "matmul",
        "counted": program.counted,
        "best_ms": best * 1e3,
        "matmul_tflop_per_s": program.flops / best / 1e12,
        "held_mib": program.held_mib,
        "providers": {
            name: _per_unit(timing, program.providers[name], program.tokens)
            | {"peak_mib": peaks[name]}
            for name, timing in timings.items()
        },
        "skipped": skipped,
    }
    benchmark.pedantic(lambda: None)


def _per_unit(timing, provider: Provider, tokens: int) -> dict[str, object]:
    each = {k: ms / provider.units for k, ms in timing.milliseconds().items()}
    return each | {
        "rounds": timing.rounds,
        "units": provider.units,
        "subset": provider.subset,
        "tokens_per_s": tokens * 1e3 / each["median_ms"],
    }


def held_mib(model: torch.nn.Module) -> float:
    """On a GPU all that is allocated, on a CPU the weights."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    return sum(p.nbytes for p in model.parameters()) / 2**20
