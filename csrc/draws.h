// Keyed choices without replacement: the entries of a row with the smallest random keys.
#pragma once

#include <cstdint>

namespace igpo::IGPO_ISA {
namespace {

struct Keyed {
  uint64_t key;
  int64_t index;
};

inline bool before(const Keyed& a, const Keyed& b) { return a.key != b.key ? a.key < b.key : a.index < b.index; }

// Reorders entries[0, n) so that the `count` smallest come first (quickselect; ties by index). No std algorithms: see simd.h.
inline void select_smallest(Keyed* entries, int64_t n, int64_t count) {
  int64_t left = 0, right = n - 1;
  while (left < right) {
    const Keyed pivot = entries[left + (right - left) / 2];
    int64_t i = left, j = right;
    while (i <= j) {
      while (before(entries[i], pivot)) ++i;
      while (before(pivot, entries[j])) --j;
      if (i <= j) {
        const Keyed swap = entries[i];
        entries[i++] = entries[j];
        entries[j--] = swap;
      }
    }
    if (count <= j + 1) {
      if (count == j + 1) return;
      right = j;
    } else if (count > i) {
      left = i;
    } else {
      return;
    }
  }
}

}  // namespace
}  // namespace igpo::IGPO_ISA
