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

int64_t unmask_step_workspace(int64_t rows, int64_t vocab, int dtype, int device, uintptr_t stream);
void unmask_step(const void* logits, int64_t stride_b, int64_t stride_l, int dtype, const int64_t* tokens,
                 const bool* eligible, int64_t num_unmask, const int64_t* num_unmask_rows, const int64_t* suppress,
                 int64_t num_suppress, const int64_t* row_ids, int64_t* out, bool* committed, float* score,
                 float* logprob, float* entropy, int64_t batch, int64_t length, int64_t vocab, int64_t mask_id,
                 double temperature, int confidence, bool has_threshold, float threshold, bool gumbel,
                 uint64_t token_key, uint64_t score_key, uint64_t gumbel_key, int64_t* workspace, int device,
                 uintptr_t stream);

}  // namespace igpo::cuda
