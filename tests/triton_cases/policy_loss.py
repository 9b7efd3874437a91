"""The kernels of policy_loss: rows at both ends of the options, and the number of tokens."""

from __future__ import annotations

from compiling import Case

ROWS = {
    **dict.fromkeys(("logprob", "old", "advantages", "ref", "grad"), "*fp32"), "mask": "*i1",
    "parts": "*fp64", "sums": "*fp64",
    **dict.fromkeys(("logprob_stride", "old_stride", "advantage_stride", "mask_stride", "ref_stride"), "i64"),
    "rows": "i64", "length": "i64",
    **dict.fromkeys(("low", "high", "kl_coef", "scale"), "fp32"),
}  # fmt: skip
WIDE = ("logprob_stride", "old_stride", "mask_stride", "ref_stride", "length")
SIZES = {"PARTS": 128, "SUMS": 5, "BLOCK": 512}

CASES = [
    Case("policy_loss", "_rows_kernel", ROWS, {"SEQUENCE": s, "KL": kl, "AGGREGATE": a, **SIZES}, divisible=WIDE)
    for s, kl, a in ((False, 2, 0), (True, 1, 1))
] + [
    Case(
        "policy_loss", "_tokens_kernel",
        {"mask": "*i1", "parts": "*fp64", "stride": "i64", "rows": "i64", "length": "i64"},
        {"BLOCK": 512}, divisible=("stride", "length"), wide=(),
    ),
    Case(
        "policy_loss", "_finish_kernel",
        {"sums": "*fp64", **dict.fromkeys(("loss", "clip_fraction", "kl", "ratio_mean"), "*fp32"), "rows": "i64"},
        {"SUMS": 5, "BLOCK": 128}, wide=(),
    ),
]  # fmt: skip
