"""The kernel of keep_top_entropy."""

from __future__ import annotations

from compiling import Case

CASES = [
    Case(
        "keep_top_entropy",
        "_keep_top_entropy_kernel",
        {"entropy": "*fp32", "candidates": "*i1", "out": "*i1", "fraction": "*fp64", "length": "i64"},
        {"BLOCK": 1024},
        divisible=("length",),
        wide=("LDG.E.128",),
    )
]  # fmt: skip
