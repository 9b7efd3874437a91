// Philox4x32-10, the C++ twin of igpo/ops/_philox.py: the same bits for the same (key, position, index, row id).
#pragma once

#include <cstdint>

namespace igpo::IGPO_ISA {
namespace {

struct Words {
  uint32_t w[4];
};

inline Words philox(uint64_t key, uint32_t position, uint32_t index, uint64_t row_id) {
  uint32_t c0 = position, c1 = index, c2 = static_cast<uint32_t>(row_id), c3 = static_cast<uint32_t>(row_id >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 32 random bits -> (0, 1), exact in float64.
inline double uniform(uint32_t bits) { return (bits + 0.5) * 0x1p-32; }

// 52 random bits -> (0, 1).
inline double uniform53(uint32_t high, uint32_t low) {
  return (static_cast<double>((uint64_t{high} << 20) | (low >> 12)) + 0.5) * 0x1p-52;
}

}  // namespace
}  // namespace igpo::IGPO_ISA
