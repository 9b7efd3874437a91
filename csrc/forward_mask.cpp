#include <cstring>

#include "draws.h"
#include "ops.h"
#include "parallel.h"
#include "philox.h"

namespace igpo::IGPO_ISA {

void forward_mask(const int64_t* tokens, const bool* maskable, const double* t, const int64_t* row_ids, int64_t* noisy,
                  bool* masked, int64_t rows, int64_t length, int64_t mask_id, uint64_t key, bool exact, int threads) {
  parallel_for(rows, threads, [=](int64_t row) {
    const int64_t* from = tokens + row * length;
    const bool* may = maskable + row * length;
    int64_t* to = noisy + row * length;
    bool* is = masked + row * length;
    const auto draw = [&](int64_t i) { return philox(key, static_cast<uint32_t>(i), 0, static_cast<uint64_t>(row_ids[row])); };
    if (exact) {
      std::memset(is, 0, static_cast<std::size_t>(length));
      Keyed* keys = new Keyed[static_cast<std::size_t>(length)];
      int64_t n = 0;
      for (int64_t i = 0; i < length; ++i) {
        if (!may[i]) continue;
        const Words words = draw(i);
        keys[n++] = {(uint64_t{words.w[0]} << 31) | (words.w[1] >> 1), i};
      }
      const int64_t count = static_cast<int64_t>(__builtin_nearbyint(static_cast<double>(n) * t[row]));  // half to even
      select_smallest(keys, n, count);
      for (int64_t i = 0; i < count; ++i) is[keys[i].index] = true;
      delete[] keys;
    } else {
      for (int64_t i = 0; i < length; ++i) {
        if ((is[i] = may[i])) {
          const Words words = draw(i);
          is[i] = uniform53(words.w[0], words.w[1]) < t[row];
        }
      }
    }
    for (int64_t i = 0; i < length; ++i) to[i] = is[i] ? mask_id : from[i];
  });
}

}  // namespace igpo::IGPO_ISA
