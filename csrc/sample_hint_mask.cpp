#include <cstring>

#include "draws.h"
#include "ops.h"
#include "parallel.h"
#include "philox.h"

namespace igpo::IGPO_ISA {

void sample_hint_mask(const int64_t* trace_lengths, const double* ratio, const int64_t* row_ids, bool* out, int64_t rows,
                      int64_t length, int64_t low, int64_t high, uint64_t key, int threads) {
  parallel_for(rows, threads, [=](int64_t row) {
    bool* mask = out + row * length;
    std::memset(mask, 0, static_cast<std::size_t>(length));
    const int64_t total = trace_lengths[row];
    if (total <= 0) return;
    const int64_t most = (total + low - 1) / low;
    int64_t* starts = new int64_t[static_cast<std::size_t>(most + 1)];
    Keyed* keys = new Keyed[static_cast<std::size_t>(most)];
    int64_t chunks = 0, at = 0;
    while (at < total) {
      const Words words = philox(key, static_cast<uint32_t>(chunks), 0, static_cast<uint64_t>(row_ids[row]));
      starts[chunks] = at;
      keys[chunks] = {(uint64_t{words.w[1]} << 31) | (words.w[2] >> 1), chunks};
      at += low + static_cast<int64_t>((uint64_t{words.w[0]} * static_cast<uint64_t>(high - low + 1)) >> 32);
      ++chunks;
    }
    starts[chunks] = total;
    const int64_t shown = static_cast<int64_t>(static_cast<double>(chunks) * ratio[row]);
    select_smallest(keys, chunks, shown);
    for (int64_t i = 0; i < shown; ++i) {
      const int64_t begin = starts[keys[i].index], end = starts[keys[i].index + 1];
      for (int64_t p = begin; p < end && p < length; ++p) mask[p] = true;
    }
    delete[] starts;
    delete[] keys;
  });
}

}  // namespace igpo::IGPO_ISA
