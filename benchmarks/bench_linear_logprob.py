"""linear_logprob against a matmul followed by the row op: time and peak memory."""

from __future__ import annotations

import pytest
import torch
from linear_cases import full_logits, run_linear
from torch import Tensor

from igpo.ops import linear_logprob, token_logprob


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(full_logits(hidden, weight), -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprob(full_logits(hidden, weight), targets)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprob(hidden, weight, targets)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("provider", ["igpo", "unfused", "eager", "compile"])
def bench_linear_logprob(
    benchmark, request, vocabulary, dtype, provider: str, trained: bool
) -> None:
    functions = {"igpo": ours, "unfused": unfused, "eager": eager}
    run_linear(
        benchmark, request, "linear_logprob", functions, vocabulary, dtype, provider, trained
    )
