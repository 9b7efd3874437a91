// The slices of a row that unmask_step searches: how a vocabulary is cut, what a slice leaves behind, and how a draw looks
// at a slice again. A slice lies in shared memory: its maximum, its sums and the draw read it there, memory is read once.
#pragma once

#include "sampling.cuh"

namespace igpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMinSlice = 2048;        // elements: a shorter slice costs more than it brings (chosen)
constexpr int kSliceBytes = 80 << 10;  // two slices fit a multiprocessor (chosen)
constexpr int kSliceUnit = 64;         // elements: whole packs of every dtype, an even first token

// How a row is cut: by vocabulary and dtype alone, so that a row's bits depend on nothing else.
struct Cut {
  int length, count;  // of a slice in elements, the last one may be shorter; slices
};

inline Cut cut(int64_t vocab, int element_bytes) {
  const auto round_up = [](int64_t n) { return (n + kSliceUnit - 1) / kSliceUnit * kSliceUnit; };
  int64_t length = round_up((vocab + 7) / 8);
  if (length < kMinSlice) length = kMinSlice;
  if (length > kSliceBytes / element_bytes) length = kSliceBytes / element_bytes;
  return {static_cast<int>(length), static_cast<int>((vocab + length - 1) / length)};
}

// Which exponentials a slice needs: e^y only, or also those of temperature 1; y = (x - max) / temperature.
enum Need { kPlain, kBoth };

enum Confidence { kProb, kMargin, kEntropy, kRandom };  // igpo/ops/_unmask_arguments.py

struct Call {
  const void* logits;
  Rows rows;  // rows.inner is the length of a sequence
  const int64_t* tokens;
  const bool* eligible;
  int64_t mask_id, num_rows, vocab;
  const int64_t* suppress;
  int64_t num_suppress;
  const int64_t* row_ids;
  double temperature, inverse;  // inverse: 1 / (temperature or 1)
  float inv_t, exponent;        // inverse and inverse * log2(e)
  int confidence;
  bool draws, gumbel;
  uint64_t token_key, score_key, gumbel_key;
  Cut cut;
  int cluster;
  const int64_t* list;       // the number of rows that take part, then these rows; null: look at each
  struct Partial* partials;  // of every row and slice, where clusters do not exist
  int64_t* candidate;        // (B, L); -1 where there is none
  float *score, *logprob, *entropy;

  IGPO_DEVICE bool takes_part(int64_t row) const { return tokens[row] == mask_id && (!eligible || eligible[row]); }
  IGPO_DEVICE int64_t num_listed() const { return list ? list[0] : num_rows; }
  IGPO_DEVICE int64_t listed(int64_t i) const { return list ? list[1 + i] : i; }
  IGPO_DEVICE uint64_t row_id(int64_t row) const {
    return static_cast<uint64_t>(row_ids ? row_ids[row / rows.inner] : row / rows.inner);
  }
  IGPO_DEVICE uint32_t position(int64_t row) const { return static_cast<uint32_t>(row % rows.inner); }
};

// What a slice leaves behind. Sums are relative to max, with exponents in units of log 2.
struct Partial {
  double max, second;                      // second: the runner-up, counting a repeated maximum twice
  double sum, weighted, sum1, weighted1;   // of e^y and y e^y; and at temperature 1
  double noisy, value;                     // "gumbel": the best score with noise, the logit it came from
  int64_t first, drawn;                    // the lowest token with the maximum; the token of `noisy`
};
constexpr int kPartialWords = sizeof(Partial) / 8;

// Shared memory beside the slice.
struct Scratch {
  uint64_t keys[kWarps];
  float values[5][kWarps];
  double noisy[kWarps], value[kWarps];
  int64_t drawn[kWarps];
  double sum, weighted, sum1, weighted1, top, second, u;  // of the row, by combine() in unmask_step.cu
  int slice;                                              // that the draw falls in
  float group_mass[kSliceBytes / 16 / 32];
};

inline size_t shared_bytes(Cut c, int element_bytes, int buffers) {
  return static_cast<size_t>(c.length) * static_cast<size_t>(element_bytes) + sizeof(Scratch) +
         static_cast<size_t>(c.count) * (static_cast<size_t>(buffers) * sizeof(Partial) + 4 * sizeof(double));
}

// ---- a slice into shared memory --------------------------------------------------------------------------------------

