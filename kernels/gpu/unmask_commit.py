"""The ends of unmask_step in Triton: which rows take part, and which candidates of a sequence are committed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def takes_part(tokens, eligible, mask_id, row, inside):
    """Whether each row (B L positions, flat) is masked and eligible."""
    part = inside & (tl.load(tokens + row, mask=inside, other=0) == mask_id)
    if eligible is not None:
        part &= tl.load(eligible + row, mask=inside, other=0) != 0
    return part


@triton.jit(do_not_specialize=["rows"])
def list_kernel(tokens, eligible, found, mask_id: tl.int64, rows: tl.int64, BLOCK: tl.constexpr):
    """found[0] = how many rows take part, found[1 …] = these rows."""
    done = tl.zeros((), tl.int64)
    base = tl.zeros((), tl.int64)
    while base < rows:
        row = base + tl.arange(0, BLOCK)
        part = takes_part(tokens, eligible, mask_id, row, row < rows)
        upto = tl.cumsum(part.to(tl.int32), 0)
        tl.store(found + done + upto, row, mask=part)
        done += tl.sum(part.to(tl.int32), 0)
        base += BLOCK
    tl.store(found, done)


@triton.jit
def _keys(tokens, eligible, candidate, score, mask_id, first, at, inside):
    """int64 keys, greater for a higher score, then for a lower position; whether there is one."""
    valid = takes_part(tokens, eligible, mask_id, first + at, inside)
    valid &= tl.load(candidate + first + at, mask=inside, other=-1) >= 0
    value = tl.load(score + first + at, mask=inside, other=0.0) + 0.0  # -0 and +0 are one score
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (order << 32) | (0xFFFFFFFF - at), valid


@triton.jit
def _least_key(
    tokens, eligible, candidate, score, mask_id, first, length, wanted, BLOCK: tl.constexpr
):
    """The wanted-th greatest key of a sequence that has more: by digits of 8 bits from the highest.

    Ends as soon as all keys that share the digits so far are wanted: then the digits alone are the bound.
    """
    flip = tl.full((), -(1 << 63), tl.int64)  # keys as unsigned digits
    prefix = tl.zeros((), tl.int64)
    digits = tl.arange(0, 256)
    shift = tl.full((), 56, tl.int64)
    while shift >= 0:
        count = tl.zeros((256,), tl.int32)
        base = tl.zeros((), tl.int64)
        while base < length:
            at = base + tl.arange(0, BLOCK)
            key, valid = _keys(tokens, eligible, candidate, score, mask_id, first, at, at < length)
            key ^= flip
            # two shifts: one by 64 bits would not be one
            shares = ((key ^ prefix) >> shift >> 8) & ((1 << (56 - shift)) - 1)
            digit = ((key >> shift) & 255).to(tl.int32)
            count += tl.histogram(digit, 256, mask=valid & (shares == 0))
            base += BLOCK
        above = tl.sum(count, 0) - tl.cumsum(count, 0)  # keys with a higher digit
        here = (above < wanted) & (above + count >= wanted)
        wanted -= tl.sum(tl.where(here, above, 0), 0)
        prefix |= tl.sum(tl.where(here, digits, 0), 0).to(tl.int64) << shift
        shift = tl.where(tl.sum(tl.where(here, count, 0), 0) == wanted, -8, shift - 8)
    return prefix ^ flip


@triton.jit(do_not_specialize=["length", "num_unmask", "threshold"])
def commit_kernel(
    tokens, eligible, candidate, num_unmask_rows, out, committed, score, logprob, entropy,
    mask_id: tl.int64, length: tl.int64, num_unmask: tl.int64, threshold,
    HAS_THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence. What is not eligible gets zeros."""
    sequence = tl.program_id(0).to(tl.int64)
    first = sequence * length
    wanted = num_unmask
    if num_unmask_rows is not None:
        wanted = tl.load(num_unmask_rows + sequence)
    if HAS_THRESHOLD:
        wanted = tl.maximum(wanted, 1)
    live = tl.zeros((), tl.int64)
    base = tl.zeros((), tl.int64)
    while base < length:
        at = base + tl.arange(0, BLOCK)
        _, valid = _keys(tokens, eligible, candidate, score, mask_id, first, at, at < length)
        live += tl.sum(valid.to(tl.int32), 0)
        base += BLOCK
    least = tl.full((), -(1 << 63), tl.int64)
    if (wanted > 0) & (wanted < live):
        least = _least_key(
            tokens, eligible, candidate, score, mask_id, first, length, wanted.to(tl.int32), BLOCK
        )
    base = tl.zeros((), tl.int64)
    while base < length:
        at = base + tl.arange(0, BLOCK)
        row, inside = first + at, at < length
        key, valid = _keys(tokens, eligible, candidate, score, mask_id, first, at, inside)
        chosen = (key >= least) & (wanted > 0)
        if HAS_THRESHOLD:
            chosen |= tl.load(score + row, mask=inside, other=0.0) >= threshold
        chosen &= valid
        left_out = inside & ~takes_part(tokens, eligible, mask_id, row, inside)
        own = tl.load(tokens + row, mask=inside, other=0)
        token = tl.load(candidate + row, mask=inside, other=0)
        tl.store(out + row, tl.where(chosen, token, own), mask=inside)
        tl.store(committed + row, chosen, mask=inside)
        tl.store(score + row, tl.zeros((BLOCK,), tl.float32), mask=left_out)
        tl.store(logprob + row, tl.zeros((BLOCK,), tl.float32), mask=left_out)
        tl.store(entropy + row, tl.zeros((BLOCK,), tl.float32), mask=left_out)
        base += BLOCK
