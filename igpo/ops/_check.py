"""Argument checks with one form of message: `op: argument must <rule>, got <value>. <what to do>`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"shape {tuple(value.shape)}, {dtype}, {value.device}"
    return f"{value!r}"


def require(
    condition: bool, op: str, argument: str, rule: str, got: object, advice: str = ""
) -> None:
    """Raises ValueError unless condition."""
    if not condition:
        tail = f" {advice}" if advice else ""
        raise ValueError(f"{op}: {argument} must {rule}, got {describe(got)}.{tail}")


def tensor(
    op: str,
    argument: str,
    value: object,
    *,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
    advice: str = "",
) -> None:
    """value is a tensor of (one of) dtype, of exactly `shape`, on `device`. Raises TypeError or ValueError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}.")
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    names = " | ".join(str(d).removeprefix("torch.") for d in allowed)
    require(
        value.dtype in allowed, op, argument, f"be {names}", value,
        advice or "Convert it first; nothing is cast silently.",
    )  # fmt: skip
    if shape is not None:
        require(
            tuple(value.shape) == tuple(shape),
            op,
            argument,
            f"have shape {tuple(shape)}",
            value,
            advice,
        )
    if device is not None:
        require(
            value.device == device, op, argument, f"be on {device}", value,
            "Move it first; nothing is moved silently.",
        )  # fmt: skip


def logits(op: str, value: object, *, argument: str = "logits", min_dim: int = 1) -> None:
    """value is floating (…, V) with V > 0 and a contiguous last dimension."""
    tensor(op, argument, value, dtype=LOGIT_DTYPES)
    assert isinstance(value, Tensor)
    require(value.dim() >= min_dim, op, argument, f"have at least {min_dim} dimensions", value)
    require(value.shape[-1] > 0, op, argument, "have a non-empty last dimension", value)
    require(
        value.stride(-1) == 1 or value.shape[-1] == 1, op, argument, "have a contiguous last dimension",
        value, "Call .contiguous() first.",
    )  # fmt: skip


def row_ids(op: str, value: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """(B,) int64 identities of the sequences; 0..B-1 when none are given."""
    if value is None:
        return torch.arange(rows, device=device)
    tensor(op, "row_ids", value, dtype=torch.int64, shape=(rows,), device=device)
    return value


def in_unit_interval(op: str, argument: str, value: Tensor) -> None:
    """Every element of a CPU tensor lies in [0, 1]. Called where the op runs, so that tracing never sees it; on a
    GPU nothing is looked at, as the host would have to wait."""
    if value.device.type == "cpu" and not bool(((value >= 0) & (value <= 1)).all()):
        require(False, op, argument, "lie in [0, 1]", value.tolist())
