"""How long planned work takes: FLOP by a rate that was measured on this device or given by the user, never a guess."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from .config import ConfigError
from .work_plan import Layers, Passes

# part of a step -> the benchmark whose rate it has
BENCHMARKS = {"rollout": "rollout", "rescue": "rollout", "predictions": "rollout"}


@dataclass(frozen=True)
class Rate:
    """tflop_per_s of a benchmark (rollout, train_step) in igpo/measured.json, with what it was measured on."""

    benchmark: str
    device: str
    threads: int | None  # of torch on a CPU; None on a GPU
    dtype: str
    model: str
    tflop_per_s: float
    date: str
    commit: str

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} threads"
        return (
            f"{self.benchmark}: {self.tflop_per_s:.4g} TFLOP/s, measured with a {self.model} {self.dtype} decoder on "
            f"{self.device}{threads}, {self.date}, {self.commit}"
        )


def read(text: str) -> list[Rate]:
    """The rates in the text of measured.json."""
    return [Rate(**entry) for entry in json.loads(text)["rates"]]


def measured() -> list[Rate]:
    return read(resources.files("igpo").joinpath("measured.json").read_text(encoding="utf-8"))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def rates_here(rates: Sequence[Rate], device: torch.device, dtype: torch.dtype) -> dict[str, Rate]:
    """benchmark -> the newest rate of this device, its threads and this dtype."""
    name, threads = device_name(device), None if device.type == "cuda" else torch.get_num_threads()
    place = (name, threads, str(dtype).removeprefix("torch."))
    here = [rate for rate in rates if (rate.device, rate.threads, rate.dtype) == place]
    return {rate.benchmark: rate for rate in sorted(here, key=lambda rate: rate.date)}


def check_tflops(tflops: float | None) -> None:
    if tflops is not None and not 0 < tflops < float("inf"):
        raise ConfigError(f"tflops must be positive and finite, got {tflops}.")


@dataclass(frozen=True)
class Line:
    """A part of a step. seconds: None without a rate."""

    part: str
    forwards: float
    flops: float
    seconds: float | None


def lines(
    parts: Mapping[str, Sequence[Passes]], layers: Layers, rates: Mapping[str, Rate], tflops: float | None
) -> list[Line]:  # fmt: skip
    """Per part; tflops, if given, is the rate of all of them. A forward and backward counts as one pass."""
    found = []
    for name, passes in parts.items():
        if not passes:
            continue
        flops = sum(layers.flops(p) for p in passes)
        rate = rates.get(BENCHMARKS.get(name, "train_step"))
        speed = tflops or (rate.tflop_per_s if rate else None)
        seconds = None if speed is None else flops / speed / 1e12
        found.append(Line(name, sum(p.count for p in passes), flops, seconds))
    return found


def totals(found: Sequence[Line], optional: str = "rescue") -> list[Line]:
    """A step without and with what may be left out."""
    kinds = {"a step": [line for line in found if line.part != optional]}
    if len(kinds["a step"]) < len(found):
        kinds = {
            "a step, no group rescued": kinds["a step"],
            "a step, every group rescued": list(found),
        }
    return [
        Line(
            name,
            sum(x.forwards for x in some),
            sum(x.flops for x in some),
            None if any(x.seconds is None for x in some) else sum(x.seconds or 0 for x in some),
        )
        for name, some in kinds.items()
    ]


def duration(seconds: float | None) -> str:
    """For people: "3.2 s", "4.1 min", "2.5 h", "12 days"; "" for None."""
    if seconds is None:
        return ""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def source(
    parts: Mapping[str, Sequence[Passes]], rates: Mapping[str, Rate], tflops: float | None, place: str
) -> list[str]:  # fmt: skip
    """What the times rest on, in words, and which rates there are none of."""
    if tflops is not None:
        return [f"times at the {tflops:g} TFLOP/s given"]
    needed = sorted(
        {BENCHMARKS.get(name, "train_step") for name, passes in parts.items() if passes}
    )
    missing = [name for name in needed if name not in rates]
    found = [f"times from {rates[name]}" for name in needed if name in rates]
    if missing:
        found.append(
            f"no rate of {' and '.join(missing)} was measured on {place}: no times from it. tflops=… gives one; "
            f"benchmarks/run.py {' '.join(missing)} and scripts/record_rates.py measure it."
        )
    return found
