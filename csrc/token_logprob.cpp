#include "ops.h"
#include "row_stats.h"

namespace igpo::IGPO_ISA {

void token_logprob(const void* logits, const int64_t* offsets, const int64_t* targets, float* logprob, float* entropy,
                   float* row_max, float* log_sum, int64_t rows, int64_t vocab, int64_t ignore_index, float scale,
                   int dtype, int threads) {
  const RowSet set{offsets, targets, nullptr, rows, vocab, ignore_index};
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* x = static_cast<const T*>(logits);
    for_each_row<true>(
        x, set, scale, threads,
        [&](int64_t row, const Stats& stats) {
          row_max[row] = stats.max;
          log_sum[row] = IGPO_ISA::log_sum(stats);
          entropy[row] = IGPO_ISA::entropy(stats);
          logprob[row] = (to_float(x[offsets[row] + targets[row]]) - stats.max) * scale - log_sum[row];
        },
        [&](int64_t row) { logprob[row] = entropy[row] = row_max[row] = log_sum[row] = 0; });
  });
}

// With g, h the gradients of log p_y and H:  dx_v = scale * (g * (v == y) - p_v * (g + h * (log p_v + H)))
void token_logprob_backward(const float* grad_logprob, const float* grad_entropy, const void* logits,
                            const int64_t* offsets, const int64_t* targets, const float* entropy, const float* row_max,
                            const float* log_sum, void* out, int64_t rows, int64_t vocab, int64_t ignore_index,
                            float scale, int dtype, int threads) {
  const RowSet set{offsets, targets, nullptr, rows, vocab, ignore_index};
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_gradient<true>(static_cast<const T*>(logits), static_cast<T*>(out), set, row_max, scale, threads,
                            [&](int64_t row) {
                              const float per_exp = -scale * __builtin_expf(-log_sum[row]);
                              const float g = grad_logprob[row], h = grad_entropy[row];
                              return RowGradient{per_exp * (g + h * (entropy[row] - log_sum[row])), per_exp * h, scale * g};
                            });
  });
}

}  // namespace igpo::IGPO_ISA