// 16 bytes from global to shared memory; the thread that asked sees them after copy_async_wait().
IGPO_DEVICE void copy_async16(void* to, const void* from) {
#if defined(IGPO_EMULATE)
  __builtin_memcpy(to, from, 16);
#else
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#endif
}
IGPO_DEVICE void copy_async_wait() {
#if !defined(IGPO_EMULATE)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Fills `packs` with slice s of the row, -inf for suppressed tokens and up to a whole pack; the number of packs.
template <class T>
__device__ int load_slice(const Call& call, int64_t row, int s, Pack<T>* packs) {
  constexpr int kSize = Pack<T>::size;
  const int64_t begin = int64_t{s} * call.cut.length;
  const int n = static_cast<int>(call.vocab - begin < call.cut.length ? call.vocab - begin : call.cut.length);
  const T* x = static_cast<const T*>(call.logits) + call.rows.offset(row) + begin;
  T* flat = reinterpret_cast<T*>(packs);
  __syncthreads();  // the slice before is not read any more
  int head = static_cast<int>((16 - (reinterpret_cast<uintptr_t>(x) & 15)) % 16 / sizeof(T));
  if (head > n) head = n;
  const int vectors = (n - head) / kSize;
  if (head == 0) {
    for (int p = static_cast<int>(threadIdx.x); p < vectors; p += kThreads) copy_async16(packs + p, x + p * kSize);
  } else {  // aligned reads, shifted on their way: the order of sums must not depend on where a row lies
#pragma unroll 1
    for (int p = static_cast<int>(threadIdx.x); p < vectors; p += kThreads) {
      const Pack<T> v = load_streaming(reinterpret_cast<const Pack<T>*>(x + head) + p);
#pragma unroll
      for (int j = 0; j < kSize; ++j) flat[head + p * kSize + j] = v.at[j];
    }
    for (int e = static_cast<int>(threadIdx.x); e < head; e += kThreads) flat[e] = x[e];
  }
  const int num_packs = (n + kSize - 1) / kSize;
  for (int e = head + vectors * kSize + static_cast<int>(threadIdx.x); e < num_packs * kSize; e += kThreads)
    flat[e] = e < n ? x[e] : from_float<T>(-kInf);
  copy_async_wait();
  __syncthreads();
  if (call.num_suppress > 0) {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < call.num_suppress; i += kThreads) {
      const int64_t at = call.suppress[i] - begin;
      if (at >= 0 && at < n) flat[at] = from_float<T>(-kInf);
    }
    __syncthreads();
  }
  return num_packs;
}

// ---- what it leaves behind -------------------------------------------------------------------------------------------

