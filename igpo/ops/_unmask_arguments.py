"""The arguments of unmask_step, checked and in the order of its registered op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check, _philox

CONFIDENCES = ("prob", "margin", "entropy", "random")  # the order is that of every backend
SAMPLERS = ("icdf", "gumbel")


class Rule(NamedTuple):
    """The scalars of a call, as backends receive them."""

    mask_id: int
    num_unmask: int
    temperature: float
    confidence: str
    threshold: float | None
    sampler: str
    seed: int
    step: int

    def key(self, stream: int) -> int:
        return _philox.key(self.seed, self.step, stream)

    def stream_keys(self) -> tuple[int, int, int]:
        """Of the token, the random score and the Gumbel noise."""
        streams = (_philox.STREAM_TOKEN, _philox.STREAM_RANDOM_SCORE, _philox.STREAM_GUMBEL)
        return tuple(self.key(stream) for stream in streams)  # type: ignore[return-value]


def checked(
    op: str,
    logits: Tensor,
    tokens: Tensor,
    mask_id: int,
    num_unmask: int | Tensor,
    eligible: Tensor | None,
    temperature: float,
    confidence: str,
    threshold: float | None,
    suppress_tokens: Sequence[int] | Tensor | None,
    sampler: str,
    seed: int,
    step: int,
    row_ids: Tensor | None,
) -> tuple:
    """The arguments after (logits, tokens) of the registered op, or an error that says what is wrong."""
    _check.logits(op, logits)
    _check.require(logits.dim() == 3, op, "logits", "have 3 dimensions (B, L, V)", logits)
    (batch, length, vocab), device = logits.shape, logits.device
    _check.tensor(op, "tokens", tokens, dtype=torch.int64, shape=(batch, length), device=device)
    if eligible is not None:
        _check.tensor(
            op, "eligible", eligible, dtype=torch.bool, shape=(batch, length), device=device
        )
    if row_ids is not None:
        _check.tensor(op, "row_ids", row_ids, dtype=torch.int64, shape=(batch,), device=device)
    counts = num_unmask if isinstance(num_unmask, Tensor) else None
    rule = f"be an int >= 0 or an int64 tensor (B,)=({batch},)"
    if counts is None:
        whole = isinstance(num_unmask, (int, torch.SymInt)) and not isinstance(num_unmask, bool)
        _check.require(whole and bool(num_unmask >= 0), op, "num_unmask", rule, num_unmask)
    else:
        good = counts.dtype == torch.int64 and counts.shape == (batch,) and counts.device == device
        _check.require(good, op, "num_unmask", rule, counts, f"It must be on {device}.")
    _check.require(
        0 <= temperature < float("inf"), op, "temperature", "be finite and >= 0", temperature,
        "0 takes the argmax.",
    )  # fmt: skip
    _check.require(
        confidence in CONFIDENCES, op, "confidence", f"be one of {CONFIDENCES}", confidence
    )
    _check.require(sampler in SAMPLERS, op, "sampler", f"be one of {SAMPLERS}", sampler)
    if threshold is not None:
        _check.require(threshold == threshold, op, "threshold", "be a number or None", threshold)
        threshold = float(threshold)
    for name, value in (("seed", seed), ("step", step)):
        _check.require(-(2**63) <= value < 2**63, op, name, "fit in 64 bits", value)
    suppress = _suppressed(op, suppress_tokens, vocab, device)
    return (
        eligible, counts, suppress, row_ids, mask_id, 0 if counts is not None else num_unmask,
        float(temperature), confidence, threshold, sampler, seed, step,
    )  # fmt: skip


def _suppressed(
    op: str, ids: Sequence[int] | Tensor | None, vocab: int, device: torch.device
) -> Tensor | None:
    if ids is None or isinstance(ids, Tensor):
        if ids is not None:
            _check.tensor(op, "suppress_tokens", ids, dtype=torch.int64, device=device)
            _check.require(ids.dim() == 1, op, "suppress_tokens", "have one dimension", ids)
        return ids
    for token in ids:
        _check.require(0 <= token < vocab, op, "suppress_tokens", f"be in [0, V={vocab})", token)
    return torch.tensor(ids, dtype=torch.int64, device=device) if ids else None
