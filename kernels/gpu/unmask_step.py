"""unmask_step in Triton: V s bytes read per row that takes part, once; nothing of the others.

A program per slice of a row leaves its maximum and sums, one per row combines them in float64 and draws, one per
sequence commits (unmask_commit.py). Slices are cut by the vocabulary alone, so a row's bits depend on nothing else.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import halves, on, philox, uniform53
from .sampling import gumbel, pick
from .unmask_commit import commit_kernel, list_kernel, takes_part

SLICE = 4096  # one tile of registers; 31 slices at V = 126464 (chosen)
SCAN = {
    "num_warps": 8,
    **({"maxnreg": 80} if torch.version.cuda else {}),
}  # else the compiler takes twice the registers
SCAN_NOISY = {"num_warps": 8, "enable_fp_fusion": False}  # the noise must not be rounded less often
GROUP = tl.constexpr(64)  # tokens
FIELDS = 10
(MAX, SECOND, SUM, WEIGHTED, SUM1, WEIGHTED1, NOISY, VALUE, FIRST, DRAWN) = (
    tl.constexpr(i) for i in range(FIELDS)
)  # of a partial result, float64; sums relative to the maximum, exponents in units of log 2
PROB, MARGIN, ENTROPY, RANDOM = (tl.constexpr(i) for i in range(4))
CONFIDENCES = ("prob", "margin", "entropy", "random")
DIRECT_ROWS = 512  # beyond it programs take rows from a list (chosen)
RESIDENT = 3  # programs of a multiprocessor then: eight warps of 80 registers
LN2 = 0.69314718055994530942
UNSPECIALIZED = ("rows", "num_suppress", "exponent", "inverse_bits", "temperature_bits")
KEYS = ("token_low", "token_high", "score_low", "score_high", "gumbel_low", "gumbel_high")


@triton.jit
def _load(x, at, vocab, suppress, num_suppress):
    """Logits x[at] as float32, -inf where suppressed and beyond the vocabulary."""
    if tl.max(at, 0) < vocab:  # a mask that differs within 16 bytes would make the accesses narrow
        value = tl.load(x + at, eviction_policy="evict_first")
    else:
        value = tl.load(x + at, mask=at < vocab, other=-float("inf"))
    value = value.to(tl.float32)
    i = tl.zeros((), tl.int32)
    while i < num_suppress:
        value = tl.where(at == tl.load(suppress + i), -float("inf"), value)
        i += 1
    return value


@triton.jit
def _noisy(x, at, top, inverse, temperature, key_low, key_high, position, row_id):
    """(score, logit, token) of the best of x / temperature + noise: exact, as the reference computes it.

    Noise -log(-log(1-v)) is at most -log v: that bound, in float32 and from one word of v, orders the tokens, and few
    are scored before the best score is out of the others' reach.
    """
    shift = top.to(tl.float64) / temperature
    even = tl.min(at, 0) // 2 + tl.arange(0, at.shape[0] // 2)
    w0, _, w2, _ = philox(key_low, key_high, position, even, row_id)
    v = ((tl.interleave(w0, w2) ^ 0xFFFFFFFF) >> 1).to(tl.float32) * 4.656612873077393e-10
    bound = (x - top) * inverse.to(tl.float32) * 0.999999 - tl.log(v)
    bound = tl.where(bound == bound, bound, -float("inf"))
    best = tl.full((), -float("inf"), tl.float64)
    value = tl.zeros((), tl.float32)
    token = tl.zeros((), tl.int32)
    loose = tl.full((), -float("inf"), tl.float32)
    most = tl.max(bound, 0)
    while most > loose:
        i = tl.min(tl.where(bound == most, at, 1 << 30), 0)
        logit = tl.sum(tl.where(at == i, x, 0.0), 0)
        noise = gumbel(key_low, key_high, position, i, row_id)
        exact = logit.to(tl.float64) / temperature + noise
        better = (exact > best) | ((exact == best) & (i < token))
        best = tl.where(better, exact, best)
        value = tl.where(better, logit, value)
        token = tl.where(better, i, token)
        relative = best - shift
        # neither float32 here nor rounding of the exact score lifts a token over this
        slack = 1e-6 * tl.abs(relative) + 1e-3 + tl.abs(shift) * 8.881784197001252e-16
        loose = (relative - slack).to(tl.float32)
        bound = tl.where(at == i, -float("inf"), bound)
        most = tl.max(bound, 0)
    return best, value, token


@triton.jit
def _row_of(found, index, LISTED: tl.constexpr):
    row = index
    if LISTED:
        row = tl.load(found + 1 + index)
    return row


@triton.jit(do_not_specialize=[*UNSPECIALIZED, *KEYS])
def _scan_kernel(
    logits, stride_b: tl.int64, stride_l: tl.int64, tokens, eligible, suppress, row_ids, found, parts,
    rows: tl.int64, length: tl.int64, vocab: tl.int32, num_suppress: tl.int32, mask_id: tl.int64,
    exponent, inverse_bits: tl.int64, temperature_bits: tl.int64,
    gumbel_low: tl.uint32, gumbel_high: tl.uint32,
    SLICES: tl.constexpr, SLICE: tl.constexpr, LISTED: tl.constexpr, BOTH: tl.constexpr,
    GUMBEL: tl.constexpr,
):  # fmt: skip
    """Partial results of every slice of the rows that take part."""
    tasks = rows * SLICES
    if LISTED:
        tasks = tl.load(found) * SLICES
    task = tl.program_id(0).to(tl.int64)
    while task < tasks:
        row = _row_of(found, task // SLICES, LISTED)
        if takes_part(tokens, eligible, mask_id, row, row >= 0):
            b, position = row // length, row % length
            part = task % SLICES
            at = part.to(tl.int32) * SLICE + tl.arange(0, SLICE)
            x = _load(
                logits + b * stride_b + position * stride_l, at, vocab, suppress, num_suppress
            )
            top = tl.max(tl.where(x == x, x, -float("inf")), 0)
            first = tl.min(tl.where(x == top, at, 1 << 30), 0)
            second = tl.max(tl.where((at != first) & (x == x), x, -float("inf")), 0)
            d = x - tl.where(top == -float("inf"), 0.0, top)
            t = d * exponent
            e = tl.exp2(t)
            to = parts + row * SLICES + part
            field = rows * SLICES
            tl.store(to + MAX * field, top.to(tl.float64))
            tl.store(to + SECOND * field, second.to(tl.float64))
            tl.store(to + FIRST * field, first.to(tl.float64))
            tl.store(to + SUM * field, tl.sum(e, 0).to(tl.float64))
            # 2^-150 is 0 here, and 0 * -inf must not be formed
            weighted = tl.sum(tl.maximum(t, -150.0) * e, 0)
            tl.store(to + WEIGHTED * field, weighted.to(tl.float64))
            if BOTH:
                t1 = d * 1.4426950408889634
                e1 = tl.exp2(t1)
                tl.store(to + SUM1 * field, tl.sum(e1, 0).to(tl.float64))
                weighted = tl.sum(tl.maximum(t1, -150.0) * e1, 0)
                tl.store(to + WEIGHTED1 * field, weighted.to(tl.float64))
            if GUMBEL:
                row_id = b
                if row_ids is not None:
                    row_id = tl.load(row_ids + b)
                noisy, value, drawn = _noisy(
                    x, at, top, inverse_bits.to(tl.float64, bitcast=True),
                    temperature_bits.to(tl.float64, bitcast=True), gumbel_low, gumbel_high, position,
                    row_id,
                )  # fmt: skip
                tl.store(to + NOISY * field, noisy)
                tl.store(to + VALUE * field, value.to(tl.float64))
                tl.store(to + DRAWN * field, drawn.to(tl.float64))
        task += tl.num_programs(0)


@triton.jit
def _draw_in_slice(x, part, top, u, exponent, vocab, suppress, num_suppress, SLICE: tl.constexpr):
    """(token, logit) of an inverse-CDF draw in a slice: by group, then token, each dividing its own sum."""
    at = part * SLICE + tl.arange(0, SLICE)
    mass = tl.exp2((_load(x, at, vocab, suppress, num_suppress) - top) * exponent)
    groups = tl.sum(tl.reshape(mass, (SLICE // GROUP, GROUP)), 1).to(tl.float64)
    group, u = pick(groups, u, SLICE // GROUP)
    at = part * SLICE + group * GROUP + tl.arange(0, GROUP)
    value = _load(x, at, vocab, suppress, num_suppress)
    i, u = pick(tl.exp2((value - top) * exponent).to(tl.float64), u, GROUP)
    chosen = tl.arange(0, GROUP) == i
    return tl.sum(tl.where(chosen, at, 0), 0), tl.sum(tl.where(chosen, value, 0.0), 0)


@triton.jit
def _combined(total, weighted, below, LOG2: tl.constexpr):
    """(mass of every slice, their sum, the sum of y e^y), float64; below: of the slices' maxima, over temperature."""
    below = tl.where(total != 0, below, 0.0)  # else nothing is finite, and it may be -inf or NaN
    mass = tl.exp(below) * total
    moment = tl.exp(below) * (weighted * tl.full((), LOG2, tl.float64)) + below * mass
    return mass, tl.sum(mass, 0), tl.sum(moment, 0)


