"""Where the GPU rows of the ops were last checked and how fast they were: the records of checked.json.

`scripts/gpu_check.sh` makes the measurements, `scripts/record_check.py` writes the file; nobody edits it by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_name("checked.json")
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One row of one op passed its tests on one class of GPU.

    device_class: "sm_90", by compute capability. date: ISO. sanitizer: compute-sanitizer's tool
    -> "clean", "out of time" or "not run". median_ms: benchmark case -> milliseconds, cold L2.
    """

    op: str
    backend: str
    device_class: str
    gpu: str
    driver: str
    date: str
    commit: str
    torch: str
    triton: str
    tests_passed: int
    sanitizer: Mapping[str, str]
    median_ms: Mapping[str, float]

    def place(self) -> str:
        return f"{self.gpu} ({self.device_class}), {self.date}, {self.commit}"


def parse(text: str) -> tuple[Record, ...]:
    """The records of a file's text. Raises ValueError for another format, TypeError for fields it does not know."""
    content = json.loads(text)
    if content.get("format") != FORMAT:
        raise ValueError(f"checked.json: format must be {FORMAT}, got {content.get('format')!r}.")
    return tuple(Record(**entry) for entry in content["records"])


@cache
def records() -> tuple[Record, ...]:
    return parse(PATH.read_text(encoding="utf-8"))


def device_class(device: torch.device) -> str:
    """What devices that share machine code and records are called; "" when nothing is recorded for the kind."""
    if device.type != "cuda" or torch.version.cuda is None:
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def places(op: str, backend: str, known: Iterable[Record] | None = None) -> str:
    """Where a GPU row was last checked, one place per device class; "never run on a GPU"."""
    known = records() if known is None else known
    found = [r.place() for r in known if (r.op, r.backend) == (op, backend)]
    return "; ".join(sorted(found)) or "never run on a GPU"


def fastest_first(op: str, device_class: str, known: Sequence[Record] | None = None) -> list[str]:
    """The backends of op checked on that device class, the fastest first.

    Speed is the geometric mean of a row's time over the best time, over the cases that all of them ran. Without such a
    case nothing is known about speed, and the order is that of the names.
    """
    if not device_class:
        return []
    known = records() if known is None else known
    rows = {r.backend: r for r in known if (r.op, r.device_class) == (op, device_class)}
    common = set.intersection(*(set(r.median_ms) for r in rows.values())) if rows else set()

    def slowness(backend: str) -> tuple[float, str]:
        logs = [math.log(rows[backend].median_ms[case]) for case in sorted(common)]
        return (sum(logs) / max(1, len(logs)), backend)

    return sorted(rows, key=slowness)
