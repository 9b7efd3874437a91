#include <cstddef>

#include "ops.h"
#include "parallel.h"

namespace igpo::IGPO_ISA {
namespace {

constexpr float kMaxLogRatio = 20.0f;

float bounded(float x) { return x < -kMaxLogRatio ? -kMaxLogRatio : x > kMaxLogRatio ? kMaxLogRatio : x; }

struct Sums {
  double loss, clipped, kl, ratio;
  int64_t tokens;
};

struct Term {
  float value, slope, ratio;  // slope: d value / d log ratio
  bool clipped;
};

Term surrogate(float log_ratio, float advantage, float low, float high) {
  const float ratio = __builtin_expf(bounded(log_ratio));
  const float inside = ratio < 1 - low ? 1 - low : ratio > 1 + high ? 1 + high : ratio;
  const float plain = ratio * advantage, limited = inside * advantage;
  if (limited < plain) return {-limited, 0.0f, ratio, true};
  return {-plain, __builtin_fabsf(log_ratio) < kMaxLogRatio ? -plain : 0.0f, ratio, false};
}

void divergence(float delta, int kl, float& value, float& slope) {
  if (kl == 0) {
    value = delta;
    slope = 1.0f;
  } else if (kl == 1) {
    value = 0.5f * delta * delta;
    slope = delta;
  } else {
    const float rise = __builtin_expm1f(bounded(-delta));
    value = rise + delta;
    slope = __builtin_fabsf(delta) < kMaxLogRatio ? -rise : 1.0f;
  }
}

}  // namespace

// out: loss, clip_fraction, kl, ratio_mean. Rows are summed in float64, then added in order.
void policy_loss(const float* logprob, const float* old_logprob, const float* advantages, const bool* token_mask,
                 const float* weights, const float* ref_logprob, float* grad, float* out, int64_t rows, int64_t length,
                 double low, double high, bool sequence, double kl_coef, int kl, int threads) {
  Sums* sums = new Sums[static_cast<std::size_t>(rows > 0 ? rows : 1)];
  const float below = static_cast<float>(low), above = static_cast<float>(high), beta = static_cast<float>(kl_coef);
  parallel_for(rows, threads, [=](int64_t row) {
    const float *p = logprob + row * length, *q = old_logprob + row * length;
    const float* ref = ref_logprob ? ref_logprob + row * length : nullptr;
    const bool* mask = token_mask + row * length;
    float* g = grad + row * length;
    const float a = advantages[row], weight = weights[row];
    Sums s{};
    Term whole{};
    if (sequence) {
      double log_ratio = 0;
      for (int64_t i = 0; i < length; ++i)
        if (mask[i]) log_ratio += p[i] - q[i], ++s.tokens;
      whole = surrogate(static_cast<float>(log_ratio / static_cast<double>(s.tokens ? s.tokens : 1)), a, below, above);
      s.tokens = 0;
    }
    for (int64_t i = 0; i < length; ++i) {
      g[i] = 0;
      if (!mask[i]) continue;
      // with one ratio per row, its n tokens each carry the term and each hold 1/n of its slope: n * (1/n) = 1
      const Term term = sequence ? whole : surrogate(p[i] - q[i], a, below, above);
      float value = 0, slope = 0;
      if (ref) divergence(p[i] - ref[i], kl, value, slope);
      g[i] = weight * (term.slope + beta * slope);
      s.loss += weight * (term.value + beta * value);
      s.clipped += term.clipped;
      s.kl += value;
      s.ratio += term.ratio;
      ++s.tokens;
    }
    sums[row] = s;
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
  const double tokens = static_cast<double>(all.tokens ? all.tokens : 1);
  out[0] = static_cast<float>(all.loss);
  out[1] = static_cast<float>(all.clipped / tokens);
  out[2] = static_cast<float>(all.kl / tokens);
  out[3] = static_cast<float>(all.ratio / tokens);
}

}  // namespace igpo::IGPO_ISA
