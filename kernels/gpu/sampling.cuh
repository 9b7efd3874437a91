// How unmask_step draws (igpo/ops/_sampling.py): exact Gumbel noise, and picks from masses by a uniform.
#pragma once

#include "common.cuh"

namespace igpo::cuda {
namespace {

// Natural logarithm of a normal x > 0, relative error below 1e-13. Every operation is correctly rounded and none is
// fused, so the bits are those of igpo/ops/_sampling.py. x = 2^k m, m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m-1)/(m+1)).
__device__ inline double exact_log(double x) {
  const int64_t bits = __double_as_longlong(x);
  const int64_t k = (bits - 0x3FE6A09E667F3BCD) >> 52;
  const double m = __longlong_as_double(bits - static_cast<int64_t>(static_cast<uint64_t>(k) << 52));
  const double f = __dsub_rn(m, 1.0), s = __ddiv_rn(f, __dadd_rn(f, 2.0)), z = __dmul_rn(s, s);
  double p = 1.0 / 17.0;
  p = __dadd_rn(__dmul_rn(p, z), 1.0 / 15.0);
  p = __dadd_rn(__dmul_rn(p, z), 1.0 / 13.0);
  p = __dadd_rn(__dmul_rn(p, z), 1.0 / 11.0);
  p = __dadd_rn(__dmul_rn(p, z), 1.0 / 9.0);
  p = __dadd_rn(__dmul_rn(p, z), 1.0 / 7.0);
  p = __dadd_rn(__dmul_rn(p, z), 1.0 / 5.0);
  p = __dadd_rn(__dmul_rn(p, z), 1.0 / 3.0);
  const double r = __dadd_rn(__dmul_rn(s, __dmul_rn(p, z)), s);
  return __dadd_rn(__dmul_rn(static_cast<double>(k), 0.69314718055994530942), __dadd_rn(r, r));
}

// Gumbel noise of one token: words 2 (token % 2) and the next of the Philox counter token / 2, 52 bits.
__device__ inline double gumbel(const Words& words, int64_t token) {
  const bool odd = token & 1;
  const double u = uniform53(odd ? words.w[2] : words.w[0], odd ? words.w[3] : words.w[1]);
  return -exact_log(-exact_log(u));
}

constexpr double kBelowOne = 0x1.fffffffffffffp-1;

// The fraction of `mass` that target - before is, in [0, 1).
IGPO_DEVICE double fraction(double target, double before, double mass) {
  const double u = (target - before) / mass;
  return u < 0 ? 0 : u < kBelowOne ? u : kBelowOne;
}

// Which of `count` masses the fraction u in [0, 1) of `sum` falls in, and where in it. Never one without mass; where
// rounding overshoots, the last one with mass.
template <class Mass>
IGPO_DEVICE int pick(int count, double sum, Mass&& mass, double& u) {
  const double target = u * sum;
  double before = 0, last_before = 0, last_mass = 1;
  int last = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const double m = mass(i);
    if (!(m > 0)) continue;
    last = i;
    last_before = before;
    last_mass = m;
    before += m;
    if (target < before) break;
  }
  u = target < before ? fraction(target, last_before, last_mass) : kBelowOne;
  return last;
}

// The same among the lanes of a warp, each with its mass; every lane has the answer.
IGPO_DEVICE int pick_lane(double mass, double& u) {
  double upto = mass;
  for (int offset = 1; offset < 32; offset *= 2) {
    const double other = __shfl_up_sync(kAllLanes, upto, offset);
    if (lane_id() >= offset) upto += other;
  }
  const double target = u * __shfl_sync(kAllLanes, upto, 31);
  const unsigned any = __ballot_sync(kAllLanes, mass > 0);
  const unsigned above = __ballot_sync(kAllLanes, mass > 0 && target < upto);
  const int lane = above ? __ffs(static_cast<int>(above)) - 1 : any ? 31 - __clz(static_cast<int>(any)) : 0;
  const double mine = above ? fraction(target, upto - mass, mass) : kBelowOne;
  u = __shfl_sync(kAllLanes, mine, lane);
  return lane;
}

}  // namespace
}  // namespace igpo::cuda
