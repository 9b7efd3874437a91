"""unmask_step: one denoising commit of a masked-diffusion language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native, _philox, _sampling
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register
from ._unmask_arguments import CONFIDENCES, Rule, checked

CHUNK = 1 << 22  # logits the reference holds in float64 at once; chosen


class UnmaskResult(NamedTuple):
    """What `unmask_step` returns; all (B, L)."""

    tokens: Tensor
    committed: Tensor
    score: Tensor
    logprob: Tensor
    entropy: Tensor


def _statistics(x: Tensor, rule: Rule, position: Tensor, row_id: Tensor) -> tuple[Tensor, ...]:
    """(token, valid, score, logprob, entropy), each (N,), of N rows of float64 logits."""
    top = x.amax(-1, keepdim=True)
    valid = ~x.isnan().any(-1) & top[:, 0].isfinite()
    x = torch.where(valid[:, None], x, 0.0)
    log_p = torch.log_softmax(x, -1)
    tempered = rule.temperature not in (0.0, 1.0)
    log_q = (
        torch.log_softmax((x - x.amax(-1, keepdim=True)) / rule.temperature, -1)
        if tempered
        else log_p
    )
    if rule.temperature == 0:
        token = x.argmax(-1)
    elif rule.sampler == "gumbel":
        key = rule.key(_philox.STREAM_GUMBEL)
        token = _sampling.gumbel_argmax(x, rule.temperature, key, position, row_id)
    else:
        token = _sampling.inverse_cdf(log_q.exp(), rule.key(_philox.STREAM_TOKEN), position, row_id)
    if rule.confidence == "prob":
        score = log_p.gather(-1, token[:, None])[:, 0].exp()
    elif rule.confidence == "margin":
        best = log_p.topk(min(2, x.shape[1]), -1).values.exp()
        score = best[:, 0] - best[:, 1:].sum(-1)
    elif rule.confidence == "entropy":
        score = -torch.special.entr(log_p.exp()).sum(-1)
    else:
        score = _sampling.random_score(rule.key(_philox.STREAM_RANDOM_SCORE), position, row_id)
    logprob = log_q.gather(-1, token[:, None])[:, 0]
    entropy = torch.special.entr(log_q.exp()).sum(-1)
    return token, valid, score, logprob, entropy


def reference_forward(
    out: Tensor,
    logits: Tensor,
    tokens: Tensor,
    eligible: Tensor | None,
    num_unmask: Tensor | None,
    suppress: Tensor | None,
    row_ids: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, length, vocab), device = logits.shape, logits.device
    live = tokens == rule.mask_id
    if eligible is not None:
        live &= eligible
    if device.type == "cpu":
        rows = live.flatten().nonzero()[:, 0]
    else:
        rows = torch.arange(batch * length, device=device)  # nonzero would wait for the device
    ids = torch.arange(batch, device=device) if row_ids is None else row_ids
    banned = torch.zeros(vocab, dtype=torch.bool, device=device)
    if suppress is not None:
        inside = (suppress >= 0) & (suppress < vocab)
        banned.scatter_reduce_(0, torch.where(inside, suppress, 0), inside, "amax")
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    token, valid = torch.zeros_like(live, dtype=torch.int64), torch.zeros_like(live)
    score, logprob, entropy = (torch.zeros_like(live, dtype=kind) for _ in range(3))
    for part in rows.split(max(1, CHUNK // vocab)):
        b, position = part // length, part % length
        x = logits[b, position].double().masked_fill(banned, -torch.inf)
        found = _statistics(x, rule, position, ids[b])
        for whole, value in zip((token, valid, score, logprob, entropy), found, strict=True):
            whole[b, position] = value.to(whole.dtype)
    score = torch.where(valid, score + 0.0, torch.nan)  # + 0.0: -0 and 0 are one score
    valid &= live
    committed = _sampling.select(
        score, valid, rule.num_unmask if num_unmask is None else num_unmask, rule.threshold
    )
    out.copy_(torch.where(committed, token, tokens))
    zero = score.new_zeros(())
    return (
        committed,
        torch.where(live, score, zero),
        torch.where(valid, logprob, zero),
        torch.where(valid, entropy, zero),
    )


def _native_forward(
    launch: Callable[..., None],
    out: Tensor,
    logits: Tensor,
    tokens: Tensor,
    eligible: Tensor | None,
    num_unmask: Tensor | None,
    suppress: Tensor | None,
    row_ids: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fills `out` and the result by launch(the arguments that C++ and CUDA share)."""
    tokens = tokens.contiguous()
    eligible, num_unmask, suppress, row_ids = (
        None if x is None else x.contiguous() for x in (eligible, num_unmask, suppress, row_ids)
    )
    dense = out if out.is_contiguous() else torch.empty_like(tokens)
    committed = torch.empty_like(tokens, dtype=torch.bool)
    score, logprob, entropy = (torch.empty_like(tokens, dtype=torch.float32) for _ in range(3))
    launch(
        logits, logits.stride(0), logits.stride(1), _native.DTYPE_TAG[logits.dtype], tokens, eligible,
        rule.num_unmask, num_unmask, suppress, 0 if suppress is None else suppress.numel(), row_ids,
        dense, committed, score, logprob, entropy, *logits.shape, rule.mask_id, rule.temperature,
        CONFIDENCES.index(rule.confidence), rule.threshold is not None, rule.threshold or 0.0,
        rule.sampler == "gumbel", *rule.stream_keys(),
    )  # fmt: skip
    if dense is not out:
        out.copy_(dense)
    return committed, score, logprob, entropy


