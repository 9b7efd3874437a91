// Every CUDA entry point, once; defined in kernels/gpu/<op>.cu, which says what the arguments mean.
//
// Pointers are device addresses of tensors the Python side has checked; sizes and strides are in elements; `dtype` is 0
// float32, 1 bfloat16, 2 float16. The last two arguments are the device and the stream (cudaStream_t) to run on. Nothing
// waits for the device.
#pragma once

#include <cstdint>

namespace igpo::cuda {

int device_count();
const char* unavailable();  // why no CUDA kernel can run here, or ""

void merge_hints(const int64_t* tokens, const int64_t* hints, const bool* hint_mask, int64_t* out, bool* generate,
                 int64_t count, int64_t mask_id, int device, uintptr_t stream);

// logits and out: rows at (r / inner) * outer_stride + (r % inner) * inner_stride elements; out_dtype: that of logits, or
// any if that is float32. weights: or null. divisor: one int64, or null for 1. parts: room for rows x 8 x 4 floats where
// kernels/gpu/row_stats.cuh cuts rows.
void token_logprob(const void* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride, const int64_t* targets,
                   float* logprob, float* entropy, float* row_max, float* log_sum, float* parts, int64_t rows,
                   int64_t vocab, int64_t ignore_index, float scale, int dtype, int device, uintptr_t stream);
void token_logprob_backward(const float* grad_logprob, const float* grad_entropy, const void* logits, int64_t inner,
                            int64_t outer_stride, int64_t inner_stride, const int64_t* targets, const float* entropy,
                            const float* row_max, const float* log_sum, void* out, int64_t out_inner,
                            int64_t out_outer_stride, int64_t out_inner_stride, int64_t rows, int64_t vocab,
                            int64_t ignore_index, float scale, int dtype, int out_dtype, int device, uintptr_t stream);

void masked_cross_entropy(const void* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                          const int64_t* targets, const float* weights, float* row_loss, float* row_max, float* log_sum,
                          float* parts, int64_t rows, int64_t vocab, int64_t ignore_index, int dtype, int device,
                          uintptr_t stream);
void masked_cross_entropy_with_gradient(const void* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                                        const int64_t* targets, const float* weights, const int64_t* divisor,
                                        float* row_loss, float* row_max, float* log_sum, float* parts, void* out,
                                        int64_t out_inner, int64_t out_outer_stride, int64_t out_inner_stride,
                                        int64_t rows, int64_t vocab, int64_t ignore_index, int dtype, int out_dtype,
                                        int device, uintptr_t stream);
void masked_cross_entropy_backward(const float* grad_loss, int64_t grad_stride, const void* logits, int64_t inner,
                                   int64_t outer_stride, int64_t inner_stride, const int64_t* targets,
                                   const float* weights, const int64_t* divisor, const float* row_max,
                                   const float* log_sum, void* out, int64_t out_inner, int64_t out_outer_stride,
                                   int64_t out_inner_stride, int64_t rows, int64_t vocab, int64_t ignore_index, int dtype,
                                   int out_dtype, int device, uintptr_t stream);
void masked_cross_entropy_scale(void* grad, const float* factor, const int64_t* targets, const float* weights,
                                int64_t rows, int64_t vocab, int64_t ignore_index, int dtype, int device,
                                uintptr_t stream);
void sum_rows(const float* values, const int64_t* divisor, float* out, int64_t rows, int device, uintptr_t stream);
int64_t unmask_step_workspace(int64_t rows, int64_t vocab, int dtype, int device, uintptr_t stream);
void unmask_step(const void* logits, int64_t stride_b, int64_t stride_l, int dtype, const int64_t* tokens,
                 const bool* eligible, int64_t num_unmask, const int64_t* num_unmask_rows, const int64_t* suppress,
                 int64_t num_suppress, const int64_t* row_ids, int64_t* out, bool* committed, float* score,
                 float* logprob, float* entropy, int64_t batch, int64_t length, int64_t vocab, int64_t mask_id,
                 double temperature, int confidence, bool has_threshold, float threshold, bool gumbel,
                 uint64_t token_key, uint64_t score_key, uint64_t gumbel_key, int64_t* workspace, int device,
                 uintptr_t stream);

void sample_hint_mask(const int64_t* trace_lengths, const double* ratio, const int64_t* row_ids, bool* out, int64_t rows,
                      int64_t length, int64_t low, int64_t high, uint64_t key, int device, uintptr_t stream);

void keep_top_entropy(const float* entropy, const bool* candidates, bool* out, int64_t rows, int64_t length,
                      double fraction, int device, uintptr_t stream);

void forward_mask(const int64_t* tokens, const bool* maskable, const double* t, const int64_t* row_ids, int64_t* noisy,
                  bool* masked, int64_t rows, int64_t length, int64_t mask_id, uint64_t key, bool exact, int device,
                  uintptr_t stream);

void policy_loss(const float* logprob, const float* old_logprob, const float* advantages, const bool* token_mask,
                 const float* ref_logprob, float* grad, float* loss, float* clip_fraction, float* divergence,
                 float* ratio_mean, double* workspace, int64_t rows, int64_t length, int64_t logprob_stride,
                 int64_t old_stride, int64_t advantage_stride, int64_t mask_stride, int64_t ref_stride, double low,
                 double high, bool sequence, double kl_coef, int kl, int aggregate, double scale, int device,
                 uintptr_t stream);

}  // namespace igpo::cuda
