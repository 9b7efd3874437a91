"""The kernel of sample_hint_mask: it computes; what it writes are single bytes, spread by chunk."""

from __future__ import annotations

from compiling import Case

CASES = [
    Case(
        "sample_hint_mask",
        "_sample_hint_mask_kernel",
        {"trace_lengths": "*i64", "ratio": "*fp64", "row_ids": "*i64", "out": "*i1", "length": "i64",
         "low": "i64", "span": "i64", "key_low": "u32", "key_high": "u32"},
        {"CHUNKS": 64, "POSITIONS": 64},
        divisible=("length",),
        wide=(),
    )
]  # fmt: skip
