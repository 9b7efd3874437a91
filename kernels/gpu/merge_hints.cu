// Hints on a canvas (igpo/ops/merge_hints.py): 17 bytes read and 9 written per position.
#include "cuda_ops.h"
#include "pairs.cuh"

namespace igpo::cuda {
namespace {

// tokens and hints are both read everywhere: to skip one by position would not save a sector, and would make two accesses of one
__global__ void __launch_bounds__(kPairThreads)
    merge_hints_kernel(const int64_t* __restrict__ tokens, const int64_t* __restrict__ hints,
                       const bool* __restrict__ hint_mask, int64_t* __restrict__ out, bool* __restrict__ generate,
                       int64_t count, int64_t mask_id, bool wide) {
  const int64_t i = 2 * (int64_t{blockIdx.x} * kPairThreads + threadIdx.x);
  if (i >= count) return;
  const bool both = i + 1 < count;
  Pair<int64_t> token = load_pair(tokens + i, both, wide);
  const Pair<int64_t> hint = load_pair(hints + i, both, wide);
  const Pair<bool> hinted = load_pair(hint_mask + i, both, wide);
  Pair<bool> masked;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (hinted.at[j]) token.at[j] = hint.at[j];
    masked.at[j] = token.at[j] == mask_id;
  }
  store_pair(out + i, token, both, wide);
  store_pair(generate + i, masked, both, wide);
}

}  // namespace

// out[i] = hint_mask[i] ? hints[i] : tokens[i]; generate[i] = out[i] == mask_id. All contiguous.
void merge_hints(const int64_t* tokens, const int64_t* hints, const bool* hint_mask, int64_t* out, bool* generate,
                 int64_t count, int64_t mask_id, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  launch("merge_hints", pair_shape(count), stream, merge_hints_kernel, tokens, hints, hint_mask, out, generate, count,
         mask_id, pairs_are_aligned(tokens, hints, hint_mask, out, generate));
}

}  // namespace igpo::cuda
