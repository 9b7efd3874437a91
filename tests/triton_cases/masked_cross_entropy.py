"""The kernels of masked_cross_entropy at V = 126464."""

from __future__ import annotations

from compiling import Case
from triton_cases.token_logprob import OUT, ROWS, STRIDES, stats


def backward(logits: str, out: str, given: dict[str, str]) -> Case:
    left = {name: None for name in ("upstream", "weights", "divisor") if name not in given}
    return Case(
        "masked_cross_entropy",
        "_backward_kernel",
        {"upstream_stride": "i32", "logits": logits, **ROWS, "targets": "*i64", "row_max": "*fp32",
         "log_sum": "*fp32", "out": out, **OUT, "vocab": "i32", "ignore_index": "i64", "tiles": "i32",
         "scale2": "fp32", **given},
        {"BLOCK": 8192, **left},
        divisible=STRIDES,
        options={"num_warps": 8},
    )  # fmt: skip


CASES = [
    stats("*bf16", "*fp32", False),
    backward("*bf16", "*bf16", {"upstream": "*fp32", "weights": "*fp32", "divisor": "*i64"}),
    backward("*fp32", "*bf16", {"weights": "*fp32"}),
    Case(
        "masked_cross_entropy",
        "_sum_kernel",
        {"values": "*fp32", "divisor": "*i64", "out": "*fp32", "rows": "i64"},
        {"BLOCK": 1024},
        wide=(),
        options={"num_warps": 8},
    ),
]
