#include <cstddef>

#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace igpo::IGPO_ISA {
namespace {

constexpr float kMaxLogRatio = 20.0f;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef double D __attribute__((vector_size(8 * kLanes)));

IGPO_INLINE F magnitude(F x) { return select(x < 0, -x, x); }
IGPO_INLINE F bounded(F x) {
  x = select(x < -kMaxLogRatio, splat(-kMaxLogRatio), x);
  return select(x > kMaxLogRatio, splat(kMaxLogRatio), x);
}

// e^x - 1 = 2^n (e^r - 1) + (2^n - 1) for |x| <= 20: x = n ln2 + r, e^r - 1 by its series to r^7/7! (relative 2e-8 at
// |r| = ln2/2), so that small x keep their digits. `power` is 2^n, and e^x = power + power * series.
IGPO_INLINE F series(F x, F& power) {
  const F magic = splat(0x1.8p23f);
  const F shifted = x * kLog2e + magic;
  const F n = shifted - magic;
  const F r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  power = reinterpret_cast<F>((float_to_bits(shifted) << 23) + 0x3f800000);
  F p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  return p * r;
}
IGPO_INLINE F exponential(F x) {
  F power, s = series(x, power);
  return power * s + power;
}
IGPO_INLINE F exponential_minus_1(F x) {
  F power, s = series(x, power);
  return power * s + (power - 1.0f);
}

struct Sums {
  double loss, clipped, kl, ratio, tokens;
};

struct Term {
  F value, slope, ratio;  // slope: d value / d log ratio
  I clipped;
};

IGPO_INLINE Term surrogate(F log_ratio, float advantage, float low, float high) {
  const F ratio = exponential(bounded(log_ratio));
  F inside = select(ratio < 1 - low, splat(1 - low), ratio);
  inside = select(inside > 1 + high, splat(1 + high), inside);
  const F plain = ratio * advantage, limited = inside * advantage;
  const I clipped = limited < plain;
  const F slope = select(magnitude(log_ratio) < kMaxLogRatio, -plain, F{});
  return {select(clipped, -limited, -plain), select(clipped, F{}, slope), ratio, clipped};
}

IGPO_INLINE void divergence(F delta, int kl, F& value, F& slope) {
  if (kl == 0) {
    value = delta;
    slope = splat(1.0f);
  } else if (kl == 1) {
    value = 0.5f * delta * delta;
    slope = delta;
  } else {
    const F rise = exponential_minus_1(bounded(-delta));
    value = rise + delta;
    slope = select(magnitude(delta) < kMaxLogRatio, -rise, splat(1.0f));
  }
}

IGPO_INLINE F read(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : load_tail(p, static_cast<int>(n), 0.0f);
}
IGPO_INLINE I read(const bool* p, int64_t n) {  // -1 where true
  Bytes bytes{};
  std::memcpy(&bytes, p, static_cast<std::size_t>(n < kLanes ? n : kLanes));
  return __builtin_convertvector(bytes, I) != 0;
}
IGPO_INLINE void write(float* p, F x, int64_t n) {
  std::memcpy(p, &x, sizeof(float) * static_cast<std::size_t>(n < kLanes ? n : kLanes));
}
IGPO_INLINE void accumulate(D& sum, I mask, F x) { sum += __builtin_convertvector(select(mask, x, F{}), D); }
IGPO_INLINE double total(D x) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

struct Row {
  const float *logprob, *old_logprob, *ref;  // ref may be null
  const bool* mask;
  float* grad;
  int64_t length;
  float advantage, weight;

  // log(policy / old), 0 where the mask is off: whatever is stored there, -inf and NaN included, is not looked at
  IGPO_INLINE F log_ratio(int64_t i, I on) const {
    return select(on, read(logprob + i, length - i) - read(old_logprob + i, length - i), F{});
  }
  float mean_log_ratio() const {
    D sum{};
    int64_t tokens = 0;
    for (int64_t i = 0; i < length; i += kLanes) {
      const I on = read(mask + i, length - i);
      accumulate(sum, on, log_ratio(i, on));
    }
    for (int64_t i = 0; i < length; ++i) tokens += mask[i];
    return static_cast<float>(total(sum) / static_cast<double>(tokens ? tokens : 1));
  }
};

Sums row_loss(const Row& row, float low, float high, bool sequence, float kl_coef, int kl) {
  D loss{}, divergences{}, ratios{}, clipped{}, tokens{};
  // with one ratio per row, its n tokens each carry the term and each hold 1/n of its slope: n * (1/n) = 1
  Term term{};
  if (sequence) term = surrogate(splat(row.mean_log_ratio()), row.advantage, low, high);
  for (int64_t i = 0; i < row.length; i += kLanes) {
    const int64_t left = row.length - i;
    const I on = read(row.mask + i, left);
    if (!sequence) term = surrogate(row.log_ratio(i, on), row.advantage, low, high);
    F value{}, slope{};
    if (row.ref) {
      const F delta = read(row.logprob + i, left) - read(row.ref + i, left);
      divergence(select(on, delta, F{}), kl, value, slope);
    }
    write(row.grad + i, select(on, row.weight * (term.slope + kl_coef * slope), F{}), left);
    accumulate(loss, on, row.weight * (term.value + kl_coef * value));
    accumulate(divergences, on, value);
    accumulate(ratios, on, term.ratio);
    accumulate(clipped, on & term.clipped, splat(1.0f));
    accumulate(tokens, on, splat(1.0f));
  }
  return {total(loss), total(clipped), total(divergences), total(ratios), total(tokens)};
}

}  // namespace

// out: loss, clip_fraction, kl, ratio_mean. Rows are summed in float64, then added in order.
void policy_loss(const float* logprob, const float* old_logprob, const float* advantages, const bool* token_mask,
                 const float* weights, const float* ref_logprob, float* grad, float* out, int64_t rows, int64_t length,
                 double low, double high, bool sequence, double kl_coef, int kl, int threads) {
  Sums* sums = new Sums[static_cast<std::size_t>(rows > 0 ? rows : 1)];
  const float below = static_cast<float>(low), above = static_cast<float>(high), beta = static_cast<float>(kl_coef);
  parallel_for(rows, threads, [=](int64_t r) {
    const int64_t at = r * length;
    const Row row{logprob + at, old_logprob + at, ref_logprob ? ref_logprob + at : nullptr, token_mask + at, grad + at,
                  length, advantages[r], weights[r]};
    sums[r] = row_loss(row, below, above, sequence, beta, kl);
  });
  Sums all{};
  for (int64_t row = 0; row < rows; ++row) {
    all.loss += sums[row].loss;
    all.clipped += sums[row].clipped;
    all.kl += sums[row].kl;
    all.ratio += sums[row].ratio;
    all.tokens += sums[row].tokens;
  }
  delete[] sums;
  const double tokens = all.tokens > 0 ? all.tokens : 1;
  out[0] = static_cast<float>(all.loss);
  out[1] = static_cast<float>(all.clipped / tokens);
  out[2] = static_cast<float>(all.kl / tokens);
  out[3] = static_cast<float>(all.ratio / tokens);
}

}  // namespace igpo::IGPO_ISA
