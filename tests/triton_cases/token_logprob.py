"""The kernels of token_logprob at V = 126464: tiles of 8192 logits, 16 bytes at a time."""

from __future__ import annotations

from compiling import Case

ROWS = {"inner": "i64", "outer_stride": "i64", "inner_stride": "i64"}
OUT = {"out_inner": "i64", "out_outer_stride": "i64", "out_inner_stride": "i64"}
STRIDES = ("outer_stride", "inner_stride", "out_outer_stride", "out_inner_stride", "vocab")


def stats(logits: str, weights: str | None, dot: bool) -> Case:
    """Shared by both ops on rows."""
    given = {"weights": weights} if weights else {}
    return Case(
        "row_stats",
        "stats_kernel",
        {"logits": logits, **ROWS, "targets": "*i64", **given, "parts": "*fp32", "rows": "i64", "vocab": "i32",
         "ignore_index": "i64", "tiles": "i32", "scale2": "fp32"},
        {"BLOCK": 8192, "PADDED": 16, "DOT": dot, **({} if weights else {"weights": None})},
        divisible=STRIDES,
        wide=("LDG.E.128",),
        options={"num_warps": 8},
    )  # fmt: skip


def backward(logits: str, out: str) -> Case:
    return Case(
        "token_logprob",
        "_backward_kernel",
        {"grad_logprob": "*fp32", "grad_entropy": "*fp32", "logits": logits, **ROWS, "targets": "*i64",
         "entropy": "*fp32", "row_max": "*fp32", "log_sum": "*fp32", "out": out, **OUT, "vocab": "i32",
         "ignore_index": "i64", "tiles": "i32", "scale": "fp32", "scale2": "fp32"},
        {"BLOCK": 8192},
        divisible=STRIDES,
        options={"num_warps": 8},
    )  # fmt: skip


CASES = [
    stats("*bf16", None, True),
    stats("*fp32", None, True),
    backward("*bf16", "*bf16"),
    backward("*fp32", "*bf16"),
    Case(
        "token_logprob",
        "_finish_kernel",
        {"logits": "*bf16", **ROWS, "targets": "*i64", "parts": "*fp32", "logprob": "*fp32", "entropy": "*fp32",
         "row_max": "*fp32", "log_sum": "*fp32", "rows": "i64", "vocab": "i32", "ignore_index": "i64", "tiles": "i32",
         "scale": "fp32", "scale2": "fp32"},
        {"PADDED": 16, "ROWS": 16},
        divisible=STRIDES,
        wide=(),
        options={"num_warps": 1},
    ),
]  # fmt: skip
