// The noising of masked diffusion (igpo/ops/forward_mask.py): 9 bytes read and 9 written per position, one Philox counter.
#include "cuda_ops.h"
#include "pairs.cuh"
#include "select.cuh"

namespace igpo::cuda {
namespace {

// Independent positions; a pair may run over the end of a row.
__global__ void __launch_bounds__(kPairThreads)
    forward_mask_kernel(const int64_t* __restrict__ tokens, const bool* __restrict__ maskable, const double* __restrict__ t,
                        const int64_t* __restrict__ row_ids, int64_t* __restrict__ noisy, bool* __restrict__ masked,
                        int64_t count, int64_t length, int64_t mask_id, uint64_t key, bool wide) {
  const int64_t first = 2 * (int64_t{blockIdx.x} * kPairThreads + threadIdx.x);
  if (first >= count) return;
  const bool both = first + 1 < count;
  Pair<int64_t> token = load_pair(tokens + first, both, wide);
  Pair<bool> is_masked = load_pair(maskable + first, both, wide);
  // a division of 64 bits takes a hundred instructions
  int64_t row = count <= 0xffffffff ? static_cast<uint32_t>(first) / static_cast<uint32_t>(length) : first / length;
  int64_t position = first - row * length;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (is_masked.at[i]) {
      const Words words = philox(key, static_cast<uint32_t>(position), 0, static_cast<uint64_t>(row_ids[row]));
      is_masked.at[i] = uniform53(words.w[0], words.w[1]) < t[row];
    }
    if (is_masked.at[i]) token.at[i] = mask_id;
    if (++position == length) {
      position = 0;
      ++row;
    }
  }
  store_pair(noisy + first, token, both, wide);
  store_pair(masked + first, is_masked, both, wide);
}

// Exact counts: one block per row.
__global__ void __launch_bounds__(kMostThreads, 2)
    forward_mask_exact_kernel(const int64_t* __restrict__ tokens, const bool* __restrict__ maskable,
                              const double* __restrict__ t, const int64_t* __restrict__ row_ids,
                              int64_t* __restrict__ noisy, bool* __restrict__ masked, int64_t length, int64_t mask_id,
                              uint64_t key, int64_t cached) {
  const int64_t row = int64_t{blockIdx.x} * length;
  const auto id = static_cast<uint64_t>(row_ids[blockIdx.x]);
  const double ratio = t[blockIdx.x];
  select_smallest(
      [=](int64_t i) {
        if (!maskable[row + i]) return kNoKey;
        const Words words = philox(key, static_cast<uint32_t>(i), 0, id);
        return Key{words.w[0]} << 31 | words.w[1] >> 1;
      },
      length, cached, [=](int64_t n) { return static_cast<int64_t>(rint(static_cast<double>(n) * ratio)); },  // half to even
      [=](int64_t i, bool chosen) {
        masked[row + i] = chosen;
        noisy[row + i] = chosen ? mask_id : tokens[row + i];
      });
}

}  // namespace

// tokens, maskable, noisy, masked: (rows, length), contiguous; t, row_ids: (rows,).
void forward_mask(const int64_t* tokens, const bool* maskable, const double* t, const int64_t* row_ids, int64_t* noisy,
                  bool* masked, int64_t rows, int64_t length, int64_t mask_id, uint64_t key, bool exact, int device,
                  uintptr_t stream) {
  const DeviceGuard guard(device);
  if (exact) {
    const SelectShape shape(length);
    launch("forward_mask_exact", {dim3(static_cast<unsigned>(length ? rows : 0)), shape.threads, shape.bytes()}, stream,
           forward_mask_exact_kernel, tokens, maskable, t, row_ids, noisy, masked, length, mask_id, key, shape.cached);
    return;
  }
  const int64_t count = rows * length;
  launch("forward_mask", pair_shape(count), stream, forward_mask_kernel, tokens, maskable, t, row_ids, noisy, masked, count,
         length, mask_id, key, pairs_are_aligned(tokens, maskable, noisy, masked));
}

}  // namespace igpo::cuda
