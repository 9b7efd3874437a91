"""The most memory a call holds at once beyond what was allocated before it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from timing import Run


def peak_mib(run: Run, device: str) -> float:
    return traced(run, device)[1]


def traced(run: Run, device: str) -> tuple[object, float]:
    """The call's result, and its peak in MiB."""
    result, peak = (_cuda if device == "cuda" else _cpu)(run)
    return result, peak / 2**20


def _cuda(run: Run) -> tuple[object, int]:
    arguments = run.arguments()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run.call(*arguments)
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def _cpu(run: Run) -> tuple[object, int]:
    """From torch's CPU allocator events; what C++ allocates for itself is not among them."""
    arguments = run.arguments()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = run.call(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return result, peak
