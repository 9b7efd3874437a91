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