def _cpu_forward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def launch(*values: object) -> None:
        _native.module().unmask_step(*_native.addresses(values), _native.num_threads())

    return _native_forward(launch, *args)


def _cuda_forward(out: Tensor, logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, (batch, length, vocab) = logits.device, logits.shape

    def launch(*values: object) -> None:
        tag = _native.DTYPE_TAG[logits.dtype]
        size = _native.cuda("unmask_step_workspace", device, batch * length, vocab, tag)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        _native.cuda("unmask_step", device, *values, workspace)

    return _native_forward(launch, out, logits, *args)


def _refuses(out: Tensor, logits: Tensor, *_: object) -> str | None:
    if logits.dtype not in _native.DTYPE_TAG:
        return f"it takes float32, bfloat16 and float16 logits, not {logits.dtype}"
    return None


OP = Op(
    "unmask_step",
    (
        cuda(forward=_cuda_forward, refuses=_refuses),
        triton("unmask_step", "forward", refuses=_refuses),
        cpu(forward=_cpu_forward, refuses=_refuses),
        reference(forward=reference_forward),
    ),
)

_ARGUMENTS = (
    "Tensor? eligible, Tensor? num_unmask_rows, Tensor? suppress, Tensor? row_ids, int mask_id, "
    "SymInt num_unmask, float temperature, str confidence, float? threshold, str sampler, "
    "SymInt seed, SymInt step"
)


def _run(
    logits: Tensor, tokens: Tensor, *args: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = tokens.new_empty(tokens.shape)
    tensors, rule = args[:4], Rule(*args[4:])  # type: ignore[arg-type]
    return out, *OP("forward", logits.device, out, logits, tokens, *tensors, rule)


def _run_(logits: Tensor, tokens: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, rule = args[:4], Rule(*args[4:])  # type: ignore[arg-type]
    return OP("forward", logits.device, tokens, logits, tokens, *tensors, rule)


def _fake_(logits: Tensor, tokens: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    score, logprob, entropy = (logits.new_empty(tokens.shape, dtype=kind) for _ in range(3))
    return tokens.new_empty(tokens.shape, dtype=torch.bool), score, logprob, entropy


_op = register(
    f"unmask_step(Tensor logits, Tensor tokens, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    lambda logits, tokens, *args: (tokens.new_empty(tokens.shape), *_fake_(logits, tokens, *args)),
)
_op_ = register(
    f"unmask_step_(Tensor logits, Tensor(a!) tokens, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run_,
    _fake_,
)


def unmask_step(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_id: int,
    num_unmask: int | Tensor,
    eligible: Tensor | None = None,
    temperature: float = 0.0,
    confidence: str = "prob",
    threshold: float | None = None,
    suppress_tokens: Sequence[int] | Tensor | None = None,
    sampler: str = "icdf",
    seed: int = 0,
    step: int = 0,
    row_ids: Tensor | None = None,
) -> UnmaskResult:
    """Draws a token for every masked position and commits the most confident ones of each sequence.

        p         = softmax(logits)                      # suppressed tokens count as -inf, here and below
        candidate = argmax(logits) at temperature 0, else a draw from softmax(logits / temperature)
        score     = p[candidate] | p1 - p2 | -entropy(p) | uniform
        tokens    = where(score is among the num_unmask highest of its sequence, candidate, tokens)

    A position takes part if tokens == mask_id and (eligible is None or eligible). The logits of the others are not
    read from memory (the reference on a GPU reads and ignores them). Not differentiable.

    Args:
        logits: (B, L, V) float32 | bfloat16 | float16 (float64: reference only), last dim contiguous; read only.
        tokens: (B, L) int64, mask_id where masked. Not modified by unmask_step, written by unmask_step_.
        mask_id: the id of [MASK]. It can be drawn like any other token: suppress it if the model may predict it.
        num_unmask: positions to commit per sequence, int >= 0 or (B,) int64 (negative counts as 0); all that take
            part when they are fewer.
        eligible: (B, L) bool.
        temperature: >= 0. It shapes the draw, not the score.
        confidence: "prob" = p[candidate]; "margin" = p1 - p2, the two most probable tokens; "entropy" = -entropy(p);
            "random" = uniform in (0, 1).
        threshold: also commit every position with score >= threshold, and at least one per sequence that has any.
        suppress_tokens: ids never drawn: a sequence, or an int64 tensor on the same device (then not checked: an id
            outside [0, V) suppresses nothing). p, logprob and entropy are over the remaining tokens.
        sampler: "icdf": inverse CDF of one 52-bit uniform per position, the same on every backend. Backends cut the
            vocabulary differently: float32 rounding at a boundary gives another token in fewer than one of 1000
            draws. "gumbel": argmax(logits/temperature + noise) in float64, the noise keyed by token id too: the
            same tokens bit for bit on every backend.
        seed, step, row_ids: a draw depends on (seed, step, row_ids[b], position) and the row's logits only. row_ids:
            (B,) int64, arange(B) when None. In a captured CUDA graph seed and step are constants: put what changes
            between replays in row_ids.
    Returns:
        UnmaskResult of (B, L) tensors; zero or False where a position does not take part. tokens: int64.
        committed: bool. score: float32. logprob: float32, nats, of the candidate under softmax(logits / temperature)
        (temperature 1 when it is 0). entropy: float32, nats, of that distribution.
        A row with NaN or +inf, or with no finite logit, is never committed: score NaN, logprob and entropy 0.
    Ties: lower token id; lower position.
    Raises:
        TypeError, ValueError: shapes, dtypes, devices or values as above.   BackendError: a forced backend refuses.
    Accuracy: sums in float32 per slice of the vocabulary (4096 tokens; CUDA: at least 2048 and an eighth of it), then
        float64 (tests/ops/test_unmask_step.py). Deterministic; on a backend bit-equal for any batch, split or number
        of threads. Nothing is returned to the host.
    Source: low-confidence remasking, arXiv:2502.09992, section 2.4; float64 noise, arXiv:2409.02908.
    """
    args = checked(
        "unmask_step", logits, tokens, mask_id, num_unmask, eligible, temperature, confidence,
        threshold, suppress_tokens, sampler, seed, step, row_ids,
    )  # fmt: skip
    return UnmaskResult(*_op(logits.detach(), tokens, *args))


def unmask_step_(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_id: int,
    num_unmask: int | Tensor,
    eligible: Tensor | None = None,
    temperature: float = 0.0,
    confidence: str = "prob",
    threshold: float | None = None,
    suppress_tokens: Sequence[int] | Tensor | None = None,
    sampler: str = "icdf",
    seed: int = 0,
    step: int = 0,
    row_ids: Tensor | None = None,
) -> UnmaskResult:
    """`unmask_step`, writing the committed tokens into `tokens`, which is also the result's tokens."""
    args = checked(
        "unmask_step_", logits, tokens, mask_id, num_unmask, eligible, temperature, confidence,
        threshold, suppress_tokens, sampler, seed, step, row_ids,
    )  # fmt: skip
    return UnmaskResult(tokens, *_op_(logits.detach(), tokens, *args))
