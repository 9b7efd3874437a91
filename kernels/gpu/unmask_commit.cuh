// The end of unmask_step: which candidates of a sequence are committed, and the canvas that follows. One CTA per sequence.
#pragma once

#include "unmask_slices.cuh"

namespace igpo::cuda {
namespace {

constexpr int kRanked = 256;  // keys ranked by counting the greater ones; more are searched by digits (chosen)

struct Commit {
  const int64_t* num_unmask_rows;  // or null: num_unmask everywhere
  int64_t num_unmask;
  bool has_threshold;
  float threshold;
  int64_t* out;  // may be call.tokens
  bool* committed;
};

struct CommitScratch {
  uint64_t keys[kRanked];
  uint64_t least;
  int histogram[256];
  int live, digit, below;  // of the digit search: the digit found, how many keys of it are wanted
};

// Greater for a higher score, then for a lower position. Never 0.
IGPO_DEVICE uint64_t rank_key(float score, int64_t position) {
  return uint64_t{orderable(score + 0.0f)} << 32 | static_cast<uint32_t>(~position);  // -0 and +0 are one score
}

// The k-th greatest of the `length` keys, 0 where there is none, by their digits of 8 bits from the highest. Ends as soon
// as all that share the digits so far are wanted: then the digits alone are the bound.
template <class Key>
IGPO_DEVICE uint64_t kth_greatest(int64_t length, int k, Key&& key, CommitScratch& scratch) {
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x)) scratch.histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
      const uint64_t own = key(i);
      const bool shares = shift == 56 || own >> (shift + 8) == prefix >> (shift + 8);
      if (own != 0 && shares) atomicAdd(&scratch.histogram[own >> shift & 255], 1);
    }
    __syncthreads();
    if (warp_id() == 0) {  // lane l holds the digits 255 - 8 l … 248 - 8 l: from above
      int mine = 0;
      for (int j = 0; j < 8; ++j) mine += scratch.histogram[255 - 8 * lane_id() - j];
      int upto = mine;
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, upto, offset);
        if (lane_id() >= offset) upto += other;
      }
      if (upto >= k && upto - mine < k) {
        int before = upto - mine, digit = 255 - 8 * lane_id();
        while (before + scratch.histogram[digit] < k) before += scratch.histogram[digit--];
        scratch.digit = digit;
        scratch.below = k - before;
      }
    }
    __syncthreads();
    prefix |= static_cast<uint64_t>(scratch.digit) << shift;
    k = scratch.below;
    const bool all = scratch.histogram[scratch.digit] == k;
    __syncthreads();
    if (all) break;
  }
  return prefix;
}

// What is not eligible gets zeros; the others' scores were left by the search, with candidate -1 where there is none.
__global__ void __launch_bounds__(1024) commit_kernel(const Call call, const Commit commit) {
  CommitScratch& scratch = *reinterpret_cast<CommitScratch*>(shared_memory());
  const int64_t length = call.rows.inner, first = int64_t{blockIdx.x} * length;
  if (threadIdx.x == 0) scratch.live = 0;
  __syncthreads();
  wait_for_previous();
  const auto key = [&](int64_t i) {
    return call.candidate[first + i] < 0 ? uint64_t{0} : rank_key(call.score[first + i], i);
  };
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    const int64_t row = first + i;
    if (!call.takes_part(row)) {
      call.candidate[row] = -1;
      call.score[row] = call.logprob[row] = call.entropy[row] = 0;
    } else if (call.candidate[row] >= 0) {
      const int at = atomicAdd(&scratch.live, 1);
      if (at < kRanked) scratch.keys[at] = key(i);
    }
  }
  __syncthreads();
  const int live = scratch.live;
  int64_t k = commit.num_unmask_rows ? commit.num_unmask_rows[blockIdx.x] : commit.num_unmask;
  if (commit.has_threshold && k < 1) k = 1;
  uint64_t least = k > 0 ? 0 : ~uint64_t{0};
  if (k > 0 && k < live && live <= kRanked) {
    for (int i = static_cast<int>(threadIdx.x); i < live; i += static_cast<int>(blockDim.x)) {
      int rank = 0;
      for (int j = 0; j < live; ++j) rank += scratch.keys[j] > scratch.keys[i];
      if (rank == k - 1) scratch.least = scratch.keys[i];
    }
    __syncthreads();
    least = scratch.least;
  } else if (k > 0 && k < live) {
    least = kth_greatest(length, static_cast<int>(k), key, scratch);
  }
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    const int64_t row = first + i, candidate = call.candidate[row];
    const bool above = commit.has_threshold && call.score[row] >= commit.threshold;
    const bool chosen = candidate >= 0 && (above || key(i) >= least);
    commit.committed[row] = chosen;
    commit.out[row] = chosen ? candidate : call.tokens[row];
  }
}

inline void launch_commit(const Call& call, const Commit& commit, int64_t batch, bool dependent,
                          uintptr_t stream) {
  const int64_t length = call.rows.inner;
  const int threads = static_cast<int>(length < 1024 ? (length + 31) / 32 * 32 : 1024);
  const Shape shape{dim3(static_cast<unsigned>(batch)), threads, sizeof(CommitScratch), 1, dependent};
  launch("unmask_step", shape, stream, commit_kernel, call, commit);
}

}  // namespace
}  // namespace igpo::cuda
