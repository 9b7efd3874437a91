// Selection in a row of any length by one block: the `count` entries with the smallest (key, index).
//
// The threshold key is found by its digits of 8 bits, most significant first: one histogram of the row per digit, until
// a digit's entries are wanted all or none. Random keys need two or three passes; equal keys are told apart by index.
#pragma once

#include "common.cuh"

namespace igpo::cuda {

using Key = unsigned long long;
constexpr Key kNoKey = ~Key{0};  // of an entry that cannot be chosen; all others are below 2^63
constexpr int kDigitBits = 8, kBins = 1 << kDigitBits;

struct Least {
  IGPO_DEVICE Key operator()(Key a, Key b) const { return a < b ? a : b; }
};
struct Largest {
  IGPO_DEVICE Key operator()(Key a, Key b) const { return a > b ? a : b; }
};

// Shared memory of a selection.
struct SelectState {
  Key smallest, largest, eligible;  // of the row's keys
  Key digit, before, inside;        // of the last pass: the threshold's digit, entries below it, entries in it
  unsigned bins[kBins];
  int warps[32];
};

// Chosen are the entries with key >> shift < bound, and the first `ties` of those where it is equal.
struct Choice {
  Key bound;
  int shift;
  int64_t ties;
};

// The number of entries that can be chosen. key_of(index) -> Key; this thread asks for indices threadIdx.x + k blockDim.x
// here and below, so key_of may keep what it computed.
template <class KeyOf>
IGPO_DEVICE int64_t survey(const KeyOf& key_of, int64_t length, SelectState* state) {
  if (threadIdx.x == 0) {
    state->smallest = kNoKey;
    state->largest = state->eligible = 0;
  }
  __syncthreads();
  Key smallest = kNoKey, largest = 0, eligible = 0;
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    const Key key = key_of(i);
    if (key == kNoKey) continue;
    smallest = Least{}(smallest, key);
    largest = Largest{}(largest, key);
    ++eligible;
  }
  smallest = warp_reduce(smallest, Least{});
  largest = warp_reduce(largest, Largest{});
  eligible = warp_reduce(eligible, Sum{});
  if (lane_id() == 0) {
    atomicMin(&state->smallest, smallest);
    atomicMax(&state->largest, largest);
    atomicAdd(&state->eligible, eligible);
  }
  __syncthreads();
  return static_cast<int64_t>(state->eligible);
}

// Warp 0: the digit that the need-th entry falls in, counted from 1.
IGPO_DEVICE void find_digit(SelectState* state, Key need) {
  constexpr int each = kBins / 32;
  Key sum = 0;
  for (int i = 0; i < each; ++i) sum += state->bins[lane_id() * each + i];
  Key upto = sum;
  for (int offset = 1; offset < 32; offset <<= 1) {
    const Key left = __shfl_up_sync(kAllLanes, upto, offset);
    if (lane_id() >= offset) upto += left;
  }
  Key before = upto - sum;
  if (before >= need || upto < need) return;
  for (int i = 0; i < each; ++i) {
    const Key inside = state->bins[lane_id() * each + i];
    if (before + inside >= need) {
      state->digit = static_cast<Key>(lane_id() * each + i);
      state->before = before;
      state->inside = inside;
      return;
    }
    before += inside;
  }
}

// After survey(). Every thread of the block gets the answer.
template <class KeyOf>
IGPO_DEVICE Choice choose(const KeyOf& key_of, int64_t length, int64_t count, SelectState* state) {
  if (count <= 0) return {0, 0, 0};
  if (static_cast<Key>(count) >= state->eligible) return {1, 63, 0};
  Key need = static_cast<Key>(count);
  int shift = 64 - __clzll(static_cast<long long>(state->smallest ^ state->largest));  // above it all keys agree
  Key prefix = state->smallest >> shift;
  while (shift > 0) {
    const int bits = shift < kDigitBits ? shift : kDigitBits, next = shift - bits;
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += static_cast<int>(blockDim.x)) state->bins[bin] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
      const Key key = key_of(i);
      if (key != kNoKey && key >> shift == prefix) atomicAdd(&state->bins[(key >> next) & ((1u << bits) - 1)], 1u);
    }
    __syncthreads();
    if (warp_id() == 0) find_digit(state, need);
    __syncthreads();
    prefix = prefix << bits | state->digit;
    need -= state->before;
    shift = next;
    if (state->inside == need) return {prefix + 1, shift, 0};
  }
  return {prefix, 0, static_cast<int64_t>(need)};
}

