// The kernels of the ops on softmax statistics: rows of logits -> results, and their gradients.
#pragma once

#include <stdexcept>
#include <string>

#include "row_stats.cuh"

namespace igpo::cuda {

// ---- gradient --------------------------------------------------------------------------------------------------------

// Of one row: out_v = 2^u_v * (linear * u_v + constant), plus `at_target` in the target's place.
struct RowGradient {
  float constant, linear, at_target;
};

template <bool kLinear>
IGPO_DEVICE float gradient_of(float x, float shift, float scale2, const RowGradient& g) {
  const float u = exponent(x, shift, scale2);
  return __fmul_rn(exp2_fast(u), kLinear ? __fmaf_rn(fmaxf(u, kLowest), g.linear, g.constant) : g.constant);
}

// Pack i of `out`, count elements long, from `value(j)` of its elements; as wide a store as its type and address allow.
template <class T, class TO, class Value>
IGPO_DEVICE void write(TO* out, int count, bool aligned, int i, Value&& value) {
  constexpr int kSize = Pack<T>::size;
  constexpr int kBytes = kSize * static_cast<int>(sizeof(TO));
  static_assert(kBytes == 16 || kBytes == 8);
  struct alignas(kBytes) {
    TO at[kSize];
  } result;
#pragma unroll
  for (int j = 0; j < kSize; ++j) result.at[j] = from_float<TO>(value(j));
  TO* to = out + i * kSize;
  if (aligned && (i + 1) * kSize <= count) {
    if constexpr (kBytes == 16) {
      uint4 raw;
      __builtin_memcpy(&raw, &result, 16);
      __stcs(reinterpret_cast<uint4*>(to), raw);
    } else {
      unsigned long long raw;
      __builtin_memcpy(&raw, &result, 8);
      __stcs(reinterpret_cast<unsigned long long*>(to), raw);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (i * kSize + j < count) to[j] = result.at[j];
}

// The gradient of pack i of a part. target: in elements from the part's beginning; elsewhere it is not in it.
template <bool kLinear, class T, class TO>
IGPO_DEVICE void write_gradient(const Pack<T>& p, TO* out, int count, bool aligned, int i, int64_t target, float shift,
                                float scale2, const RowGradient& g) {
  const int64_t here = target - int64_t{i} * Pack<T>::size;
  write<T>(out, count, aligned, i, [&](int j) {
    const float d = gradient_of<kLinear>(to_float(p.at[j]), shift, scale2, g);
    return j == here ? __fadd_rn(d, g.at_target) : d;
  });
}

// ---- kernels ---------------------------------------------------------------------------------------------------------
//
// Op: what is done with the statistics.
//   kDot: whether dot is wanted.   scale2: scale * log2(e).
//   finish(row, stats, chosen): writes the results of a row; chosen: the target's logit, NaN where the target is no token.
//   skip(row): those of a row that does not count.
//   gradient(row, log_sum) -> RowGradient; max(row), log_sum(row): what `finish` wrote.

struct Shared {
  GroupScratch scratch;
  Stats parts[kSlices];
};
constexpr size_t kSharedHead = (sizeof(Shared) + 15) / 16 * 16;

template <class T>
IGPO_DEVICE float chosen_logit(const T* x, const RowSet& set, int64_t target) {
  const bool token = target >= 0 && target < set.vocab;
  return token ? to_float(x[target]) : __uint_as_float(0x7fc00000u);
}

IGPO_DEVICE int length_of(const Cut& cut, int64_t vocab, int slice) {
  const int64_t left = vocab - int64_t{slice} * cut.length;
  return static_cast<int>(left < 0 ? 0 : left < cut.length ? left : cut.length);
}

// Whole rows: a warp, a block or a cluster of cut.slices blocks each. kGradient: the gradient is written as well; `out`
// may be the logits.
template <class T, class TO, class Op, int kGroup, bool kGradient>
__global__ void __launch_bounds__(kThreads)
    row_kernel(const T* logits, RowSet set, Op op, Cut cut, bool staged, TO* out, Rows out_at) {
  const int64_t unit = int64_t{blockIdx.x} * (kThreads / kGroup) + threadIdx.x / kGroup;
  const int64_t row = cut.slices == 1 ? unit : unit / kSlices;
  const int slice = cut.slices == 1 ? 0 : static_cast<int>(unit % kSlices);
  if (row >= set.rows) return;  // a warp: blocks and clusters come out even
  const int64_t first = int64_t{slice} * cut.length;
  const int count = length_of(cut, set.vocab, slice);
  TO* to = kGradient ? out + out_at.offset(row) + first : nullptr;
  const bool to_aligned = is_aligned16(to);
  const bool leads = slice == 0 && threadIdx.x % kGroup == 0;
  if (!set.counts(row)) {
    if (leads) op.skip(row);
    if (kGradient)
      for (int i = static_cast<int>(threadIdx.x) % kGroup; i * Pack<T>::size < count; i += kGroup)
        write<T>(to, count, to_aligned, i, [](int) { return 0.0f; });
    return;
  }
  const T* x = logits + set.at.offset(row);
  auto* shared = reinterpret_cast<Shared*>(shared_memory());
  const Part<T, kGroup> part(x + first, count,
                             staged ? reinterpret_cast<Pack<T>*>(shared_memory() + kSharedHead) : nullptr);
  part.ask();
  const int64_t target = set.targets[row];
  float chosen = leads ? chosen_logit(x, set, target) : 0.0f;
  __syncwarp();                        // it may be overwritten by the gradient; and the barrier wants whole warps
  if (cut.slices > 1) cluster_sync();  // every block has begun: its shared memory may be written
  Stats stats = part_stats<Op::kDot>(part, op.scale2, &shared->scratch);
  if (cut.slices > 1) {
    if (threadIdx.x < kSlices) *in_cluster_block(shared->parts + slice, static_cast<int>(threadIdx.x)) = stats;
    __syncwarp();
    cluster_sync();
    stats = combined(shared->parts, kSlices, op.scale2);
  }
  if (leads) op.finish(row, stats, chosen);
  if constexpr (kGradient) {
    const RowGradient g = op.gradient(row, target, set.vocab, log_sum_of(stats));
    const float shift = shift_of(stats.max);
    for (int i = part.thread(); i < part.packs(); i += kGroup)
      write_gradient<Op::kDot>(part.get(i), to, count, to_aligned, i, target - first, shift, op.scale2, g);
  }
}

// Without clusters: the parts' statistics go to memory, `finish_kernel` combines them.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    part_kernel(const T* logits, RowSet set, Op op, Cut cut, bool staged, Stats* parts) {
  const int64_t row = blockIdx.x / kSlices;
  const int slice = static_cast<int>(blockIdx.x % kSlices);
  if (!set.counts(row)) return;
  auto* shared = reinterpret_cast<Shared*>(shared_memory());
  const Part<T, kThreads> part(logits + set.at.offset(row) + int64_t{slice} * cut.length,
                               length_of(cut, set.vocab, slice),
                               staged ? reinterpret_cast<Pack<T>*>(shared_memory() + kSharedHead) : nullptr);
  part.ask();
  const Stats stats = part_stats<Op::kDot>(part, op.scale2, &shared->scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = stats;
}

template <class T, class Op>
__global__ void __launch_bounds__(kThreads) finish_kernel(const T* logits, RowSet set, Op op, const Stats* parts) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= set.rows) return;
  if (!set.counts(row)) return op.skip(row);
  const float chosen = chosen_logit(logits + set.at.offset(row), set, set.targets[row]);
  op.finish(row, combined(parts + row * kSlices, kSlices, op.scale2), chosen);
}

// The gradient from statistics in memory: a block or (short rows) a warp for each chunk of kPacks packs a thread, which are
// all asked for before the first is used. kWhole: no pack is cut short or narrow.
constexpr int kPacks = 4;

template <bool kWhole, class T, class TO, class Op, int kGroup>
IGPO_DEVICE void write_chunk(const Part<T, kGroup>& part, const Op& op, const RowSet& set, int64_t row, int64_t first,
                             TO* to, bool to_aligned) {
  Pack<T> p[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = k * kGroup + part.thread();
    if (kWhole) p[k] = load_streaming(reinterpret_cast<const Pack<T>*>(part.x) + i);
    else if (i < part.packs()) p[k] = part.read(i);
  }
  const int64_t target = set.targets[row];
  const RowGradient g = op.gradient(row, target, set.vocab, op.log_sum(row));
  const float shift = shift_of(op.max(row));
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = k * kGroup + part.thread();
    if (kWhole || i < part.packs())
      write_gradient<Op::kDot>(p[k], to, kWhole ? kGroup * kPacks * Pack<T>::size : part.count, kWhole || to_aligned, i,
                               target - first, shift, op.scale2, g);
  }
}

