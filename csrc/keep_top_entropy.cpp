#include <cstring>

#include "draws.h"
#include "ops.h"
#include "parallel.h"

namespace igpo::IGPO_ISA {
namespace {

// Entropies in descending order as ascending integers; NaN and -inf last, -0 equal to 0.
uint64_t descending(float entropy) {
  if (!(entropy == entropy)) entropy = -__builtin_inff();
  entropy += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &entropy, 4);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return ~ascending;
}

}  // namespace

void keep_top_entropy(const float* entropy, const bool* candidates, bool* out, int64_t rows, int64_t length,
                      double fraction, int threads) {
  parallel_for(rows, threads, [=](int64_t row) {
    const float* h = entropy + row * length;
    const bool* candidate = candidates + row * length;
    bool* kept = out + row * length;
    std::memset(kept, 0, static_cast<std::size_t>(length));
    Keyed* keys = new Keyed[static_cast<std::size_t>(length)];
    int64_t n = 0;
    for (int64_t i = 0; i < length; ++i)
      if (candidate[i]) keys[n++] = {descending(h[i]), i};
    int64_t count = static_cast<int64_t>(static_cast<double>(n) * fraction);
    if (count < 1) count = n < 1 ? 0 : 1;
    select_smallest(keys, n, count);
    for (int64_t i = 0; i < count; ++i) kept[keys[i].index] = true;
    delete[] keys;
  });
}

}  // namespace igpo::IGPO_ISA
