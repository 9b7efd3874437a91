"""policy_loss: the clipped surrogate of GRPO and GSPO with a KL term, and its metrics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check, _native, _rows
from ._dispatch import Op, cpu, cuda, reference, triton
from ._library import register

RATIOS = ("token", "sequence")
KLS = ("k1", "k2", "k3")
AGGREGATES = ("token-mean", "sequence-mean", "sum")
TOKEN_MEAN, SEQUENCE_MEAN, CONSTANT = range(3)  # how the registered op names them
MAX_LOG_RATIO = 20.0  # e^20 is far outside every clip range, and finite in float32


class PolicyLoss(NamedTuple):
    """loss: scalar, differentiable in logprob.   clip_fraction: of the masked tokens, those whose clipped term is the
    smaller one.   kl: masked mean of the KL estimate, 0 without a reference.   ratio_mean: masked mean of the ratio."""

    loss: Tensor
    clip_fraction: Tensor
    kl: Tensor
    ratio_mean: Tensor


def reference_forward(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, token_mask: Tensor, ref_logprob: Tensor | None,
    low: float, high: float, sequence: bool, kl_coef: float, kl: int, aggregate: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, clip_fraction, kl, ratio_mean, and the gradient of the loss by logprob (B, L)."""
    weights = _weights(token_mask, aggregate, scale, logprob.dtype)
    log_ratio = (logprob - old_logprob).masked_fill(~token_mask, 0.0)
    count = token_mask.sum(1, keepdim=True)
    if sequence:
        log_ratio = (log_ratio.sum(1, keepdim=True) / count.clamp(min=1)).expand_as(logprob)
    is_free = log_ratio.abs() < MAX_LOG_RATIO
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    a = advantages[:, None]
    plain, clipped = ratio * a, ratio.clamp(1 - low, 1 + high) * a
    is_clipped = clipped < plain
    term = -torch.where(is_clipped, clipped, plain)
    slope = torch.where(is_clipped | ~is_free, 0.0, -plain)  # d term / d log ratio
    if sequence:  # each token's term moves with every masked token of the row, by 1 / count
        slope = (slope * weights[:, None]).masked_fill(~token_mask, 0.0).sum(1, keepdim=True)
        slope = slope / count.clamp(min=1)
    else:
        slope = slope * weights[:, None]
    estimate, estimate_slope = _kl(logprob, ref_logprob, kl)
    term = torch.addcmul(term, estimate, torch.tensor(kl_coef, dtype=term.dtype))
    grad = slope + estimate_slope * (kl_coef * weights[:, None])
    total = count.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~token_mask, 0.0).sum() / total

    loss = (term * weights[:, None]).masked_fill(~token_mask, 0.0).sum()
    metrics = mean(is_clipped.to(term.dtype)), mean(estimate), mean(ratio)
    return loss, *metrics, grad.masked_fill(~token_mask, 0.0)


def _weights(token_mask: Tensor, aggregate: int, scale: float, dtype: torch.dtype) -> Tensor:
    """(B,) what each masked token's term of a row is multiplied by."""
    count = token_mask.sum(1)
    if aggregate == SEQUENCE_MEAN:
        return 1.0 / (count.clamp(min=1).to(dtype) * max(1, token_mask.shape[0]))
    if aggregate == TOKEN_MEAN:
        return (1.0 / count.sum().clamp(min=1).to(dtype)).expand(count.shape)
    return torch.full(count.shape, scale, dtype=dtype, device=token_mask.device)


def _kl(logprob: Tensor, ref_logprob: Tensor | None, kl: int) -> tuple[Tensor, Tensor]:
    """The estimate k1, k2 or k3 of KL(policy || reference) per token, and its slope. ALGORITHMS 2.8."""
    if ref_logprob is None:
        return torch.zeros_like(logprob), torch.zeros_like(logprob)
    delta = logprob - ref_logprob
    if kl == 0:
        return delta, torch.ones_like(delta)
    if kl == 1:
        return 0.5 * delta * delta, delta
    bounded = (-delta).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(bounded) + delta, torch.where(
        delta.abs() < MAX_LOG_RATIO, -torch.expm1(bounded), 1.0
    )