template <class T, class TO, class Op, int kGroup>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const T* logits, RowSet set, Op op, int chunks, TO* out, Rows out_at) {
  constexpr int kChunk = kGroup * kPacks * Pack<T>::size;
  const int64_t unit = int64_t{blockIdx.x} * (kThreads / kGroup) + threadIdx.x / kGroup;
  const int64_t row = unit / chunks;
  if (row >= set.rows) return;
  const int64_t first = unit % chunks * kChunk;
  const int64_t left = set.vocab - first;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  TO* to = out + out_at.offset(row) + first;
  const bool to_aligned = is_aligned16(to);
  const Part<T, kGroup> part(logits + set.at.offset(row) + first, count, nullptr);
  if (!set.counts(row)) {
    for (int i = part.thread(); i < part.packs(); i += kGroup) write<T>(to, count, to_aligned, i, [](int) { return 0.0f; });
    return;
  }
  if (part.aligned && to_aligned && count == kChunk) write_chunk<true>(part, op, set, row, first, to, to_aligned);
  else write_chunk<false>(part, op, set, row, first, to, to_aligned);
}

// ---- launches --------------------------------------------------------------------------------------------------------

inline unsigned blocks(const char* name, int64_t units, int64_t per_block) {
  const int64_t count = (units + per_block - 1) / per_block;
  if (count > 0x7fffffff) throw std::runtime_error(std::string(name) + ": more rows than a grid has blocks");
  return static_cast<unsigned>(count);
}

