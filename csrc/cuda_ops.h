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

}  // namespace igpo::cuda
