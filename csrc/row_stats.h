// One pass over a row of logits, and the gradient of what it computes: shared by the ops on softmax statistics.
//
// With t_v = (x_v - max) * scale, scale = 1 / temperature:  sum = Σ e^t,  dot = Σ t e^t  (a logit of -inf adds nothing),
//   log p_v = t_v - ln sum,   H = ln sum - dot / sum.
// A row is cut into slices of kSlice elements whatever the number of rows or threads, and slices are combined in order:
// a row's result is the same bits alone or in a batch, on one thread or many. NaN or +inf anywhere in a row, or -inf
// everywhere, makes its statistics NaN, as in torch.log_softmax.
#pragma once

#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel.h"
#include "simd.h"

namespace igpo::IGPO_ISA {
namespace {

constexpr int64_t kPair = 2 * kLanes;
constexpr int64_t kTile = 2048;    // 4-8 KiB: read for its maximum, then again from L1 for the sums
constexpr int64_t kSlice = 16384;  // 8 slices at V = 126464; a few microseconds of work each

struct Stats {
  float max, sum, dot;
};

// How the rows of a logits tensor lie in memory, and which of them count.
struct RowSet {
  const int64_t* offsets;  // of each row's first element, in elements
  const int64_t* targets;
  const float* weights;  // or null; a row of weight 0 does not count
  int64_t rows, vocab, ignore_index;

  bool counts(int64_t row) const { return targets[row] != ignore_index && !(weights && weights[row] == 0); }
  int64_t slices() const { return (vocab + kSlice - 1) / kSlice; }
  int64_t rows_per_task() const { return vocab >= kSlice ? 1 : kSlice / vocab; }
};

// body(T*) with the element type that the tag `dtype` names.
template <class Body>
inline void with_dtype(int dtype, Body&& body) {
  if (dtype == 0) return body(static_cast<float*>(nullptr));
  if (dtype == 1) return body(static_cast<Bf16*>(nullptr));
  body(static_cast<Fp16*>(nullptr));
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// load_pair of the first n <= kPair elements, -inf after them.
template <class T>
IGPO_INLINE void load_pair_upto(const T* p, int64_t n, F& a, F& b) {
  if (n >= kPair) return load_pair(p, a, b);
  T padded[kPair];
  for (int i = 0; i < kPair; ++i) from_float(-kInf, padded + i);
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  load_pair(padded, a, b);
}

template <class T>
IGPO_INLINE float tile_max(const T* x, int64_t n) {  // ignores NaN: the sums will not
  F top[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    F v[4];
    load_pair(x + i, v[0], v[1]);
    load_pair(x + i + kPair, v[2], v[3]);
    for (int k = 0; k < 4; ++k) top[k] = max(v[k], top[k]);
  }
  for (; i < n; i += kPair) {
    F a, b;
    load_pair_upto(x + i, n - i, a, b);
    top[0] = max(a, top[0]);
    top[1] = max(b, top[1]);
  }
  return max_lanes(max(max(top[0], top[1]), max(top[2], top[3])));
}

// The exponent of a logit. Where t itself is used it is kept at -128 or more: e^t is 0 there, and t * e^t has to be 0
// for a logit of -inf too. NaN stays NaN.
template <bool kBounded>
IGPO_INLINE F exponent(F x, float shift, float scale) {
  const F t = (x - shift) * scale;
  return kBounded ? max(splat(-128.0f), t) : t;
}

template <bool kDot>
IGPO_INLINE void accumulate(F x, float shift, float scale, F& sum, F& dot) {
  const F t = exponent<kDot>(x, shift, scale);
  const F e = exp_nonpositive(t);
  sum += e;
  if (kDot) dot += t * e;
}

// e^t and t of a change of maximum, from `from` to the larger `to`.
inline float rescale(float from, float to, float scale, float& t) {
  t = (from - to) * scale;
  if (t < -128.0f) t = -128.0f;
  return exp_nonpositive(splat(t))[0];
}

// kDot: whether dot is wanted (it is 0 otherwise).
template <bool kDot, class T>
Stats slice_stats(const T* x, int64_t count, float scale) {
  float top = -kInf;
  F sum[4] = {}, dot[4] = {};
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const T* tile = x + begin;
    const int64_t n = smaller(kTile, count - begin);
    const float tile_top = tile_max(tile, n);
    if (tile_top > top) {
      if (top > -kInf) {
        float t;
        const float factor = rescale(top, tile_top, scale, t);
        for (int k = 0; k < 4; ++k) {
          dot[k] = (dot[k] + t * sum[k]) * factor;
          sum[k] *= factor;
        }
      }
      top = tile_top;
    }
    const float shift = top == -kInf ? 0.0f : top;
    int64_t i = 0;
    for (; i + 2 * kPair <= n; i += 2 * kPair) {
      __builtin_prefetch(tile + i + kTile);  // the next tile arrives while this one is computed
      __builtin_prefetch(tile + i + kTile + kPair);
      F v[4];
      load_pair(tile + i, v[0], v[1]);
      load_pair(tile + i + kPair, v[2], v[3]);
      for (int k = 0; k < 4; ++k) accumulate<kDot>(v[k], shift, scale, sum[k], dot[k]);
    }
    for (; i < n; i += kPair) {
      F a, b;
      load_pair_upto(tile + i, n - i, a, b);
      accumulate<kDot>(a, shift, scale, sum[0], dot[0]);
      accumulate<kDot>(b, shift, scale, sum[1], dot[1]);
    }
  }
  return {top, sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])), sum_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]))};
}

