// Statistics of rows of logits: how a row is cut, and the arithmetic. row_kernels.cuh has the kernels.
//
// With u_v = (x_v - max) * scale * log2(e):  sum = Σ 2^u,  dot = Σ u 2^u  (a logit of -inf adds nothing). NaN or +inf anywhere
// in a row, or -inf everywhere, makes its statistics NaN, as in torch.log_softmax.
//
// A row is cut by its length alone: one warp, one block, or kSlices blocks; a thread adds up the same elements in the same
// order however they are read, partial results are combined in a fixed order, and every product that is added is rounded as
// written (no contraction left to the compiler). So a row has the same bits alone or in a batch, aligned or not, and
// whether its blocks are a cluster (compute capability 9.0) or meet in memory.
//
// With blocks, a part of a row waits in shared memory: it is read once for maximum, sums and gradient. All of it is asked for
// at once (asynchronous copies), and the maximum is taken while it arrives.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace igpo::cuda {

constexpr int kThreads = 256;       // of every block here (chosen, to be measured)
constexpr int kSlices = 8;          // blocks of a long row; the portable cluster size
constexpr int64_t kWarpRow = 1024;  // up to here a row is one warp's
constexpr int64_t kBlockRow = 16384;  // up to here it is one block's: 64 elements a thread (igpo/ops/_rows.py: UNCUT)
constexpr int kStages = 4;

struct Cut {
  int group;   // threads of a part
  int slices;  // parts of a row
  int length;  // elements of a part; the last may be shorter, or empty
};
inline Cut cut(int64_t vocab) {
  if (vocab <= kWarpRow) return {32, 1, static_cast<int>(vocab)};
  if (vocab <= kBlockRow) return {kThreads, 1, static_cast<int>(vocab)};
  const int64_t length = (vocab + kSlices - 1) / kSlices;
  return {kThreads, kSlices, static_cast<int>((length + 63) / 64 * 64)};  // 128 bytes in 16 bits
}

// Which rows count; those that do not are never read.
struct RowSet {
  const int64_t* targets;
  const float* weights;  // or null; a row of weight 0 does not count
  int64_t rows, vocab, ignore_index;
  Rows at;  // where the logits of a row are
  IGPO_DEVICE bool counts(int64_t row) const {
    return targets[row] != ignore_index && !(weights && weights[row] == 0.0f);
  }
};

// ---- a part of a row -------------------------------------------------------------------------------------------------

