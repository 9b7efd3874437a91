// Float vectors of the instruction set this file is compiled for.
//
// Every kernel file is compiled once per instruction set (setup.py passes IGPO_ISA and the flags) and bindings.cpp picks
// one at run time. Compiler vector extensions keep the kernels readable: `a * b + c` is a fused multiply-add where the
// machine has one. Everything here has internal linkage, so that no AVX-512 copy of an inline function can be linked
// into the portable path. Kernel files must not use std containers or algorithms for the same reason.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own _mm512_undefined_ps
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace igpo::IGPO_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

#define IGPO_INLINE inline __attribute__((always_inline))

// Element types of a logits tensor; the value is the tag the Python side passes (igpo/ops/_native.py).
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

IGPO_INLINE F splat(float x) { return x - F{}; }
IGPO_INLINE F bits_to_float(U x) { return reinterpret_cast<F>(x); }
IGPO_INLINE I float_to_bits(F x) { return reinterpret_cast<I>(x); }
IGPO_INLINE F select(I is_true, F a, F b) { return is_true ? a : b; }
IGPO_INLINE F max(F a, F b) {  // b where either is NaN; one instruction, which GCC does not find in `a > b ? a : b`
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

IGPO_INLINE float to_float(float x) { return x; }
IGPO_INLINE float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
IGPO_INLINE float to_float(Fp16 x) {
  // place the half's exponent and mantissa in a float, then scale by 2^112: right for subnormals too
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  float out;
  std::memcpy(&out, &magnitude, 4);
  out *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &out, 4);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // inf and NaN
  bits |= (x.bits & 0x8000u) << 16;
  std::memcpy(&out, &bits, 4);
  return out;
}

IGPO_INLINE F load(const float* p) {
  F out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
IGPO_INLINE F load(const Bf16* p) {
  H half;
  std::memcpy(&half, p, sizeof half);
  return bits_to_float(__builtin_convertvector(half, U) << 16);
}
IGPO_INLINE F load(const Fp16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<F>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<F>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  F out;
  for (int i = 0; i < kLanes; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}

// The first n < kLanes elements, the rest `fill`: no byte past p[n - 1] is read.
template <class T>
IGPO_INLINE F load_tail(const T* p, int n, float fill) {
  F out = splat(fill);
  for (int i = 0; i < n; ++i) out[i] = to_float(p[i]);
  return out;
}

IGPO_INLINE void from_float(float x, float* out) { *out = x; }
IGPO_INLINE void from_float(float x, Bf16* out) {  // round to nearest even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
IGPO_INLINE void from_float(float x, Fp16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  float magnitude = x < 0 ? -x : x;
  uint32_t half;
  if (!(x == x)) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    float shifted = magnitude + 0.5f;  // aligns the half's last bit with the float's: rounds to nearest even
    std::memcpy(&bits, &shifted, 4);
    half = bits - 0x3f000000u;
  } else {
    std::memcpy(&bits, &magnitude, 4);
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

IGPO_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
IGPO_INLINE void store(Bf16* p, F x) {
  const U bits = reinterpret_cast<U>(x);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const H half = __builtin_convertvector((x != x) ? U{} + 0x7fc0u : rounded, H);
  std::memcpy(p, &half, sizeof half);
}
IGPO_INLINE void store(Fp16* p, F x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(x), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
#endif
}

// Two vectors from 2 * kLanes consecutive elements. Which element lands in which lane is fixed per type, and store_pair
// is the inverse; bfloat16 pairs (even elements, odd elements) widen and narrow without any lane-crossing shuffle.
template <class T>
IGPO_INLINE void load_pair(const T* p, F& a, F& b) {
  a = load(p);
  b = load(p + kLanes);
}
template <>
IGPO_INLINE void load_pair(const Bf16* p, F& a, F& b) {
  U both;
  std::memcpy(&both, p, sizeof both);
  a = bits_to_float(both << 16);
  b = bits_to_float(both & 0xffff0000u);
}
template <class T>
IGPO_INLINE void store_pair(T* p, F a, F b) {
  store(p, a);
  store(p + kLanes, b);
}
IGPO_INLINE U rounded_bf16(F x) {  // in the upper half; the lower half is not cleared
  const U bits = reinterpret_cast<U>(x);
  return (x != x) ? U{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}
template <>
IGPO_INLINE void store_pair(Bf16* p, F a, F b) {
  const U both = (rounded_bf16(a) >> 16) | (rounded_bf16(b) & 0xffff0000u);
  std::memcpy(p, &both, sizeof both);
}

// e^x for x <= 0; 0 below -87.3365, where float32 would be subnormal (so -inf gives 0); NaN stays NaN; e^0 is 1.
// x = n ln2 + r with ln2 in two parts, then the degree-5 minimax polynomial of e^r on [-ln2/2, ln2/2] with its first two
// coefficients held at 1 (relative error 1.05e-7). Over all floats in [-87.3365, 0] the relative error is below 1.8e-7
// with fused multiply-adds and 2.1e-7 without (tests/ops/test_token_logprob.py holds the kernels to it).
IGPO_INLINE F exp_nonpositive(F x) {
  const F magic = splat(0x1.8p23f);  // adding it rounds to an integer, which then sits in the low bits
  const F shifted = x * kLog2e + magic;
  const F n = shifted - magic;
  const F r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln2 to 15 bits, times n, is exact
  F p = splat(8.31250101e-3f);
  p = p * r + splat(4.18903306e-2f);
  p = p * r + splat(1.66671157e-1f);
  p = p * r + splat(4.99992311e-1f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(x, splat(-87.3365f), _CMP_NLT_UQ);  // true for NaN
  return _mm512_maskz_scalef_ps(normal, p, n);
#else
  const I power = (float_to_bits(shifted) << 23) + 0x3f800000;
  const I scaled = float_to_bits(p * reinterpret_cast<F>(power));
  const I kept = scaled & ~(x < splat(-87.3365f));
  return reinterpret_cast<F>(kept);
#endif
}

// Sums lanes pairwise: a fixed order, so that a row's result never depends on its surroundings.
IGPO_INLINE float sum_lanes(F x) {
  float lane[kLanes];
  std::memcpy(lane, &x, sizeof lane);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
IGPO_INLINE float max_lanes(F x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

}  // namespace
}  // namespace igpo::IGPO_ISA