inline Stats rescaled(Stats s, float to, float scale) {
  if (s.max == -kInf) return {to, s.sum, s.dot};  // nothing but -inf and NaN: its sums are 0 or NaN
  float t;
  const float factor = rescale(s.max, to, scale, t);
  return {to, s.sum * factor, (s.dot + t * s.sum) * factor};
}
inline Stats combine(Stats a, Stats b, float scale) {
  const float top = a.max > b.max ? a.max : b.max;
  a = rescaled(a, top, scale);
  b = rescaled(b, top, scale);
  return {top, a.sum + b.sum, a.dot + b.dot};
}

inline float log_sum(const Stats& s) { return s.max == -kInf ? __builtin_nanf("") : __builtin_logf(s.sum); }
inline float entropy(const Stats& s) {
  const float h = log_sum(s) - s.dot / s.sum;
  return h < 0 ? 0.0f : h;
}

// finish(row, stats) for the rows that count, skip(row) for the others, which are not read.
template <bool kDot, class T, class Finish, class Skip>
void for_each_row(const T* logits, const RowSet& set, float scale, int threads, Finish&& finish, Skip&& skip) {
  const int64_t slices = set.slices();
  const auto slice = [&](int64_t row, int64_t s) {
    const int64_t begin = s * kSlice;
    return slice_stats<kDot>(logits + set.offsets[row] + begin, smaller(kSlice, set.vocab - begin), scale);
  };
  // few rows: slices are the tasks; else whole rows, or several short ones. The arithmetic is the same.
  if (slices > 1 && set.rows < 4 * int64_t{threads}) {
    Stats* parts = new Stats[static_cast<size_t>(set.rows * slices)];
    parallel_for(set.rows * slices, threads, [&](int64_t task) {
      if (set.counts(task / slices)) parts[task] = slice(task / slices, task % slices);
    });
    for (int64_t row = 0; row < set.rows; ++row) {
      if (!set.counts(row)) {
        skip(row);
        continue;
      }
      Stats all = parts[row * slices];
      for (int64_t s = 1; s < slices; ++s) all = combine(all, parts[row * slices + s], scale);
      finish(row, all);
    }
    delete[] parts;
    return;
  }
  const int64_t block = set.rows_per_task();
  parallel_for((set.rows + block - 1) / block, threads, [&](int64_t task) {
    for (int64_t row = task * block; row < smaller(set.rows, (task + 1) * block); ++row) {
      if (!set.counts(row)) {
        skip(row);
        continue;
      }
      Stats all = slice(row, 0);
      for (int64_t s = 1; s < slices; ++s) all = combine(all, slice(row, s), scale);
      finish(row, all);
    }
  });
}