// Applies a choice to the entries in order: round by round every thread calls it with the key of its entry (kNoKey where
// it has none), the entries of a round in the order of threads.
struct Chooser {
  Choice choice;
  SelectState* state;
  int64_t seen = 0;  // entries of earlier rounds that are equal to the bound

  IGPO_DEVICE bool operator()(Key key) {
    const bool below = key != kNoKey && key >> choice.shift < choice.bound;
    if (choice.ties == 0) return below;
    const bool tie = key == choice.bound;
    const unsigned ties = __ballot_sync(kAllLanes, tie);
    if (lane_id() == 0) state->warps[warp_id()] = __popc(ties);
    __syncthreads();
    int64_t rank = seen + __popc(ties & ((1u << lane_id()) - 1));
    for (int w = 0; w < static_cast<int>(blockDim.x >> 5); ++w) {
      if (w < warp_id()) rank += state->warps[w];
      seen += state->warps[w];
    }
    __syncthreads();
    return below || (tie && rank < choice.ties);
  }
};

// visit(index, chosen) for every entry of the row.
template <class KeyOf, class Visit>
IGPO_DEVICE void apply(const Choice& choice, const KeyOf& key_of, int64_t length, SelectState* state, const Visit& visit) {
  Chooser chosen{choice, state};
  for (int64_t base = 0; base < length; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    const bool is_chosen = chosen(i < length ? key_of(i) : kNoKey);
    if (i < length) visit(i, is_chosen);
  }
}

// Keys of the first `size` entries, kept in shared memory by the first pass (survey) and read by the others.
template <class Make>
struct CachedKeys {
  Make make;
  Key* cache;
  int64_t size;
  bool first;
  IGPO_DEVICE Key operator()(int64_t i) const {
    if (i >= size) return make(i);
    if (first) cache[i] = make(i);
    return cache[i];
  }
};

// of a block; launch bounds ask for two of them on a multiprocessor: with fewer registers sm_100 code spills
constexpr int kMostThreads = 512;
constexpr int64_t kMostCached = 4096;  // 32 KiB: no opt-in, six blocks to a multiprocessor (chosen)

// Threads and shared memory of a block for rows of `length` entries, and how many keys it keeps.
struct SelectShape {
  int threads;
  int64_t cached;
  explicit SelectShape(int64_t length)
      : threads(length <= 4 * 128 ? 128 : length <= kMostCached ? 256 : kMostThreads),
        cached(length < kMostCached ? length : kMostCached) {}
  size_t bytes() const { return sizeof(SelectState) + static_cast<size_t>(cached) * sizeof(Key); }
};

// The `count_of(number of entries that can be chosen)` smallest: what most ops do with a row.
template <class Make, class CountOf, class Visit>
IGPO_DEVICE void select_smallest(const Make& make, int64_t length, int64_t cached, const CountOf& count_of,
                                 const Visit& visit) {
  auto* state = reinterpret_cast<SelectState*>(shared_memory());
  CachedKeys<Make> keys{make, reinterpret_cast<Key*>(state + 1), cached, true};
  const int64_t eligible = survey(keys, length, state);
  keys.first = false;
  const Choice choice = choose(keys, length, count_of(eligible), state);
  apply(choice, keys, length, state, visit);
}

}  // namespace igpo::cuda
