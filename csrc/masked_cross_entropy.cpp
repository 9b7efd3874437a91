#include "ops.h"
#include "row_stats.h"

namespace igpo::IGPO_ISA {

// row_loss[r] = -weights[r] * log p_y (0 where the row does not count); loss, if not null: their sum in row order over
// `divisor`.
void masked_cross_entropy(const void* logits, const int64_t* offsets, const int64_t* targets, const float* weights,
                          float* row_loss, float* loss, float* row_max, float* log_sum, int64_t rows, int64_t vocab,
                          int64_t ignore_index, double divisor, int dtype, int threads) {
  const RowSet set{offsets, targets, weights, rows, vocab, ignore_index};
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* x = static_cast<const T*>(logits);
    for_each_row<false>(
        x, set, 1.0f, threads,
        [&](int64_t row, const Stats& stats) {
          row_max[row] = stats.max;
          log_sum[row] = IGPO_ISA::log_sum(stats);
          const float logprob = to_float(x[offsets[row] + targets[row]]) - stats.max - log_sum[row];
          row_loss[row] = weights ? -weights[row] * logprob : -logprob;
        },
        [&](int64_t row) { row_loss[row] = row_max[row] = log_sum[row] = 0; });
  });
  if (!loss) return;
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) total += row_loss[row];
  *loss = static_cast<float>(total / divisor);
}

// dx_v = c * (p_v - (v == y)),  c = grad_loss * weight / divisor.  grad_stride: 0 when all rows share one grad_loss.
void masked_cross_entropy_backward(const float* grad_loss, int64_t grad_stride, const void* logits,
                                   const int64_t* offsets, const int64_t* targets, const float* weights,
                                   const float* row_max, const float* log_sum, void* out, int64_t rows, int64_t vocab,
                                   int64_t ignore_index, double divisor, int dtype, int threads) {
  const RowSet set{offsets, targets, weights, rows, vocab, ignore_index};
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_gradient<false>(static_cast<const T*>(logits), static_cast<T*>(out), set, row_max, 1.0f, threads,
                             [&](int64_t row) {
                               const double weight = weights ? weights[row] : 1.0f;
                               const float c = static_cast<float>(grad_loss[row * grad_stride] * weight / divisor);
                               return RowGradient{c * __builtin_expf(-log_sum[row]), 0.0f, -c};
                             });
  });
}

}  // namespace igpo::IGPO_ISA
