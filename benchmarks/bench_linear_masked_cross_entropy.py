"""linear_masked_cross_entropy, forward and backward, against a matmul followed by the row op: time and peak memory."""

from __future__ import annotations

import torch
from linear_cases import exact_logits, full_logits, run_linear
from shapes import Head
from torch import Tensor

from igpo.ops import linear_masked_cross_entropy, masked_cross_entropy


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(full_logits(hidden, weight), targets, reduction="sum")


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(exact_logits(hidden, weight), targets, reduction="sum")


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return masked_cross_entropy(full_logits(hidden, weight), targets)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_masked_cross_entropy(hidden, weight, targets)


def bench_linear_masked_cross_entropy(benchmark, request, head: Head) -> None:
    functions = {"igpo": ours, "unfused": unfused, "eager": eager}
    run_linear(benchmark, request, "linear_masked_cross_entropy", functions, exact, head)
