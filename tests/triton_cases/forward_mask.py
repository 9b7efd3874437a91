"""The kernels of forward_mask: independent positions, and exact counts."""

from __future__ import annotations

from compiling import Case

CANVASES = {
    "tokens": "*i64", "maskable": "*i1", "t": "*fp64", "row_ids": "*i64", "noisy": "*i64", "masked": "*i1",
}  # fmt: skip
SCALARS = {"length": "i64", "mask_id": "i64", "key_low": "u32", "key_high": "u32"}
CASES = [
    Case(
        "forward_mask", "_forward_mask_kernel", {**CANVASES, "count": "i64", **SCALARS},
        {"BLOCK": 512}, divisible=("count", "length"),
    ),
    Case(
        "forward_mask", "_forward_mask_exact_kernel", {**CANVASES, **SCALARS},
        {"BLOCK": 1024}, divisible=("length",),
    ),
]  # fmt: skip
