// Draws of unmask_step: the exact Gumbel noise, and the filter that spares nearly every token from computing it.
#pragma once

#include "philox.h"
#include "simd.h"

namespace igpo::IGPO_ISA {
namespace {

typedef uint64_t Q __attribute__((vector_size(4 * kLanes)));

// A product that is rounded on its own. Without the barrier the compiler may fuse it with a sum, and the noise would
// differ in its last bit between instruction sets.
IGPO_INLINE double product(double a, double b) {
  double p = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(p));
#elif defined(__aarch64__)
  asm("" : "+w"(p));
#else
  volatile double stored = p;
  p = stored;
#endif
  return p;
}

// Natural logarithm of a normal x > 0, relative error below 1e-13, from correctly rounded operations in a fixed order:
// igpo/ops/_sampling.py computes the same bits. x = 2^k m, m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m-1)/(m+1)).
inline double exact_log(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  const int64_t k = (bits - 0x3FE6A09E667F3BCD) >> 52;
  bits -= static_cast<int64_t>(static_cast<uint64_t>(k) << 52);
  double m;
  std::memcpy(&m, &bits, 8);
  const double f = m - 1.0, s = f / (f + 2.0), z = product(s, s);
  double p = 1.0 / 17.0;
  for (int odd = 15; odd >= 3; odd -= 2) p = product(p, z) + 1.0 / odd;
  const double r = product(s, product(z, p)) + s;
  return product(static_cast<double>(k), 0.69314718055994530942) + (r + r);
}

// Gumbel noise of one token: words 2 (token % 2) and the next of the Philox counter token / 2, 52 bits.
inline double gumbel(uint64_t key, uint32_t position, uint64_t row_id, int64_t token) {
  const Words words = philox(key, position, static_cast<uint32_t>(token >> 1), row_id);
  const int first = 2 * static_cast<int>(token & 1);
  return -exact_log(-exact_log(uniform53(words.w[first], words.w[first + 1])));
}

IGPO_INLINE Q multiply_low32(Q a, Q b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Q>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Q>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Q>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

IGPO_INLINE bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8(reinterpret_cast<__m128i>(mask)) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// Philox for consecutive tokens of one position. Two tokens share a counter: the high words of their uniforms are words
// 0 and 2, so that 64-bit lanes of (word 2, word 0) are 32-bit lanes in token order.
class TokenPhilox {
 public:
  TokenPhilox(uint64_t key, uint32_t position, uint64_t row_id) : position_(position), row_id_(row_id) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      round_key_[2 * round] = k0;
      round_key_[2 * round + 1] = k1;
    }
  }

  // The high words of 2 * kLanes tokens from `token` on (even). Two chains hide the latency of the multiplications.
  // Bits above 32 of a lane are garbage, which multiply_low32 ignores.
  IGPO_INLINE void high_words(int64_t token, U out[2]) const {
    Q c0[2], c1[2], c2[2], c3[2], iota;
    for (int i = 0; i < kLanes / 2; ++i) iota[i] = static_cast<uint64_t>(i);
    for (int j = 0; j < 2; ++j) {
      c0[j] = Q{} + position_;
      c1[j] = iota + static_cast<uint64_t>((token >> 1) + j * kLanes / 2);
      c2[j] = Q{} + static_cast<uint32_t>(row_id_);
      c3[j] = Q{} + (row_id_ >> 32);
    }
    for (int round = 0; round < 10; ++round)
      for (int j = 0; j < 2; ++j) {
        const Q p0 = multiply_low32(c0[j], Q{} + 0xD2511F53u), p1 = multiply_low32(c2[j], Q{} + 0xCD9E8D57u);
        c0[j] = (p1 >> 32) ^ c1[j] ^ (Q{} + round_key_[2 * round]);
        c2[j] = (p0 >> 32) ^ c3[j] ^ (Q{} + round_key_[2 * round + 1]);
        c1[j] = p1;
        c3[j] = p0;
      }
    for (int j = 0; j < 2; ++j) out[j] = reinterpret_cast<U>((c0[j] & 0xffffffffu) | (c2[j] << 32));
  }

 private:
  uint64_t round_key_[20];
  uint32_t position_;
  uint64_t row_id_;
};

struct Winner {
  double score = -__builtin_inf();
  int64_t token = 0;
};

struct GumbelRow {
  uint64_t key, row_id;
  uint32_t position;
  double temperature;
};

// Carries the winner of logits/temperature + noise over x[0 .. n), the tokens from `begin` on; n a multiple of 2 * kLanes.
//
// With noise -log(-log(1-v)), a token beats the score b only if v <= 1 - exp(-exp(x/T-b)) <= exp(x/T-b). The first
// bound needs the high word of v and one float exponential; what passes it (a handful of tokens a row) is scored
// exactly. The bound is loosened by far more than float32 rounding, so the filter never changes the winner. Where x/T and
// b overflow float32 the excess is NaN, and passes.
template <class T>
inline void gumbel_argmax(const GumbelRow& row, const T* x, int64_t n, int64_t begin, Winner& best) {
  const float inv_t = static_cast<float>(1 / row.temperature);
  const auto loosened = [](double score) {
    return splat(static_cast<float>(score - 1e-6 * (score < 0 ? -score : score) - 1e-3));
  };
  const TokenPhilox random(row.key, row.position, row.row_id);
  F floor = loosened(best.score);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    U high[2];
    random.high_words(begin + i, high);
    I passes[2];
    for (int j = 0; j < 2; ++j) {
      const F y = load(x + i + j * kLanes) * inv_t;
      const F excess = max(y * 1.000001f, y * 0.999999f) - floor;
      const F v = __builtin_convertvector(reinterpret_cast<I>(~high[j] >> 1), F) * 0x1p-31f;
      passes[j] = ~(v > exp_nonpositive(select(excess > 0.0f, splat(0.0f), excess)));
    }
    if (!any(passes[0] | passes[1])) continue;
    for (int lane = 0; lane < 2 * kLanes; ++lane) {
      if (!passes[lane / kLanes][lane % kLanes]) continue;
      const int64_t token = begin + i + lane;
      const double score = static_cast<double>(to_float(x[i + lane])) / row.temperature +
                           gumbel(row.key, row.position, row.row_id, token);
      if (score > best.score) best = {score, token};
    }
    floor = loosened(best.score);
  }
}

}  // namespace
}  // namespace igpo::IGPO_ISA