IGPO_DEVICE void copy_async(void* shared, const void* global) {  // 16 bytes
#if defined(IGPO_EMULATE)
  std::memcpy(shared, global, 16);
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}
IGPO_DEVICE void commit_copies() {
#if !defined(IGPO_EMULATE)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most kPending of this thread's groups are under way.
template <int kPending>
IGPO_DEVICE void wait_for_copies() {
#if !defined(IGPO_EMULATE)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// The larger of two packed 16-bit elements each, the other one where one is NaN.
template <class T>
IGPO_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(IGPO_EMULATE)
  T x[2], y[2];
  std::memcpy(x, &a, 4);
  std::memcpy(y, &b, 4);
  for (int k = 0; k < 2; ++k) x[k] = from_float<T>(fmaxf(to_float(x[k]), to_float(y[k])));
  std::memcpy(&a, x, 4);
  return a;
#else
  uint32_t out;
  if constexpr (std::is_same_v<T, Bf16>) asm("max.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  else asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#endif
}

// The largest of `top` and a pack; NaN is passed over: the sums will not pass over it.
template <class T>
IGPO_DEVICE float larger(const Pack<T>& p, float top) {
  if constexpr (sizeof(T) == 2) {
    uint32_t words[4];
    __builtin_memcpy(words, &p, 16);
    const uint32_t pair = larger_pair<T>(larger_pair<T>(words[0], words[1]), larger_pair<T>(words[2], words[3]));
    T two[2];
    __builtin_memcpy(two, &pair, 4);
    return fmaxf(top, fmaxf(to_float(two[0]), to_float(two[1])));
  } else {
    return fmaxf(fmaxf(top, fmaxf(p.at[0], p.at[1])), fmaxf(p.at[2], p.at[3]));
  }
}

// Elements [0, count) at x, in packs; pack i belongs to thread i % kGroup. Beyond the end lies -inf.
template <class T, int kGroup>
struct Part {
  using P = Pack<T>;
  const T* x;
  int count;
  P* staged;  // where the packs wait in shared memory, or null: read again, as a warp always does
  bool aligned;

  IGPO_DEVICE Part(const T* x, int count, P* staged) : x(x), count(count), staged(staged), aligned(is_aligned16(x)) {}
  IGPO_DEVICE int thread() const { return static_cast<int>(threadIdx.x) % kGroup; }
  IGPO_DEVICE int packs() const { return (count + P::size - 1) / P::size; }
  IGPO_DEVICE bool whole(int i) const { return aligned && (i + 1) * P::size <= count; }

  IGPO_DEVICE P read(int i) const {
    P out;
    if (whole(i)) {
      const uint4 raw = reinterpret_cast<const uint4*>(x)[i];
      __builtin_memcpy(&out, &raw, 16);
    } else {
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        const int at = i * P::size + j;
        out.at[j] = at < count ? x[at] : from_float<T>(-kInf);
      }
    }
    return out;
  }
  IGPO_DEVICE P arrived(int i) const {
    const uint4 raw = reinterpret_cast<const uint4*>(staged)[i];
    P out;
    __builtin_memcpy(&out, &raw, 16);
    return out;
  }
  IGPO_DEVICE bool waits() const { return kGroup > 32 && staged; }
  IGPO_DEVICE P get(int i) const { return waits() ? arrived(i) : read(i); }

  IGPO_DEVICE int packs_per_stage() const { return (packs() + kStages * kGroup - 1) / (kStages * kGroup); }
  // Asks for everything; where it is staged, in kStages groups of copies.
  IGPO_DEVICE void ask() const {
    if (!waits()) return;
    const int per_stage = packs_per_stage();
    for (int stage = 0, i = thread(); stage < kStages; ++stage) {
      for (int k = 0; k < per_stage; ++k, i += kGroup) {
        if (i >= packs()) continue;
        if (whole(i)) copy_async(staged + i, reinterpret_cast<const P*>(x) + i);
        else staged[i] = read(i);
      }
      commit_copies();
    }
  }
  template <int kStage>
  IGPO_DEVICE float top_of_stage(float top) const {
    wait_for_copies<kStages - 1 - kStage>();
    const int per_stage = packs_per_stage();
    for (int k = 0, i = thread() + kStage * per_stage * kGroup; k < per_stage && i < packs(); ++k, i += kGroup)
      top = larger(arrived(i), top);
    return top;
  }
  // This thread's maximum.
  IGPO_DEVICE float top() const {
    static_assert(kStages == 4, "one call a stage");
    if (waits()) return top_of_stage<3>(top_of_stage<2>(top_of_stage<1>(top_of_stage<0>(-kInf))));
    float top = -kInf;
#pragma unroll 1
    for (int i = thread(); i < packs(); i += kGroup) top = larger(read(i), top);
    return top;
  }
};

// ---- statistics ------------------------------------------------------------------------------------------------------

struct alignas(16) Stats {
  float max, sum, dot, unused;
};

// u 2^u is 0 there; u = -inf would give NaN.
constexpr float kLowest = -200.0f;

IGPO_DEVICE float shift_of(float max) { return max == -kInf ? 0.0f : max; }
IGPO_DEVICE float exponent(float x, float shift, float scale2) { return __fmul_rn(__fsub_rn(x, shift), scale2); }

template <bool kDot>
IGPO_DEVICE void accumulate(float x, float shift, float scale2, float& sum, float& dot) {
  const float u = exponent(x, shift, scale2), e = exp2_fast(u);
  sum = __fadd_rn(sum, e);
  if (kDot) dot = __fmaf_rn(fmaxf(u, kLowest), e, dot);
}

struct GroupScratch {  // of a block, in shared memory
  float max[kThreads / 32], sum[kThreads / 32], dot[kThreads / 32];
};

// The statistics of a part, in every thread of its group. Blocks pass two barriers.
template <bool kDot, class T, int kGroup>
IGPO_DEVICE Stats part_stats(const Part<T, kGroup>& part, float scale2, GroupScratch* scratch) {
  constexpr int kWarps = kGroup / 32;
  float max = warp_reduce(part.top(), Max());
  if (kGroup > 32) {
    if (lane_id() == 0) scratch->max[warp_id()] = max;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, scratch->max[w]);
  }
  const float shift = shift_of(max);
  float sum[2] = {}, dot[2] = {};
#pragma unroll 2
  for (int i = part.thread(); i < part.packs(); i += kGroup) {
    const Pack<T> p = part.get(i);
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j) accumulate<kDot>(to_float(p.at[j]), shift, scale2, sum[j & 1], dot[j & 1]);
  }
  Stats out{max, warp_reduce(__fadd_rn(sum[0], sum[1]), Sum()), 0, 0};
  if (kDot) out.dot = warp_reduce(__fadd_rn(dot[0], dot[1]), Sum());
  if (kGroup == 32) return out;
  if (lane_id() == 0) {
    scratch->sum[warp_id()] = out.sum;
    scratch->dot[warp_id()] = out.dot;
  }
  __syncthreads();
  out.sum = out.dot = 0;
  for (int w = 0; w < kWarps; ++w) {
    out.sum = __fadd_rn(out.sum, scratch->sum[w]);
    out.dot = __fadd_rn(out.dot, scratch->dot[w]);
  }
  return out;
}

// Those of a row from its parts, in their order.
IGPO_DEVICE Stats combined(const Stats* parts, int count, float scale2) {
  Stats all{-kInf, 0, 0, 0};
  for (int k = 0; k < count; ++k) all.max = fmaxf(all.max, parts[k].max);
  for (int k = 0; k < count; ++k) {
    const Stats s = parts[k];
    // a part of -inf and NaN alone has sums of 0 or NaN, whatever the maximum
    const float u = s.max == -kInf ? 0.0f : exponent(s.max, all.max, scale2);
    const float factor = exp2_fast(u);
    all.sum = __fmaf_rn(s.sum, factor, all.sum);
    all.dot = __fmaf_rn(__fmaf_rn(fmaxf(u, kLowest), s.sum, s.dot), factor, all.dot);
  }
  return all;
}

IGPO_DEVICE float log_sum_of(const Stats& s) { return s.max == -kInf ? __uint_as_float(0x7fc00000u) : logf(s.sum); }

}  // namespace igpo::cuda
