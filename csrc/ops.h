// Every native entry point, once.
//
// A kernel is declared with IGPO_KERNEL(name, arguments) and defined in csrc/<op>.cpp inside namespace igpo::IGPO_ISA,
// which is compiled per instruction set. Pointers are raw addresses of tensors the Python side has checked; sizes and
// strides are in elements; `dtype` is 0 float32, 1 bfloat16, 2 float16; `threads` is an upper bound.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define IGPO_KERNEL(name, ...)                  \
  namespace portable { void name(__VA_ARGS__); } \
  namespace avx2 { void name(__VA_ARGS__); }     \
  namespace avx512 { void name(__VA_ARGS__); }
#else
#define IGPO_KERNEL(name, ...) \
  namespace portable { void name(__VA_ARGS__); }
#endif

namespace igpo {

enum class Isa { portable, avx2, avx512 };
Isa isa();                          // the best this processor runs, or the one IGPO_ISA names
void set_isa(const char* name);     // for tests; throws std::invalid_argument when the processor lacks it
const char* isa_name();

// merge_hints: out[i] = hint_mask[i] ? hints[i] : tokens[i]; generate[i] = out[i] == mask_id
IGPO_KERNEL(merge_hints, const int64_t* tokens, const int64_t* hints, const bool* hint_mask, int64_t* out, bool* generate,
            int64_t count, int64_t mask_id, int threads)

// unmask_step: strides of logits in elements; eligible, num_unmask_rows, suppress and row_ids may be null; confidence is
// 0 prob, 1 margin, 2 entropy, 3 random; temperature 0 is argmax; out may be tokens. Keys: igpo/ops/_philox.py.
IGPO_KERNEL(unmask_step, const void* logits, int64_t stride_b, int64_t stride_l, int dtype, const int64_t* tokens,
            const bool* eligible, int64_t num_unmask, const int64_t* num_unmask_rows, const int64_t* suppress,
            int64_t num_suppress, const int64_t* row_ids, int64_t* out, bool* committed, float* score, float* logprob,
            float* entropy, int64_t batch, int64_t length, int64_t vocab, int64_t mask_id, double temperature,
            int confidence, bool has_threshold, float threshold, bool gumbel, uint64_t token_key, uint64_t score_key,
            uint64_t gumbel_key, int threads)

// The row ops (row_stats.h). offsets[r] is the place of row r's first logit; a target of ignore_index skips the row;
// row_max and log_sum are max_v x_v and ln Σ_v e^((x_v - row_max) * scale), which the backward pass wants again.
// Gradients are written to contiguous rows, which may be those of the logits.

// token_logprob: log p_y and the entropy of softmax(x * scale)
IGPO_KERNEL(token_logprob, const void* logits, const int64_t* offsets, const int64_t* targets, float* logprob,
            float* entropy, float* row_max, float* log_sum, int64_t rows, int64_t vocab, int64_t ignore_index,
            float scale, int dtype, int threads)
IGPO_KERNEL(token_logprob_backward, const float* grad_logprob, const float* grad_entropy, const void* logits,
            const int64_t* offsets, const int64_t* targets, const float* entropy, const float* row_max,
            const float* log_sum, void* out, int64_t rows, int64_t vocab, int64_t ignore_index, float scale, int dtype,
            int threads)

// masked_cross_entropy: -weight * log p_y per row, and the sum over rows / divisor (loss may be null, weights too)
IGPO_KERNEL(masked_cross_entropy, const void* logits, const int64_t* offsets, const int64_t* targets,
            const float* weights, float* row_loss, float* loss, float* row_max, float* log_sum, int64_t rows,
            int64_t vocab, int64_t ignore_index, double divisor, int dtype, int threads)
IGPO_KERNEL(masked_cross_entropy_backward, const float* grad_loss, int64_t grad_stride, const void* logits,
            const int64_t* offsets, const int64_t* targets, const float* weights, const float* row_max,
            const float* log_sum, void* out, int64_t rows, int64_t vocab, int64_t ignore_index, double divisor,
            int dtype, int threads)

// sample_hint_mask: row r shows floor(ratio[r] * chunks) chunks of its trace; out (rows, length)
IGPO_KERNEL(sample_hint_mask, const int64_t* trace_lengths, const double* ratio, const int64_t* row_ids, bool* out,
            int64_t rows, int64_t length, int64_t low, int64_t high, uint64_t key, int threads)

// keep_top_entropy: per row, the max(1, floor(fraction * n)) of its n candidates with the highest entropy
IGPO_KERNEL(keep_top_entropy, const float* entropy, const bool* candidates, bool* out, int64_t rows, int64_t length,
            double fraction, int threads)

// forward_mask: noisy tokens and where they were masked; with `exact`, round(t * n) of a row's n maskable ones
IGPO_KERNEL(forward_mask, const int64_t* tokens, const bool* maskable, const double* t, const int64_t* row_ids,
            int64_t* noisy, bool* masked, int64_t rows, int64_t length, int64_t mask_id, uint64_t key, bool exact,
            int threads)

// policy_loss: the gradient by logprob, and out = {loss, clip_fraction, kl, ratio_mean}; kl: 0, 1, 2 for k1, k2, k3
IGPO_KERNEL(policy_loss, const float* logprob, const float* old_logprob, const float* advantages, const bool* token_mask,
            const float* weights, const float* ref_logprob, float* grad, float* out, int64_t rows, int64_t length,
            double low, double high, bool sequence, double kl_coef, int kl, int threads)

}  // namespace igpo
