#include "ops.h"
#include "parallel.h"

namespace igpo::IGPO_ISA {

// 32 KiB of tokens a task: large enough to pay for its dispatch, small enough to share a batch between threads.
constexpr int64_t kChunk = 4096;

void merge_hints(const int64_t* tokens, const int64_t* hints, const bool* hint_mask, int64_t* out, bool* generate,
                 int64_t count, int64_t mask_id, int threads) {
  parallel_for((count + kChunk - 1) / kChunk, threads, [=](int64_t chunk) {
    const int64_t end = count < (chunk + 1) * kChunk ? count : (chunk + 1) * kChunk;
    for (int64_t i = chunk * kChunk; i < end; ++i) {
      out[i] = hint_mask[i] ? hints[i] : tokens[i];
      generate[i] = out[i] == mask_id;
    }
  });
}

}  // namespace igpo::IGPO_ISA
