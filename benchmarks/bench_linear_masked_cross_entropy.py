"""linear_masked_cross_entropy against a matmul followed by the row op: time and peak memory."""

from __future__ import annotations

import pytest
import torch
from linear_cases import full_logits, run_linear
from torch import Tensor

from igpo.ops import linear_masked_cross_entropy, masked_cross_entropy


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(full_logits(hidden, weight), targets, reduction="sum")


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return masked_cross_entropy(full_logits(hidden, weight), targets)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_masked_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("provider", ["igpo", "unfused", "eager", "compile"])
def bench_linear_masked_cross_entropy(
    benchmark, request, vocabulary, dtype, provider: str, trained: bool
) -> None:
    functions = {"igpo": ours, "unfused": unfused, "eager": eager}
    run_linear(
        benchmark,
        request,
        "linear_masked_cross_entropy",
        functions,
        vocabulary,
        dtype,
        provider,
        trained,
    )
