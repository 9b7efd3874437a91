// IGPO's entropy filter (igpo/ops/keep_top_entropy.py): one block per row; 5 bytes read and 1 written per position.
#include "cuda_ops.h"
#include "select.cuh"

namespace igpo::cuda {
namespace {

// Entropies in descending order as ascending integers; NaN and -inf last, -0 equal to 0.
IGPO_DEVICE Key descending(float entropy) {
  if (!(entropy == entropy)) entropy = -kInf;
  const uint32_t bits = __float_as_uint(entropy + 0.0f);
  return ~(bits >> 31 ? ~bits : bits | 0x80000000u);
}

__global__ void __launch_bounds__(kMostThreads, 2)
    keep_top_entropy_kernel(const float* __restrict__ entropy, const bool* __restrict__ candidates, bool* __restrict__ out,
                            int64_t length, double fraction, int64_t cached) {
  const int64_t row = int64_t{blockIdx.x} * length;
  select_smallest([=](int64_t i) { return candidates[row + i] ? descending(entropy[row + i]) : kNoKey; }, length, cached,
                  [=](int64_t n) {
                    const auto count = static_cast<int64_t>(static_cast<double>(n) * fraction);
                    return count < 1 && n > 0 ? int64_t{1} : count;
                  },
                  [=](int64_t i, bool chosen) { out[row + i] = chosen; });
}

}  // namespace

// entropy, candidates, out: (rows, length), contiguous.
void keep_top_entropy(const float* entropy, const bool* candidates, bool* out, int64_t rows, int64_t length,
                      double fraction, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const SelectShape shape(length);
  launch("keep_top_entropy", {dim3(static_cast<unsigned>(length ? rows : 0)), shape.threads, shape.bytes()}, stream,
         keep_top_entropy_kernel, entropy, candidates, out, length, fraction, shape.cached);
}

}  // namespace igpo::cuda
