// Elementwise kernels on canvases: two neighbouring positions to a thread, so that int64 tokens move 16 bytes at a time.
#pragma once

#include "common.cuh"

namespace igpo::cuda {

constexpr int kPairThreads = 256;

inline Shape pair_shape(int64_t count) {
  return {dim3(static_cast<unsigned>((count + 2 * kPairThreads - 1) / (2 * kPairThreads))), kPairThreads};
}

// Whether every pair of a tensor that begins at p can be accessed at once.
template <class... T>
bool pairs_are_aligned(const T*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T)) == 0) && ...);
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T at[2];
};

// Elements p[0], and p[1] if `both`; at once if `wide`.
template <class T>
IGPO_DEVICE Pair<T> load_pair(const T* p, bool both, bool wide) {
  if (both && wide) {
    if constexpr (sizeof(T) == 8) {
      const Pack<T> pack = load_streaming(reinterpret_cast<const Pack<T>*>(p));
      return {{pack.at[0], pack.at[1]}};
    } else {
      return *reinterpret_cast<const Pair<T>*>(p);
    }
  }
  return {{p[0], both ? p[1] : T{}}};
}
template <class T>
IGPO_DEVICE void store_pair(T* p, const Pair<T>& value, bool both, bool wide) {
  if (both && wide) {
    if constexpr (sizeof(T) == 8)
      store_streaming(reinterpret_cast<Pack<T>*>(p), Pack<T>{{value.at[0], value.at[1]}});
    else
      *reinterpret_cast<Pair<T>*>(p) = value;
    return;
  }
  p[0] = value.at[0];
  if (both) p[1] = value.at[1];
}

}  // namespace igpo::cuda
