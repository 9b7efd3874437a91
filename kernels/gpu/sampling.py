"""How unmask_step draws (igpo/ops/_sampling.py), in Triton: exact Gumbel noise, and picks from masses by a uniform."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import philox, uniform53

BELOW_ONE = tl.constexpr(1 - 2.0**-53)
NONE = tl.constexpr(1 << 30)


@triton.jit
def exact_log(x):
    """Natural logarithm of normal float64 x > 0, bit for bit that of the reference.

    The kernel must be launched with enable_fp_fusion=False: no product may be fused with a sum.
    """
    bits = x.to(tl.int64, bitcast=True)
    k = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    p = tl.full(z.shape, 1.0 / 17.0, tl.float64)
    for half in tl.static_range(1, 8):
        p = p * z + tl.full(z.shape, 1.0 / (17 - 2 * half), tl.float64)
    r = s * (z * p) + s
    return k.to(tl.float64) * tl.full(z.shape, 0.69314718055994530942, tl.float64) + (r + r)


@triton.jit
def gumbel(key_low, key_high, position, token, row_id):
    """Gumbel noise of tokens: words 2 (token % 2) and the next of the Philox counter token // 2, 52 bits."""
    w0, w1, w2, w3 = philox(key_low, key_high, position, token >> 1, row_id)
    odd = (token & 1) != 0
    return -exact_log(-exact_log(uniform53(tl.where(odd, w2, w0), tl.where(odd, w3, w1))))


@triton.jit
def pick(mass, u, COUNT: tl.constexpr):
    """Which of the float64 masses (COUNT,) the fraction u of their sum falls in, and where in it, in [0, 1).

    Never one without mass; where rounding overshoots, the last one with mass.
    """
    index = tl.arange(0, COUNT)
    upto = tl.cumsum(mass, 0)
    target = u * tl.max(upto, 0)
    first = tl.min(tl.where((mass > 0) & (target < upto), index, NONE), 0)
    last = tl.max(tl.where(mass > 0, index, 0), 0)
    chosen = tl.where(first < NONE, first, last)
    own = tl.sum(tl.where(index == chosen, mass, 0.0), 0)
    before = tl.sum(tl.where(index == chosen, upto, 0.0), 0) - own
    below_one = tl.full((), BELOW_ONE, tl.float64)  # as a plain number it would become 1 in float32
    inside = tl.minimum(tl.maximum((target - before) / own, 0.0), below_one)
    return chosen, tl.where(first < NONE, inside, below_one)
