// Log-probability of one token per row, and entropy (igpo/ops/token_logprob.py): every row that counts is read once; the
// backward pass reads it again and writes its gradient.
#include "cuda_ops.h"
#include "row_kernels.cuh"

namespace igpo::cuda {
namespace {

constexpr float kLn2 = 0.693147180559945309417f;

struct Forward {
  static constexpr bool kDot = true;
  float scale, scale2;
  float *logprob, *entropy, *row_max, *row_log_sum;

  IGPO_DEVICE void finish(int64_t row, const Stats& s, float chosen) const {
    const float log_sum = log_sum_of(s);
    const float h = __fmaf_rn(__fdiv_rn(s.dot, s.sum), -kLn2, log_sum);
    row_max[row] = s.max;
    row_log_sum[row] = log_sum;
    entropy[row] = h < 0.0f ? 0.0f : h;
    logprob[row] = __fsub_rn(__fmul_rn(__fsub_rn(chosen, s.max), scale), log_sum);
  }
  IGPO_DEVICE void skip(int64_t row) const { logprob[row] = entropy[row] = row_max[row] = row_log_sum[row] = 0.0f; }
};

// With g, h the gradients of log p_y and H:  dx_v = scale * (g * (v == y) - p_v * (g + h * (log p_v + H)))
struct Backward {
  static constexpr bool kDot = true;
  float scale, scale2;
  const float *grad_logprob, *grad_entropy, *entropy, *row_max, *row_log_sum;

  IGPO_DEVICE float max(int64_t row) const { return row_max[row]; }
  IGPO_DEVICE float log_sum(int64_t row) const { return row_log_sum[row]; }
  IGPO_DEVICE RowGradient gradient(int64_t row, int64_t target, int64_t vocab, float log_sum) const {
    const float per_exp = -scale * expf(-log_sum);
    const bool token = target >= 0 && target < vocab;
    const float g = token ? grad_logprob[row] : __uint_as_float(0x7fc00000u), h = grad_entropy[row];
    return {per_exp * __fmaf_rn(h, entropy[row] - log_sum, g), per_exp * h * kLn2, scale * g};
  }
};

}  // namespace

void token_logprob(const void* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride, const int64_t* targets,
                   float* logprob, float* entropy, float* row_max, float* log_sum, float* parts, int64_t rows,
                   int64_t vocab, int64_t ignore_index, float scale, int dtype, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const RowSet set{targets, nullptr, rows, vocab, ignore_index, {inner, outer_stride, inner_stride}};
  const Forward op{scale, scale * kLog2e, logprob, entropy, row_max, log_sum};
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    launch_rows<false>("token_logprob", static_cast<const T*>(logits), set, op, reinterpret_cast<Stats*>(parts),
                       static_cast<T*>(nullptr), set.at, device, stream);
  });
}

void token_logprob_backward(const float* grad_logprob, const float* grad_entropy, const void* logits, int64_t inner,
                            int64_t outer_stride, int64_t inner_stride, const int64_t* targets, const float* entropy,
                            const float* row_max, const float* log_sum, void* out, int64_t out_inner,
                            int64_t out_outer_stride, int64_t out_inner_stride, int64_t rows, int64_t vocab,
                            int64_t ignore_index, float scale, int dtype, int out_dtype, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const RowSet set{targets, nullptr, rows, vocab, ignore_index, {inner, outer_stride, inner_stride}};
  const Backward op{scale, scale * kLog2e, grad_logprob, grad_entropy, entropy, row_max, log_sum};
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    with_out_dtype<T>(dtype, out_dtype, [&](auto out_tag) {
      launch_gradient("token_logprob_backward", static_cast<const T*>(logits), set, op,
                      static_cast<decltype(out_tag)*>(out), {out_inner, out_outer_stride, out_inner_stride}, stream);
    });
  });
}

}  // namespace igpo::cuda