IGPO_DEVICE uint32_t orderable(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
IGPO_DEVICE float from_orderable(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

struct MaxKey {
  IGPO_DEVICE uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// The block's greatest key, in every thread. Two calls need a barrier between them.
IGPO_DEVICE uint64_t block_greatest(uint64_t key, Scratch& scratch) {
  key = warp_reduce(key, MaxKey{});
  if (lane_id() == 0) scratch.keys[warp_id()] = key;
  __syncthreads();
  uint64_t best = scratch.keys[0];
  for (int w = 1; w < kWarps; ++w) best = MaxKey{}(best, scratch.keys[w]);
  return best;
}

// The key (maximum, then lowest pack) of the slice. `second` becomes this thread's candidate for the runner-up.
// A NaN may be lost here; the sums keep it.
template <class T>
IGPO_DEVICE uint64_t slice_greatest(const Pack<T>* packs, int num_packs, bool two, Scratch& scratch, float& second) {
  float best = -kInf;
  int at = 0;
  second = -kInf;
#pragma unroll 1
  for (int p = static_cast<int>(threadIdx.x); p < num_packs; p += kThreads) {
    const Pack<T> v = packs[p];
    float most = to_float(v.at[0]);
#pragma unroll
    for (int j = 1; j < Pack<T>::size; ++j) most = fmaxf(most, to_float(v.at[j]));
    if (two) {
      float running = best;
#pragma unroll
      for (int j = 0; j < Pack<T>::size; ++j) {
        const float x = to_float(v.at[j]);
        second = fmaxf(second, fminf(running, x));
        running = fmaxf(running, x);
      }
    }
    if (most > best) {
      best = most;
      at = p;
    }
  }
  const uint64_t mine = uint64_t{orderable(best)} << 32 | ~static_cast<uint32_t>(at);
  const uint64_t key = block_greatest(mine, scratch);
  if (mine != key) second = best;
  return key;
}

struct Sums {
  float sum = 0, weighted = 0;
  IGPO_DEVICE void add(float t) {  // t in units of log 2
    const float e = exp2_fast(t);
    sum += e;
    weighted += fmaxf(t, -150.0f) * e;  // 2^-150 is 0 here, and 0 * -inf must not be formed
  }
};

// Everything of slice s but the noise, into `out` (shared memory); seen by the block after the next barrier.
template <class T, Need kNeed>
IGPO_DEVICE void scan_slice(const Call& call, int s, const Pack<T>* packs, int num_packs, Scratch& scratch, Partial& out) {
  float second;
  const uint64_t key = slice_greatest(packs, num_packs, call.confidence == kMargin, scratch, second);
  const float max = from_orderable(static_cast<uint32_t>(key >> 32));
  const float base = max == -kInf ? 0.0f : max;
  Sums sums[2], sums1[2];  // two chains each
#pragma unroll 1
  for (int p = static_cast<int>(threadIdx.x); p < num_packs; p += kThreads) {
    const Pack<T> v = packs[p];
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j) {
      const float d = to_float(v.at[j]) - base;
      sums[j & 1].add(d * call.exponent);
      if (kNeed == kBoth) sums1[j & 1].add(d * kLog2e);
    }
  }
  const float mine[4] = {sums[0].sum + sums[1].sum, sums[0].weighted + sums[1].weighted, sums1[0].sum + sums1[1].sum,
                         sums1[0].weighted + sums1[1].weighted};
#pragma unroll
  for (int f = 0; f < (kNeed == kBoth ? 4 : 2); ++f) {
    const float all = warp_reduce(mine[f], Sum{});
    if (lane_id() == 0) scratch.values[f][warp_id()] = all;
  }
  second = warp_reduce(second, Max{});
  if (lane_id() == 0) scratch.values[4][warp_id()] = second;
  __syncthreads();
  double* const fields[4] = {&out.sum, &out.weighted, &out.sum1, &out.weighted1};
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    if (static_cast<int>(threadIdx.x) != f) continue;
    double all = 0;
    for (int w = 0; w < kWarps && (kNeed == kBoth || f < 2); ++w) all += scratch.values[f][w];
    *fields[f] = all;
  }
  if (threadIdx.x == 4) {
    float all = -kInf;
    for (int w = 0; w < kWarps; ++w) all = fmaxf(all, scratch.values[4][w]);
    out.second = all;
  }
  if (threadIdx.x == 5) {
    const int p = static_cast<int>(~static_cast<uint32_t>(key));
    const T* at = reinterpret_cast<const T*>(packs + p);
    int j = 0;
    while (j < Pack<T>::size - 1 && to_float(at[j]) != max) ++j;
    out.first = int64_t{s} * call.cut.length + p * Pack<T>::size + j;
    out.max = max;
    out.noisy = -kInf;
    out.value = max;
    out.drawn = out.first;
  }
}

// ---- draws -----------------------------------------------------------------------------------------------------------

// A score that no token below it can reach by rounding: of float32 here, of float64 in the exact score.
IGPO_DEVICE float loosened(double score, double top) {
  return static_cast<float>(score - 1e-6 * fabs(score) - 1e-3 - fabs(top) * 0x1p-50);
}

// "gumbel": the best of logits / temperature + noise in the slice, exactly as the reference computes it.
//
// With noise -log(-log(1-v)), a token beats the score b only if v <= 1 - exp(-exp(x/T-b)) <= exp(x/T-b): one word of v and
// one float exponential rule nearly every token out. b starts two below the logarithm of the slice's mass, which the best
// exceeds but with probability exp(-e^2) = 6e-4, and e^2 = 7 tokens on average; where none does, every token is scored.
template <class T>
__device__ void draw_noisy(const Call& call, int64_t row, int s, const Pack<T>* packs, int num_packs, Scratch& scratch,
                           Partial& out) {
  const T* flat = reinterpret_cast<const T*>(packs);
  const int64_t begin = int64_t{s} * call.cut.length;
  const uint64_t row_id = call.row_id(row);
  const uint32_t position = call.position(row);
  const double top = out.max / call.temperature;  // scores below are relative to it where they are float32
  const float max = static_cast<float>(out.max);
  if (!(out.sum > 0)) return;
  const double least = log(out.sum) - 2;
  for (int round = 0; round < 2; ++round) {
    double best = -kInf, value = 0;
    int64_t token = INT64_MAX;
    float floor = round ? -kInf : loosened(least, top);
    const int pairs = num_packs * Pack<T>::size / 2;
#pragma unroll 1
    for (int q = static_cast<int>(threadIdx.x); q < pairs; q += kThreads) {
      const Words words = philox(call.gumbel_key, position, static_cast<uint32_t>((begin >> 1) + q), row_id);
#pragma unroll 1
      for (int j = 0; j < 2; ++j) {
        const float x = to_float(flat[2 * q + j]);
        const float excess = (x - max) * call.inv_t * 0.999999f - floor;
        const float v = static_cast<float>(~(j ? words.w[2] : words.w[0]) >> 1) * 0x1p-31f;
        if (!(v <= exp_fast(excess > 0 ? 0.0f : excess))) continue;
        const double exact = __dadd_rn(__ddiv_rn(static_cast<double>(x), call.temperature), gumbel(words, j));
        if (!(exact > best)) continue;
        best = exact;
        value = x;
        token = begin + 2 * q + j;
        floor = fmaxf(floor, loosened(best - top, top));
      }
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
      const double other = __shfl_xor_sync(kAllLanes, best, offset);
      const double other_value = __shfl_xor_sync(kAllLanes, value, offset);
      const int64_t other_token = __shfl_xor_sync(kAllLanes, token, offset);
      if (other > best || (other == best && other_token < token)) {
        best = other;
        value = other_value;
        token = other_token;
      }
    }
    if (lane_id() == 0) {
      scratch.noisy[warp_id()] = best;
      scratch.value[warp_id()] = value;
      scratch.drawn[warp_id()] = token;
    }
    __syncthreads();
    int w = 0;
    for (int other = 1; other < kWarps; ++other)
      if (scratch.noisy[other] > scratch.noisy[w] ||
          (scratch.noisy[other] == scratch.noisy[w] && scratch.drawn[other] < scratch.drawn[w]))
        w = other;
    const bool found = round || scratch.noisy[w] - top >= least;
    if (found && threadIdx.x == 0 && scratch.noisy[w] > -kInf) {
      out.noisy = scratch.noisy[w];
      out.value = scratch.value[w];
      out.drawn = scratch.drawn[w];
    }
    __syncthreads();
    if (found) return;
  }
}

// Inverse CDF inside a slice: by group of 32 packs, pack, token, each level dividing its own sum, so that a token's
// probability is right to float32 relative accuracy however small it is. (token, its logit), in thread 0.
template <class T>
__device__ int64_t draw_in_slice(const Call& call, int s, float max, double u, const Pack<T>* packs, int num_packs,
                                 Scratch& scratch, float& value) {
  constexpr int kSize = Pack<T>::size;
  const auto mass = [&](T x) { return exp2_fast((to_float(x) - max) * call.exponent); };
  const int groups = (num_packs + 31) / 32;
#pragma unroll 1
  for (int g = warp_id(); g < groups; g += kWarps) {
    const int p = g * 32 + lane_id();
    float all = 0;
    if (p < num_packs)
#pragma unroll
      for (int j = 0; j < kSize; ++j) all += mass(packs[p].at[j]);
    all = warp_reduce(all, Sum{});
    if (lane_id() == 0) scratch.group_mass[g] = all;
  }
  __syncthreads();
  if (warp_id() > 0) return 0;
  const int run = (groups + 31) / 32;  // groups of a lane
  const auto of_group = [&](int i) {
    const int g = lane_id() * run + i;
    return g < groups ? static_cast<double>(scratch.group_mass[g]) : 0.0;
  };
  double mine = 0;
  for (int i = 0; i < run; ++i) mine += of_group(i);
  double inside = u;
  int lane = pick_lane(mine, inside);
  int g = lane_id() * run + pick(run, mine, of_group, inside);  // right in the lane that was picked
  g = __shfl_sync(kAllLanes, g, lane);
  inside = __shfl_sync(kAllLanes, inside, lane);
  const int p = g * 32 + lane_id();
  const T* pack = reinterpret_cast<const T*>(packs + p);
  const auto of_token = [&](int j) { return p < num_packs ? static_cast<double>(mass(pack[j])) : 0.0; };
  mine = 0;
  for (int j = 0; j < kSize; ++j) mine += of_token(j);
  lane = pick_lane(mine, inside);
  const int j = pick(kSize, mine, of_token, inside);
  const int at = __shfl_sync(kAllLanes, p * kSize + j, lane);
  value = to_float(reinterpret_cast<const T*>(packs)[at]);
  return int64_t{s} * call.cut.length + at;
}

}  // namespace
}  // namespace igpo::cuda
