"""The kernel of merge_hints: 64-bit tokens, two to a 16-byte access."""

from __future__ import annotations

from compiling import Case

CASES = [
    Case(
        "merge_hints",
        "_merge_hints_kernel",
        {"tokens": "*i64", "hints": "*i64", "hint_mask": "*i1", "out": "*i64", "generate": "*i1",
         "count": "i64", "mask_id": "i64"},
        {"BLOCK": 1024},
        divisible=("count",),
    )
]  # fmt: skip
