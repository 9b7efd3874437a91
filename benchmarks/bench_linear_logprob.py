"""linear_logprob, forward and backward, against a matmul followed by the row op: time and peak memory."""

from __future__ import annotations

import torch
from linear_cases import exact_logits, full_logits, run_linear
from shapes import Head
from torch import Tensor

from igpo.ops import linear_logprob, token_logprob


def from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    counts = targets != -100
    logp = torch.log_softmax(logits, -1)
    chosen = logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return chosen * counts, -(logp.exp() * logp).sum(-1) * counts


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return from_logits(full_logits(hidden, weight), targets)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return from_logits(exact_logits(hidden, weight), targets)


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprob(full_logits(hidden, weight), targets)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprob(hidden, weight, targets)


def bench_linear_logprob(benchmark, request, head: Head) -> None:
    functions = {"igpo": ours, "unfused": unfused, "eager": eager}
    run_linear(benchmark, request, "linear_logprob", functions, exact, head)
