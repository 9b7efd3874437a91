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

namespace cuda {  // kernels/gpu/*.cu, in builds with IGPO_HAS_CUDA
int device_count();
const char* unavailable();  // why no CUDA kernel can run here, or ""
}  // namespace cuda

// merge_hints: out[i] = hint_mask[i] ? hints[i] : tokens[i]; generate[i] = out[i] == mask_id
IGPO_KERNEL(merge_hints, const int64_t* tokens, const int64_t* hints, const bool* hint_mask, int64_t* out, bool* generate,
            int64_t count, int64_t mask_id, int threads)

}  // namespace igpo