def _cpu_forward(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, token_mask: Tensor, ref_logprob: Tensor | None,
    low: float, high: float, sequence: bool, kl_coef: float, kl: int, aggregate: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = _weights(token_mask, aggregate, scale, logprob.dtype)
    inputs = [x.contiguous() for x in (logprob, old_logprob, advantages, token_mask, weights)]
    ref = None if ref_logprob is None else ref_logprob.contiguous()
    grad, out = torch.empty_like(inputs[0]), torch.empty(4, dtype=torch.float32)
    _native.module().policy_loss(
        *(x.data_ptr() for x in inputs), 0 if ref is None else ref.data_ptr(), grad.data_ptr(),
        out.data_ptr(), logprob.shape[0], logprob.shape[1], low, high, sequence, kl_coef, kl,
        _native.num_threads(),
    )  # fmt: skip
    loss, clip_fraction, divergence, ratio_mean = out.clone().unbind()
    return loss.clone(), clip_fraction.clone(), divergence.clone(), ratio_mean.clone(), grad


def _cuda_forward(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, token_mask: Tensor, ref_logprob: Tensor | None,
    *options: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    if logprob.numel() == 0:
        return *(logprob.new_zeros(()) for _ in range(4)), torch.empty_like(logprob)
    logprob, old, mask = (_rows.unit_stride(x) for x in (logprob, old_logprob, token_mask))
    ref = None if ref_logprob is None else _rows.unit_stride(ref_logprob)
    rows, length = logprob.shape
    scalars = [logprob.new_empty(()) for _ in range(4)]
    grad = logprob.new_empty(rows, length)
    workspace = logprob.new_empty(rows * 5 + 256, dtype=torch.float64)
    strides = [
        x.stride(0) for x in (logprob, old, advantages, mask, logprob if ref is None else ref)
    ]
    _native.cuda(
        "policy_loss", logprob.device, logprob, old, advantages, mask, ref, grad, *scalars, workspace,
        rows, length, *strides, *options,
    )  # fmt: skip
    return *scalars, grad


def _refuses(logprob: Tensor, *_: object) -> str | None:
    return (
        None
        if logprob.dtype == torch.float32
        else "it takes float32 log-probabilities, not float64"
    )


OP = Op(
    "policy_loss",
    (
        cuda(forward=_cuda_forward, refuses=_refuses),
        triton("policy_loss", "forward", refuses=_refuses),
        cpu(forward=_cpu_forward, refuses=_refuses),
        reference(forward=reference_forward),
    ),
)


def _fake(logprob: Tensor, *_: object) -> tuple[Tensor, ...]:
    return *(logprob.new_empty(()) for _ in range(4)), torch.empty_like(
        logprob, memory_format=torch.contiguous_format
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[4])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss: Tensor, *_: Tensor):
    (grad,) = ctx.saved_tensors
    return grad * grad_loss, *([None] * 11)


_op = register(
    "policy_loss(Tensor logprob, Tensor old_logprob, Tensor advantages, Tensor token_mask, Tensor? ref_logprob,"
    " float low, float high, bool sequence, float kl_coef, int kl, int aggregate, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda logprob, *args: OP("forward", logprob.device, logprob, *args),
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    token_mask: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    ratio: str = "token",
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregate: str | float = "token-mean",
) -> PolicyLoss:
    """The clipped policy-gradient loss of a batch of completions, with a KL term. Forward and gradient in one pass.

        term = -min(rho A, clip(rho, 1 - low, 1 + high) A) + kl_coef * kl(logprob, ref_logprob)
        rho  = exp(logprob - old_logprob)                     ratio="token"
             = exp(mean over the row's masked tokens of it)   ratio="sequence" (GSPO): the same term at each token

    Args:
        logprob: (B, L) float32, nats, differentiable. float64: the reference alone.
        old_logprob: (B, L), of the policy that sampled; a constant.
        advantages: (B,), one per completion; a constant.
        token_mask: (B, L) bool, the tokens that count; nothing is read into the result elsewhere.
        clip: (low, high), 0 <= low <= 1, high >= 0.
        ref_logprob: (B, L), of the reference policy; a constant. Needed when kl_coef > 0.
        kl: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d per token, d = logprob - ref_logprob, whatever `ratio` is.
        aggregate: "token-mean" (sum over masked tokens / their number), "sequence-mean" (mean over the B rows of the
            row's token mean; a row without tokens adds 0), "sum", or a positive number to divide the sum by.
        Exponents are clamped to +-20.
    Returns:
        PolicyLoss(loss, clip_fraction, kl, ratio_mean), scalars; only loss is differentiable.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, an unknown option, kl_coef without ref_logprob.
    Accuracy: reductions in float64 but in the reference. Deterministic, for any number of threads too. CUDA: one launch
        for up to 65536 tokens in up to 1024 rows (compute capability 9.0), else two or three.
    Source: arXiv:2509.10396, equation 5; arXiv:2507.18071 (GSPO), equation 7; estimators: Schulman, "Approximating KL
    divergence", 2020.
    """
    _check_arguments(
        logprob,
        old_logprob,
        advantages,
        token_mask,
        clip,
        ratio,
        ref_logprob,
        kl_coef,
        kl,
        aggregate,
    )
    constants = [x.detach() for x in (old_logprob, advantages)]
    ref = None if ref_logprob is None else ref_logprob.detach()
    low, high = clip
    named = isinstance(aggregate, str)
    loss, clip_fraction, divergence, ratio_mean, _ = _op(
        logprob, *constants, token_mask, ref, float(low), float(high), ratio == "sequence", float(kl_coef),
        KLS.index(kl), AGGREGATES.index(aggregate) if named else CONSTANT, 1.0 if named else 1.0 / aggregate,
    )  # fmt: skip
    return PolicyLoss(loss, clip_fraction, divergence, ratio_mean)


def _check_arguments(
    logprob, old_logprob, advantages, token_mask, clip, ratio, ref_logprob, kl_coef, kl, aggregate
) -> None:
    op = OP.name
    _check.tensor(op, "logprob", logprob, dtype=(torch.float32, torch.float64))
    _check.require(logprob.dim() == 2, op, "logprob", "have shape (B, L)", logprob)
    like = {"dtype": logprob.dtype, "device": logprob.device}
    _check.tensor(op, "old_logprob", old_logprob, shape=logprob.shape, **like)
    _check.tensor(op, "advantages", advantages, shape=logprob.shape[:1], **like)
    _check.tensor(
        op, "token_mask", token_mask, dtype=torch.bool, shape=logprob.shape, device=logprob.device
    )
    if ref_logprob is not None:
        _check.tensor(op, "ref_logprob", ref_logprob, shape=logprob.shape, **like)
    low, high = clip
    _check.require(
        0 <= low <= 1 and high >= 0,
        op,
        "clip",
        "be (low, high) with 0 <= low <= 1 and high >= 0",
        clip,
    )
    _check.require(ratio in RATIOS, op, "ratio", f"be one of {', '.join(RATIOS)}", ratio)
    _check.require(kl in KLS, op, "kl", f"be one of {', '.join(KLS)}", kl)
    _check.require(
        kl_coef >= 0 and math.isfinite(kl_coef), op, "kl_coef", "be >= 0 and finite", kl_coef
    )
    _check.require(
        kl_coef == 0 or ref_logprob is not None, op, "ref_logprob", "be given when kl_coef > 0", ref_logprob,
        "Pass the reference policy's log-probabilities or set kl_coef=0.",
    )  # fmt: skip
    named = isinstance(aggregate, str) and aggregate in AGGREGATES
    number = (
        isinstance(aggregate, int | float)
        and not isinstance(aggregate, bool)
        and 0 < aggregate < math.inf
    )
    rule = f"be one of {', '.join(AGGREGATES)} or a positive number"
    _check.require(named or number, op, "aggregate", rule, aggregate)
