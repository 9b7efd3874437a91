// Chunks of a trace that are shown (igpo/ops/sample_hint_mask.py): one block per row; nothing returns to the host.
#include "cuda_ops.h"
#include "select.cuh"

namespace igpo::cuda {
namespace {

// Cuts a row's trace: chunk c has a size and a key, both from Philox counter c.
struct Chunks {
  uint64_t key, row_id, low, span;
  IGPO_DEVICE Words words(int64_t c) const { return philox(key, static_cast<uint32_t>(c), 0, row_id); }
  IGPO_DEVICE int64_t size(const Words& words) const {
    return static_cast<int64_t>(low + ((uint64_t{words.w[0]} * span) >> 32));
  }
  IGPO_DEVICE static Key key_of(const Words& words) { return Key{words.w[1]} << 31 | words.w[2] >> 1; }
};

// The sum of `value` over the threads up to this one, and over all. sums: a number per warp, free when the call returns.
IGPO_DEVICE int64_t block_scan(int64_t value, int64_t* sums, int64_t& all) {
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int64_t left = __shfl_up_sync(kAllLanes, value, offset);
    if (lane_id() >= offset) value += left;
  }
  if (lane_id() == 31) sums[warp_id()] = value;
  __syncthreads();
  all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x >> 5); ++w) {
    if (w == warp_id()) value += all;
    all += sums[w];
  }
  __syncthreads();
  return value;
}

struct Shared {
  int64_t sums[33];
  SelectState select;
};

// How many chunks begin within the trace.
IGPO_DEVICE int64_t count_chunks(const Chunks& chunks, int64_t trace, Shared* shared) {
  int64_t mine = 0, all = 0;
  for (int64_t base = 0, begin = 0; begin < trace; base += blockDim.x, begin += all) {
    const int64_t size = chunks.size(chunks.words(base + threadIdx.x));
    mine += begin + block_scan(size, shared->sums, all) - size < trace;
  }
  return block_reduce(mine, shared->sums, Sum{});
}

__global__ void __launch_bounds__(kMostThreads, 2)
    sample_hint_mask_kernel(const int64_t* __restrict__ trace_lengths, const double* __restrict__ ratio,
                            const int64_t* __restrict__ row_ids, bool* __restrict__ out, int64_t length, uint64_t low,
                            uint64_t span, uint64_t key, int64_t cached) {
  // state | the keys kept | ends and choices of a round of chunks
  auto* shared = reinterpret_cast<Shared*>(shared_memory());
  auto* cache = reinterpret_cast<Key*>(shared + 1);
  auto* ends = reinterpret_cast<int64_t*>(cache + cached);
  auto* shown = reinterpret_cast<bool*>(ends + blockDim.x);

  const int64_t row = blockIdx.x, trace = trace_lengths[row], edge = trace < length ? trace : length;
  const Chunks chunks{key, static_cast<uint64_t>(row_ids[row]), low, span};
  const int64_t number = count_chunks(chunks, trace, shared);
  const auto make = [&](int64_t c) { return Chunks::key_of(chunks.words(c)); };
  CachedKeys<decltype(make)> keys{make, cache, cached, true};
  survey(keys, number, &shared->select);
  keys.first = false;
  const auto wanted = static_cast<int64_t>(static_cast<double>(number) * ratio[row]);
  Chooser chosen{choose(keys, number, wanted, &shared->select), &shared->select};

  bool* mask = out + row * length;
  int64_t all = 0;
  for (int64_t base = 0, begin = 0; begin < edge; base += blockDim.x, begin += all) {
    const int64_t c = base + threadIdx.x;
    const Words words = chunks.words(c);
    ends[threadIdx.x] = begin + block_scan(chunks.size(words), shared->sums, all);
    shown[threadIdx.x] = chosen(c < number ? Chunks::key_of(words) : kNoKey);
    __syncthreads();
    const int64_t stop = begin + all < edge ? begin + all : edge;
    for (int64_t position = begin + threadIdx.x; position < stop; position += blockDim.x) {
      int owner = 0, last = static_cast<int>(blockDim.x) - 1;  // the first chunk that ends beyond the position
      while (owner < last) {
        const int middle = (owner + last) >> 1;
        if (ends[middle] > position)
          last = middle;
        else
          owner = middle + 1;
      }
      mask[position] = shown[owner];
    }
    __syncthreads();
  }
  for (int64_t position = (edge < 0 ? 0 : edge) + threadIdx.x; position < length; position += blockDim.x)
    mask[position] = false;
}

}  // namespace

// trace_lengths, ratio, row_ids: (rows,); out: (rows, length), contiguous. Chunk sizes are drawn from low..high.
void sample_hint_mask(const int64_t* trace_lengths, const double* ratio, const int64_t* row_ids, bool* out, int64_t rows,
                      int64_t length, int64_t low, int64_t high, uint64_t key, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const SelectShape shape(length / low + 1);  // the chunks of a trace that fills the mask; a longer one is right too
  const size_t shared = sizeof(Shared) + static_cast<size_t>(shape.cached) * sizeof(Key) +
                        static_cast<size_t>(shape.threads) * (sizeof(int64_t) + sizeof(bool));
  launch("sample_hint_mask", {dim3(static_cast<unsigned>(length ? rows : 0)), shape.threads, shared}, stream,
         sample_hint_mask_kernel, trace_lengths, ratio, row_ids, out, length, static_cast<uint64_t>(low),
         static_cast<uint64_t>(high - low + 1), key, shape.cached);
}

}  // namespace igpo::cuda
