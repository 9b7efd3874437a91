"""What the tests of the row ops share: torch's own formulas, examples, peak memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from gpu import is_slow
from torch import Tensor

IGNORED = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(logits (…, V), targets (…,)): every third row is ignored."""
    logits = (torch.randn(shape) * 3).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1])
    targets.view(-1)[1::3] = IGNORED
    return logits, targets


def logprob_formula(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """token_logprob in torch's operations, in the dtype of logits. An ignored row is replaced before it is used."""
    skip = targets == IGNORED
    x = logits.masked_fill(skip[..., None], 0.0) / temperature
    logp = torch.log_softmax(x, -1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    chosen = logp.gather(-1, targets.masked_fill(skip, 0)[..., None])[..., 0]
    return chosen.masked_fill(skip, 0.0), entropy.masked_fill(skip, 0.0)


def loss_formula(logits: Tensor, targets: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """masked_cross_entropy in torch's operations, in the dtype of logits."""
    rows = -logprob_formula(logits, targets)[0]
    if weights is not None:
        rows = torch.where(weights == 0, 0.0, rows * weights.to(rows.dtype))
    if reduction == "none":
        return rows
    return rows.sum() / (max(1, int((targets != IGNORED).sum())) if reduction == "mean" else 1)


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], seed: int = 7) -> list[Tensor]:
    """Of the leaves, for the same random upstream gradients whatever dtype the outputs have."""
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in outputs]
    return list(torch.autograd.grad(outputs, leaves, upstream))


def leaf(x: Tensor) -> Tensor:
    """x, same strides, as a leaf that requires grad."""
    return x.detach().requires_grad_()


def memory_sizes(backend: str) -> tuple[int, int, int | None]:
    """(rows, vocabulary, chunk_rows) whose chunk is at most a tenth of the rows, for the linear ops' peak memory."""
    if is_slow(backend):
        return 48, 4001, 2
    return 1024, 20011, 51 if backend in ("triton", "cuda") else None


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory the call held at once beyond what was allocated before it, on the default device."""
    if torch.get_default_device().type == "cuda":
        run()  # cuBLAS keeps a workspace
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [
            e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"
        ]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
