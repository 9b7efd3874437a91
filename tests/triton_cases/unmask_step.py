"""The kernels of unmask_step: logits are read 16 bytes at a time."""

from __future__ import annotations

from compiling import Case

WHERE = {
    "stride_b": "i64", "stride_l": "i64", "tokens": "*i64", "eligible": "*i1", "suppress": "*i64",
    "row_ids": "*i64", "found": "*i64", "parts": "*fp64", "rows": "i64", "length": "i64", "vocab": "i32",
    "num_suppress": "i32", "mask_id": "i64", "exponent": "fp32", "inverse_bits": "i64",
}  # fmt: skip
SLICES = {"SLICES": 31, "SLICE": 4096}
DIVISIBLE = ("stride_b", "stride_l", "vocab")


def scan(dtype: str, both: bool, noise: bool, listed: bool) -> Case:
    return Case(
        "unmask_step",
        "_scan_kernel",
        {"logits": dtype, **WHERE, "temperature_bits": "i64", "gumbel_low": "u32", "gumbel_high": "u32"},
        {**SLICES, "LISTED": listed, "BOTH": both, "GUMBEL": noise},
        divisible=DIVISIBLE,
        wide=("LDG.E.EF.128",),
        options={"num_warps": 8, **({"enable_fp_fusion": False} if noise else {"maxnreg": 80})},
    )  # fmt: skip


def finish(confidence: int) -> Case:
    keys = {f"{name}_{half}": "u32" for name in ("token", "score") for half in ("low", "high")}
    results = {"candidate": "*i64", "score": "*fp32", "logprob": "*fp32", "entropy": "*fp32"}
    return Case(
        "unmask_step",
        "_finish_kernel",
        {"logits": "*bf16", **WHERE, **results, **keys},
        {
            **SLICES, "WIDTH": 32, "LISTED": True, "BOTH": True, "GUMBEL": False, "DRAWS": True,
            "CONFIDENCE": confidence, "LOG2": 0.69314718055994530942,
        },
        divisible=DIVISIBLE,
        wide=("LDG.E.EF.128",),
        options={"num_warps": 4},
    )  # fmt: skip


COMMIT = Case(
    "unmask_commit",
    "commit_kernel",
    {
        "tokens": "*i64", "eligible": "*i1", "candidate": "*i64", "num_unmask_rows": "*i64", "out": "*i64",
        "committed": "*i1", "score": "*fp32", "logprob": "*fp32", "entropy": "*fp32", "mask_id": "i64",
        "length": "i64", "num_unmask": "i64", "threshold": "fp32",
    },
    {"HAS_THRESHOLD": True, "BLOCK": 256},
    wide=(),
)  # fmt: skip

LIST = Case(
    "unmask_commit",
    "list_kernel",
    {"tokens": "*i64", "eligible": "*i1", "found": "*i64", "mask_id": "i64", "rows": "i64"},
    {"BLOCK": 2048},
    wide=(),
    options={"num_warps": 8},
)

CASES = [
    scan("*bf16", both=False, noise=False, listed=True),
    scan("*fp32", both=True, noise=False, listed=True),
    scan("*fp16", both=True, noise=True, listed=False),
    finish(0),
    COMMIT,
    LIST,
]
