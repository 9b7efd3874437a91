// Hints on a canvas (igpo/ops/merge_hints.py): 17 bytes read and 9 written per position.
#include "common.cuh"
#include "cuda_ops.h"

namespace igpo::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    merge_hints_kernel(const int64_t* __restrict__ tokens, const int64_t* __restrict__ hints,
                       const bool* __restrict__ hint_mask, int64_t* __restrict__ out, bool* __restrict__ generate,
                       int64_t count, int64_t mask_id) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t token = hint_mask[i] ? hints[i] : tokens[i];
  out[i] = token;
  generate[i] = token == mask_id;
}

}  // namespace

// out[i] = hint_mask[i] ? hints[i] : tokens[i]; generate[i] = out[i] == mask_id. All contiguous.
void merge_hints(const int64_t* tokens, const int64_t* hints, const bool* hint_mask, int64_t* out, bool* generate,
                 int64_t count, int64_t mask_id, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const Shape shape{dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), kThreads};
  launch("merge_hints", shape, stream, merge_hints_kernel, tokens, hints, hint_mask, out, generate, count, mask_id);
}

}  // namespace igpo::cuda
