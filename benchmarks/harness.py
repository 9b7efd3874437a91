"""What every benchmark shares: cases, rivals, the correctness gate, and how a provider is timed.

A benchmark file describes an op by *providers*: callables that take nothing and return the op's result. Before a
provider is timed its result must agree with igpo's reference. Byte counts are those the algorithm must move.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARIES = {"llada": 126464, "qwen": 151936, "small": 4099}
TINY_VOCABULARY = 517  # --tiny: the gates run on every provider, timings mean nothing
SECONDS_PER_PROVIDER = 1.5


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    providers: name -> callable; "igpo" is ours, "eager" well-written torch, "compile" torch.compile of it, "research"
    the form public research code uses. gate: the provider's result -> None, or AssertionError. bytes: memory traffic
    the algorithm cannot avoid; counted: the sentence that counts it.
    """

    name: str
    providers: Mapping[str, Callable[[], object]]
    gate: Callable[[object], None]
    bytes: int
    counted: str
    facts: Mapping[str, object] = field(default_factory=dict)


def compiled(function: Callable, request: pytest.FixtureRequest) -> Callable:
    """torch.compile of a function of tensors; skipped under --tiny (inductor takes seconds per shape)."""
    if request.config.getoption("--tiny"):
        pytest.skip("--tiny: torch.compile is not timed")
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def close(result: object, truth: object, *, rtol: float, atol: float) -> None:
    """Every tensor of result agrees with truth; the message says which does not."""
    results, truths = _tensors(result), _tensors(truth)
    assert len(results) == len(truths), f"{len(results)} results, expected {len(truths)}"
    for i, (a, b) in enumerate(zip(results, truths, strict=True)):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=rtol, atol=atol, msg=lambda m, i=i: f"result {i}: {m}"
        )


def peak_mib(run: Callable[[], object]) -> float:
    """Most memory the call held at once beyond what was allocated before it, from torch's CPU allocator events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [
            e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"
        ]
    events.sort(key=lambda e: e["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    assert isinstance(value, tuple | list), f"a provider returned {type(value).__name__}"
    return [t for entry in value for t in _tensors(entry)]


def measure(benchmark, case: Case, provider: str) -> None:
    """Gate, then time. Slow providers get fewer rounds, at least three."""
    run = case.providers[provider]
    case.gate(run())
    if benchmark.disabled:
        benchmark.pedantic(run)
        return
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    rounds = int(min(50, max(3, SECONDS_PER_PROVIDER / max(seconds, 1e-6))))
    inner = max(1, int(2e-4 / max(seconds, 1e-7)))  # calls per round, for ops of a few microseconds
    benchmark.group = case.name
    benchmark.extra_info |= {
        "provider": provider,
        "bytes": case.bytes,
        "counted": case.counted,
        **case.facts,
    }
    benchmark.pedantic(run, rounds=rounds, iterations=inner, warmup_rounds=1)
