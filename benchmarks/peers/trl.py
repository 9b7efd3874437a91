"""TRL: log-probability and entropy of given tokens, from logits and from hidden states in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import missing

VOCABULARY_CHUNK = 32768  # chosen: 4096 rows x 32768 bfloat16 logits = 256 MiB at a time


def why_not(device: str) -> str | None:
    return missing("trl", device)


def logprob_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, targets)


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As its trainers call it: only the rows that count are scored."""
    from trl.kernels import ChunkedLogProbFunction

    counts = targets != -100
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden[counts],
        weight,
        None,
        targets[counts],
        1.0,
        VOCABULARY_CHUNK,
        None,
        1.0,
        ("entropy",),
    )
    zeros = torch.zeros(counts.shape, device=hidden.device)
    return zeros.masked_scatter(counts, logprob), zeros.masked_scatter(counts, entropy)