@triton.jit
def _entropy(total, weighted):
    return tl.maximum(tl.log(total) - weighted / total, 0.0)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, *KEYS])
def _finish_kernel(
    logits, stride_b: tl.int64, stride_l: tl.int64, tokens, eligible, suppress, row_ids, found, parts,
    candidate, score, logprob, entropy,
    rows: tl.int64, length: tl.int64, vocab: tl.int32, num_suppress: tl.int32, mask_id: tl.int64,
    exponent, inverse_bits: tl.int64, token_low: tl.uint32, token_high: tl.uint32,
    score_low: tl.uint32, score_high: tl.uint32,
    SLICES: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, LISTED: tl.constexpr,
    BOTH: tl.constexpr, GUMBEL: tl.constexpr, DRAWS: tl.constexpr, CONFIDENCE: tl.constexpr,
    LOG2: tl.constexpr,
):  # fmt: skip
    """Token, score, logprob and entropy of the rows that take part."""
    count = rows
    if LISTED:
        count = tl.load(found)
    inverse = inverse_bits.to(tl.float64, bitcast=True)
    index = tl.program_id(0).to(tl.int64)
    while index < count:
        row = _row_of(found, index, LISTED)
        if takes_part(tokens, eligible, mask_id, row, row >= 0):
            b, position = row // length, row % length
            row_id = b
            if row_ids is not None:
                row_id = tl.load(row_ids + b)
            n = tl.arange(0, WIDTH)
            inside = n < SLICES
            at = parts + row * SLICES + n
            field = rows * SLICES
            tops = tl.load(at + MAX * field, mask=inside, other=-float("inf"))
            sums = tl.load(at + SUM * field, mask=inside, other=0.0)
            moments = tl.load(at + WEIGHTED * field, mask=inside, other=0.0)
            top = tl.max(tops, 0)
            best = tl.min(tl.where(tops == top, n, WIDTH), 0)
            mass, total, weighted = _combined(sums, moments, (tops - top) * inverse, LOG2)
            total1, weighted1 = total, weighted
            if BOTH:
                sums = tl.load(at + SUM1 * field, mask=inside, other=0.0)
                moments = tl.load(at + WEIGHTED1 * field, mask=inside, other=0.0)
                _mass1, total1, weighted1 = _combined(sums, moments, tops - top, LOG2)
            if total > 0:
                value = top
                if GUMBEL:
                    noisy = tl.load(at + NOISY * field, mask=inside, other=-float("inf"))
                    part = tl.min(tl.where(noisy == tl.max(noisy, 0), n, WIDTH), 0)
                    value = tl.load(parts + row * SLICES + part + VALUE * field)
                    token = tl.load(parts + row * SLICES + part + DRAWN * field).to(tl.int64)
                elif DRAWS:
                    w0, w1, _w2, _w3 = philox(token_low, token_high, position, position * 0, row_id)
                    part, u = pick(mass, uniform53(w0, w1), WIDTH)
                    own = tl.sum(tl.where(n == part, tops, 0.0), 0).to(tl.float32)
                    drawn, logit = _draw_in_slice(
                        logits + b * stride_b + position * stride_l, part, own, u, exponent, vocab,
                        suppress, num_suppress, SLICE,
                    )  # fmt: skip
                    token = drawn.to(tl.int64)
                    value = logit.to(tl.float64)
                else:
                    token = tl.load(parts + row * SLICES + best + FIRST * field).to(tl.int64)
                below = value - top
                if CONFIDENCE == PROB:
                    result = tl.exp(below) / total1
                elif CONFIDENCE == MARGIN:
                    seconds = tl.load(at + SECOND * field, mask=inside, other=-float("inf"))
                    others = tl.max(tl.where(n == best, -float("inf"), tops), 0)
                    second = tl.maximum(tl.max(seconds, 0), others)
                    result = (1.0 - tl.exp(second - top)) / total1
                elif CONFIDENCE == ENTROPY:
                    result = 0.0 - _entropy(total1, weighted1)
                else:
                    bits, _b1, _b2, _b3 = philox(
                        score_low, score_high, position, position * 0, row_id
                    )
                    result = ((bits >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07
                tl.store(candidate + row, token)
                tl.store(score + row, result.to(tl.float32))
                tl.store(logprob + row, (below * inverse - tl.log(total)).to(tl.float32))
                tl.store(entropy + row, _entropy(total, weighted).to(tl.float32))
            else:  # NaN, +inf, or nothing finite
                tl.store(candidate + row, -1)
                tl.store(score + row, float("nan"))
                tl.store(logprob + row, 0.0)
                tl.store(entropy + row, 0.0)
        index += tl.num_programs(0)


def _bits(x: float) -> int:
    """A float64 as an integer: Triton's float arguments are float32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )


def _search(logits, tokens, eligible, suppress, row_ids, rule, results) -> None:
    """Fills (candidate, score, logprob, entropy) of the rows that take part."""
    (_, length, vocab), rows = logits.shape, tokens.numel()
    slice_ = min(SLICE, max(2 * GROUP.value, triton.next_power_of_2(vocab)))
    slices = triton.cdiv(vocab, slice_)
    listed = rows > DIRECT_ROWS
    parts = torch.empty((FIELDS, rows, slices), dtype=torch.float64, device=logits.device)
    found = torch.empty(rows + 1 if listed else 1, dtype=torch.int64, device=logits.device)
    if listed:
        list_kernel[(1,)](tokens, eligible, found, rule.mask_id, rows, BLOCK=2048, num_warps=8)
    draws = rule.temperature > 0
    both = draws and rule.temperature != 1 and rule.confidence != "random"
    inverse = min(1 / rule.temperature, 1e30) if draws else 1.0
    token_key, score_key, gumbel_key = (halves(key) for key in rule.stream_keys())
    noise = draws and rule.sampler == "gumbel"
    most = _multiprocessors(logits.device) * RESIDENT if listed else rows * slices
    where = (logits, logits.stride(0), logits.stride(1), tokens, eligible, suppress, row_ids, found)
    sizes = (rows, length, vocab, 0 if suppress is None else suppress.numel(), rule.mask_id)
    sizes = (*sizes, inverse / LN2, _bits(inverse))
    same = {"SLICES": slices, "SLICE": slice_, "LISTED": listed, "BOTH": both, "GUMBEL": noise}
    _scan_kernel[(min(most, rows * slices),)](
        *where, parts, *sizes, _bits(rule.temperature), *gumbel_key, **same,
        **(SCAN_NOISY if noise else SCAN),
    )  # fmt: skip
    _finish_kernel[(min(most, rows),)](
        *where, parts, *results, *sizes, *token_key, *score_key, **same,
        WIDTH=max(2, triton.next_power_of_2(slices)), DRAWS=draws,
        CONFIDENCE=CONFIDENCES.index(rule.confidence), LOG2=LN2, num_warps=4,
    )  # fmt: skip


def forward(
    out: Tensor,
    logits: Tensor,
    tokens: Tensor,
    eligible: Tensor | None,
    num_unmask: Tensor | None,
    suppress: Tensor | None,
    row_ids: Tensor | None,
    rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rule: igpo.ops._unmask_arguments.Rule."""
    (batch, length, _), given = logits.shape, (eligible, num_unmask, suppress, row_ids)
    tokens = tokens.contiguous()
    eligible, num_unmask, suppress, row_ids = (None if x is None else x.contiguous() for x in given)
    dense = out if out.is_contiguous() else torch.empty_like(tokens)
    candidate, committed = torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.bool)
    score, logprob, entropy = (torch.empty_like(tokens, dtype=torch.float32) for _ in range(3))
    if tokens.numel():
        with on(logits):
            results = (candidate, score, logprob, entropy)
            _search(logits, tokens, eligible, suppress, row_ids, rule, results)
            commit_kernel[(batch,)](
                tokens, eligible, candidate, num_unmask, dense, committed, score, logprob, entropy,
                rule.mask_id, length, rule.num_unmask, rule.threshold or 0.0,
                HAS_THRESHOLD=rule.threshold is not None,
                BLOCK=min(1024, max(32, triton.next_power_of_2(length))), num_warps=4,
            )  # fmt: skip
    if dense is not out:
        out.copy_(dense)
    return committed, score, logprob, entropy