// body(TO{}) with the type of `out`: that of the logits, or any from float32.
template <class T, class Body>
void with_out_dtype(int dtype, int out_dtype, Body&& body) {
  if (dtype == out_dtype) return body(T{});
  if constexpr (sizeof(T) == 4) {
    if (out_dtype == 1) return body(Bf16{});
    return body(Fp16{});
  }
  throw std::runtime_error("a gradient has the type of its logits, or theirs is float32");
}

template <class T, class TO, class Op>
void launch_gradient(const char* name, const T* logits, const RowSet& set, const Op& op, TO* out, const Rows& out_at,
                     uintptr_t stream) {
  const bool warps = set.vocab <= kWarpRow / 2;
  const int group = warps ? 32 : kThreads;
  const int64_t chunk = int64_t{group} * kPacks * Pack<T>::size;
  const int chunks = static_cast<int>((set.vocab + chunk - 1) / chunk);
  const Shape shape{dim3(blocks(name, set.rows * chunks, kThreads / group)), kThreads};
  const auto kernel = warps ? gradient_kernel<T, TO, Op, 32> : gradient_kernel<T, TO, Op, kThreads>;
  launch(name, shape, stream, kernel, logits, set, op, chunks, out, out_at);
}

// parts: rows x kSlices, where rows are cut. Without kGradient out and out_at are not used.
template <bool kGradient, class T, class TO, class Op>
void launch_rows(const char* name, const T* logits, const RowSet& set, const Op& op, Stats* parts, TO* out,
                 const Rows& out_at, int device, uintptr_t stream) {
  const Cut c = cut(set.vocab);
  if (c.group == 32) {
    const Shape shape{dim3(blocks(name, set.rows, kThreads / 32)), kThreads};
    return launch(name, shape, stream, row_kernel<T, TO, Op, 32, kGradient>, logits, set, op, c, false, out, out_at);
  }
  const bool clusters = capability(device) >= 90;
  const size_t bytes = (static_cast<size_t>(c.length) * sizeof(T) + 15) / 16 * 16;
  const bool staged = bytes <= static_cast<size_t>(clusters ? 200 : 96) << 10;  // what every such device lets a block have
  const size_t shared = kSharedHead + (staged ? bytes : 0);
  const Shape shape{dim3(blocks(name, set.rows * c.slices, 1)), kThreads, shared, c.slices};
  if (c.slices == 1 || clusters)
    return launch(name, shape, stream, row_kernel<T, TO, Op, kThreads, kGradient>, logits, set, op, c, staged, out,
                  out_at);
  launch(name, Shape{shape.grid, kThreads, shared}, stream, part_kernel<T, Op>, logits, set, op, c, staged, parts);
  const Shape finish{dim3(blocks(name, set.rows, kThreads)), kThreads};
  launch(name, finish, stream, finish_kernel<T, Op>, logits, set, op, parts);
  if constexpr (kGradient) launch_gradient(name, logits, set, op, out, out_at, stream);
}

}  // namespace igpo::cuda
