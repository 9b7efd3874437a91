"""Selection in a row of any length by one program: the entries with the smallest (key, index) (select.cuh is the twin).

`keys` below is a jitted function: keys(args, at, inside) -> (uint64 below 2^63, whether the entry can be chosen).
Loops are `while`: the interpreter cannot take a tensor as the end of a range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import philox

DIGIT_BITS = tl.constexpr(8)
BINS = tl.constexpr(256)


def block(length: int) -> int:
    """Entries of a row that a program takes at once (chosen: 4 to 8 per thread)."""
    return max(128, min(1024, int(triton.next_power_of_2(length))))


@triton.jit
def row_words(key_low, key_high, position, row_id):
    """Philox words 0, 1, 2 of the counters (position, 0, row_id)."""
    zero = position * 0
    w0, w1, w2, _ = philox(key_low, key_high, position, zero, row_id + zero)
    return w0, w1, w2


@triton.jit
def random_key(high, low):
    """Two random words -> a key of 63 bits."""
    return (high.to(tl.uint64) << 31) | (low >> 1).to(tl.uint64)


@triton.jit
def count_eligible(keys: tl.constexpr, args, length, BLOCK: tl.constexpr):
    """How many entries of the row can be chosen, int64."""
    found = tl.zeros((BLOCK,), tl.int64)
    begin = tl.zeros((), tl.int64)
    while begin < length:
        at = begin + tl.arange(0, BLOCK)
        _, eligible = keys(args, at, at < length)
        found += eligible.to(tl.int64)
        begin += BLOCK
    return tl.sum(found)


@triton.jit
def _histogram(keys: tl.constexpr, args, length, prefix, shift, BLOCK: tl.constexpr):
    """Of the next digit of the entries whose key begins with prefix; shift: bits from that digit's lowest on."""
    bins = tl.zeros((BINS,), tl.int32)
    begin = tl.zeros((), tl.int64)
    while begin < length:
        at = begin + tl.arange(0, BLOCK)
        key, eligible = keys(args, at, at < length)
        digits = key >> shift.to(tl.uint64)
        counted = eligible & ((digits >> DIGIT_BITS) == prefix)
        bins += tl.histogram((digits & (BINS - 1)).to(tl.int32), BINS, mask=counted)
        begin += BLOCK
    return bins


@triton.jit
def choose(keys: tl.constexpr, args, length, count, eligible, BITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(bound, shift, ties): chosen are the entries with key >> shift < bound, and the first `ties` of those equal.

    count of `eligible` entries are wanted; keys have at most BITS bits, a multiple of DIGIT_BITS.
    """
    every = count >= eligible
    need = tl.where(every, 0, tl.maximum(count, 0))
    bound = every.to(tl.uint64)
    shift = tl.where(every, 63, tl.where(need > 0, BITS, 0))
    while (need > 0) & (shift > 0):
        shift -= DIGIT_BITS
        bins = _histogram(keys, args, length, bound, shift, BLOCK).to(tl.int64)
        upto = tl.cumsum(bins)
        digit = tl.sum((upto < need).to(tl.int64))
        here = tl.arange(0, BINS) == digit
        need -= tl.sum(tl.where(here, upto - bins, 0))
        # where the digit's entries are wanted all, nothing more has to be told apart
        whole = need == tl.sum(tl.where(here, bins, 0))
        bound = (bound << DIGIT_BITS) + (digit + whole.to(tl.int64)).to(tl.uint64)
        need = tl.where(whole, 0, need)
    return bound, shift, need


@triton.jit
def is_chosen(key, eligible, bound, shift, ties, seen):
    """(chosen, seen) of the row's next entries; seen: how many equal to the bound came before them."""
    leading = key >> shift.to(tl.uint64)
    tie = eligible & (leading == bound)
    number = tie.to(tl.int64)
    rank = seen + tl.cumsum(number) - number
    return (eligible & (leading < bound)) | (tie & (rank < ties)), seen + tl.sum(number)
