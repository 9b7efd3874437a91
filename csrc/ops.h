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

// unmask_step: strides of logits in elements; eligible, num_unmask_rows, suppress and row_ids may be null; confidence is
// 0 prob, 1 margin, 2 entropy, 3 random; temperature 0 is argmax; out may be tokens. Keys: igpo/ops/_philox.py.
IGPO_KERNEL(unmask_step, const void* logits, int64_t stride_b, int64_t stride_l, int dtype, const int64_t* tokens,
            const bool* eligible, int64_t num_unmask, const int64_t* num_unmask_rows, const int64_t* suppress,
            int64_t num_suppress, const int64_t* row_ids, int64_t* out, bool* committed, float* score, float* logprob,
            float* entropy, int64_t batch, int64_t length, int64_t vocab, int64_t mask_id, double temperature,
            int confidence, bool has_threshold, float threshold, bool gumbel, uint64_t token_key, uint64_t score_key,
            uint64_t gumbel_key, int threads)

}  // namespace igpo