// A gradient is fresh memory, and its first touch costs more than its arithmetic: a page fault per 4 KiB. Asking for
// 2 MiB pages is advice; where the system gives none nothing changes.
constexpr size_t kHugeFrom = size_t{4} << 20;

inline void ask_for_huge_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugeFrom) return;
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The gradient of one row: out_v = e^t_v * (linear * t_v + constant), plus `at_target` in the target's place.
// linear is 0 unless the entropy has a gradient.
struct RowGradient {
  float constant, linear, at_target;
};

template <bool kLinear>
IGPO_INLINE F gradient_of(F x, float shift, float scale, const RowGradient g) {
  const F t = exponent<kLinear>(x, shift, scale);
  const F e = exp_nonpositive(t);
  return kLinear ? e * (t * g.linear + g.constant) : e * g.constant;
}

// out may be x: a vector is read before it is written.
template <bool kLinear, class T>
void slice_gradient(const T* x, T* out, int64_t count, float shift, float scale, const RowGradient g) {
  int64_t i = 0;
  for (; i + 2 * kPair <= count; i += 2 * kPair) {
    F v[4];
    load_pair(x + i, v[0], v[1]);
    load_pair(x + i + kPair, v[2], v[3]);
    for (int k = 0; k < 4; ++k) v[k] = gradient_of<kLinear>(v[k], shift, scale, g);
    store_pair(out + i, v[0], v[1]);
    store_pair(out + i + kPair, v[2], v[3]);
  }
  for (; i < count; i += kPair) {
    const int64_t n = smaller(kPair, count - i);
    F a, b;
    load_pair_upto(x + i, n, a, b);
    T last[kPair];
    store_pair(last, gradient_of<kLinear>(a, shift, scale, g), gradient_of<kLinear>(b, shift, scale, g));
    std::memcpy(out + i, last, static_cast<size_t>(n) * sizeof(T));
  }
}

// Row r of `out` (rows x vocab, contiguous) becomes the gradient(r) of logits' row r, or zeros where it does not count.
template <bool kLinear, class T, class Gradient>
void for_each_gradient(const T* logits, T* out, const RowSet& set, const float* row_max, float scale, int threads,
                       Gradient&& gradient) {
  ask_for_huge_pages(out, static_cast<size_t>(set.rows * set.vocab) * sizeof(T));
  const auto part = [&](int64_t row, int64_t begin, int64_t end) {
    T* to = out + row * set.vocab;
    if (!set.counts(row)) {
      std::memset(static_cast<void*>(to + begin), 0, static_cast<size_t>(end - begin) * sizeof(T));
      return;
    }
    const T* x = logits + set.offsets[row];
    const RowGradient g = gradient(row);
    const int64_t target = set.targets[row];
    const bool has_target = begin <= target && target < end;
    // the target's logit before `out`, which may be `logits`, is written; its gradient is rounded once
    const F at = has_target ? splat(to_float(x[target])) : F{};
    slice_gradient<kLinear>(x + begin, to + begin, end - begin, row_max[row], scale, g);
    if (has_target) from_float(gradient_of<kLinear>(at, row_max[row], scale, g)[0] + g.at_target, to + target);
  };
  const int64_t slices = set.slices();
  if (slices > 1)
    return parallel_for(set.rows * slices, threads, [&](int64_t task) {
      const int64_t begin = task % slices * kSlice;
      part(task / slices, begin, smaller(set.vocab, begin + kSlice));
    });
  const int64_t block = set.rows_per_task();
  parallel_for((set.rows + block - 1) / block, threads, [&](int64_t task) {
    for (int64_t row = task * block; row < smaller(set.rows, (task + 1) * block); ++row) part(row, 0, set.vocab);
  });
}

}  // namespace
}  // namespace igpo::IGPO_ISA
