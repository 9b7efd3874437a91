// One denoising commit (igpo/ops/unmask_step.py): V s bytes read per row that takes part, once; nothing of the others.
//
// search: a cluster of CTAs per row, a slice of the vocabulary each (unmask_slices.cuh). Their partial results meet in
// every CTA and are combined in float64 in slice order; the CTA that holds the slice a draw falls in finishes the row.
// Without clusters: scan, a CTA per slice, and finish, a CTA per row, compute the same bits. commit: unmask_commit.cuh.
#include "cuda_ops.h"
#include "unmask_commit.cuh"

namespace igpo::cuda {
namespace {

constexpr int kDirectRows = 512;  // beyond it clusters take rows from a list: those that would find nothing to do cost more
constexpr int kListThreads = 1024, kListPerThread = 8;
constexpr int kResident = 3, kResidentNoisy = 2;  // CTAs of a multiprocessor, at least (chosen); with Gumbel noise
constexpr double kLn2 = 0.69314718055994530942;

// list[0] = how many rows take part, list[1 …] = these rows.
__global__ void __launch_bounds__(kListThreads) list_kernel(const Call call, int64_t* list) {
  int* counts = reinterpret_cast<int*>(shared_memory());  // per warp
  let_next_begin();
  int64_t done = 0;
  for (int64_t base = 0; base < call.num_rows; base += kListThreads * kListPerThread) {
    unsigned flags[kListPerThread];
    int mine = 0;
#pragma unroll
    for (int j = 0; j < kListPerThread; ++j) {
      const int64_t row = base + j * kListThreads + threadIdx.x;
      flags[j] = __ballot_sync(kAllLanes, row < call.num_rows && call.takes_part(row));
      mine += __popc(flags[j]);
    }
    if (lane_id() == 0) counts[warp_id()] = mine;
    __syncthreads();
    int64_t at = done;
    for (int w = 0; w < kListThreads / 32; ++w) {
      if (w < warp_id()) at += counts[w];
      done += counts[w];
    }
#pragma unroll
    for (int j = 0; j < kListPerThread; ++j) {
      const unsigned before = flags[j] & ((1u << lane_id()) - 1);
      if (flags[j] >> lane_id() & 1) list[1 + at + __popc(before)] = base + j * kListThreads + threadIdx.x;
      at += __popc(flags[j]);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) list[0] = done;
}

// The two halves of cluster_sync(), for what needs no memory seen: work may lie between them.
IGPO_DEVICE void cluster_arrive() {
#if !defined(IGPO_EMULATE) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}
IGPO_DEVICE void cluster_wait() {
#if defined(IGPO_EMULATE)
  cluster_sync();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Shared memory of a CTA: the slice, then what is small.
template <class T>
struct Shared {
  Pack<T>* packs;
  Scratch& scratch;
  Partial* parts;   // buffers of cut.count
  double* moments;  // 4 of cut.count
  IGPO_DEVICE explicit Shared(const Call& call, int buffers)
      : packs(reinterpret_cast<Pack<T>*>(shared_memory())),
        scratch(*reinterpret_cast<Scratch*>(packs + call.cut.length / Pack<T>::size)),
        parts(reinterpret_cast<Partial*>(&scratch + 1)),
        moments(reinterpret_cast<double*>(parts + buffers * call.cut.count)) {}
};

// What the slices of a row say together, and where in them a draw falls, into scratch; ends with a barrier.
__device__ void combine(const Call& call, int64_t row, const Partial* parts, double* moments, Scratch& scratch) {
  const int count = call.cut.count;
  if (warp_id() == 0) {
    double top = -kInf, second = -kInf;
#pragma unroll 1
    for (int s = 0; s < count; ++s) {
      second = fmax(fmax(second, parts[s].second), fmin(top, parts[s].max));
      top = fmax(top, parts[s].max);
    }
    for (int s = lane_id(); s < count; s += 32) {
      const Partial& part = parts[s];
      const double below = part.max - top, shift = below * call.inverse;
      const bool some = part.sum != 0;  // else nothing is finite, and below may be -inf or NaN
      const double scale = exp(shift), scale1 = exp(below);
      moments[s] = some ? scale * part.sum : 0;
      moments[count + s] = some ? scale * (part.weighted * kLn2 + shift * part.sum) : 0;
      moments[2 * count + s] = some ? scale1 * part.sum1 : 0;
      moments[3 * count + s] = some ? scale1 * (part.weighted1 * kLn2 + below * part.sum1) : 0;
    }
    __syncwarp();
    double sums[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int s = 0; s < count; ++s)
#pragma unroll
      for (int f = 0; f < 4; ++f) sums[f] += moments[f * count + s];
    double u = 0;
    int slice = 0;
    if (call.draws && !call.gumbel) {
      const Words words = philox(call.token_key, call.position(row), 0, call.row_id(row));
      u = uniform53(words.w[0], words.w[1]);
      slice = pick(count, sums[0], [&](int s) { return moments[s]; }, u);
    }
    if (lane_id() == 0) {
      scratch.sum = sums[0];
      scratch.weighted = sums[1];
      scratch.sum1 = sums[2];
      scratch.weighted1 = sums[3];
      scratch.top = top;
      scratch.second = second;
      scratch.u = u;
      scratch.slice = slice;
    }
  }
  __syncthreads();
}

IGPO_DEVICE double entropy(double sum, double weighted) {
  const double nats = log(sum) - weighted / sum;
  return nats > 0 ? nats : 0;
}

// Writes what is known of a row once its token (with logit `value`) is; by one thread.
__device__ void write_row(const Call& call, int64_t row, const Scratch& row_of, int64_t token, double value, bool both) {
  const double below = value - row_of.top;
  const double sum1 = both ? row_of.sum1 : row_of.sum, weighted1 = both ? row_of.weighted1 : row_of.weighted;
  double score = 0;
  if (call.confidence == kProb) score = exp(below) / sum1;
  if (call.confidence == kMargin) score = -expm1(row_of.second - row_of.top) / sum1;
  if (call.confidence == kEntropy) score = 0.0 - entropy(sum1, weighted1);
  if (call.confidence == kRandom) {
    const Words words = philox(call.score_key, call.position(row), 0, call.row_id(row));
    score = ((words.w[0] >> 9) + 0.5) * 0x1p-23;
  }
  call.candidate[row] = token;
  call.score[row] = static_cast<float>(score);
  call.logprob[row] = static_cast<float>(below * call.inverse - log(row_of.sum));
  call.entropy[row] = static_cast<float>(entropy(row_of.sum, row_of.weighted));
}

// Ends a row whose partial results lie in `parts`; the CTAs share the work as `rank` of call.cluster. resident: the slice
// that lies in packs, -1 for none.
template <class T, Need kNeed>
IGPO_DEVICE void finish_row(const Call& call, int64_t row, const Partial* parts, int rank, int resident, int num_packs,
                            const Shared<T>& shared) {
  Scratch& scratch = shared.scratch;
  combine(call, row, parts, shared.moments, scratch);
  const bool valid = scratch.sum > 0, inverse_cdf = valid && call.draws && !call.gumbel;
  if (rank != (inverse_cdf ? scratch.slice % call.cluster : 0)) return;
  if (!valid) {  // NaN, +inf, or nothing finite
    if (threadIdx.x > 0) return;
    call.candidate[row] = -1;
    call.score[row] = __int_as_float(0x7fc00000);
    call.logprob[row] = call.entropy[row] = 0;
    return;
  }
  int64_t token;
  double value = scratch.top;
  if (inverse_cdf) {
    const int s = scratch.slice;
    if (s != resident) num_packs = load_slice(call, row, s, shared.packs);
    float logit;
    token = draw_in_slice(call, s, static_cast<float>(parts[s].max), scratch.u, shared.packs, num_packs, scratch, logit);
    value = logit;
  } else {
    int s = 0;
    for (int other = 1; other < call.cut.count; ++other)
      if (call.gumbel ? parts[other].noisy > parts[s].noisy : parts[other].max > parts[s].max) s = other;
    token = call.gumbel ? parts[s].drawn : parts[s].first;
    if (call.gumbel) value = parts[s].value;
  }
  if (threadIdx.x == 0) write_row(call, row, scratch, token, value, kNeed == kBoth);
}

// A slice of a row into shared memory and its partial result into `out`, both seen by the block.
template <class T, Need kNeed, bool kNoisy>
IGPO_DEVICE int visit_slice(const Call& call, int64_t row, int s, const Shared<T>& shared, Partial& out) {
  const int num_packs = load_slice(call, row, s, shared.packs);
  scan_slice<T, kNeed>(call, s, shared.packs, num_packs, shared.scratch, out);
  __syncthreads();
  if (kNoisy) draw_noisy(call, row, s, shared.packs, num_packs, shared.scratch, out);
  return num_packs;
}

template <class T, Need kNeed, bool kNoisy>
__global__ void __launch_bounds__(kThreads, kNoisy ? kResidentNoisy : kResident) search_kernel(const Call call) {
  const Shared<T> shared(call, 2);
  const int rank = cluster_rank(), count = call.cut.count;
  wait_for_previous();
  let_next_begin();
  const int64_t rows = call.num_listed();
  Partial* parts = shared.parts;
  bool met = false;  // the other CTAs of the cluster may not run yet, and their memory not exist
  for (int64_t i = blockIdx.x / call.cluster; i < rows; i += gridDim.x / call.cluster) {
    const int64_t row = call.listed(i);
    if (!call.list && !call.takes_part(row)) continue;
    if (!met) cluster_arrive();
    int resident = -1, num_packs = 0;
    for (int s = rank; s < count; s += call.cluster) {
      num_packs = visit_slice<T, kNeed, kNoisy>(call, row, s, shared, parts[s]);
      resident = s;
      if (!met) cluster_wait();
      met = true;
      const auto* from = reinterpret_cast<const uint64_t*>(parts + s);
      for (int w = static_cast<int>(threadIdx.x); w < call.cluster * kPartialWords; w += kThreads) {
        const int to = w / kPartialWords, word = w % kPartialWords;
        if (to != rank) in_cluster_block(reinterpret_cast<uint64_t*>(parts + s), to)[word] = from[word];
      }
    }
    if (!met) cluster_wait();
    met = true;
    // one barrier a row: the buffer of this row is written again two rows later, when all have passed the next one
    cluster_sync();
    finish_row<T, kNeed>(call, row, parts, rank, resident, num_packs, shared);
    parts = parts == shared.parts ? shared.parts + count : shared.parts;
  }
}

template <class T, Need kNeed, bool kNoisy>
__global__ void __launch_bounds__(kThreads, kNoisy ? kResidentNoisy : kResident) scan_kernel(const Call call) {
  const Shared<T> shared(call, 1);
  const int count = call.cut.count;
  const int64_t tasks = call.num_listed() * count;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t row = call.listed(task / count);
    if (!call.list && !call.takes_part(row)) continue;
    visit_slice<T, kNeed, kNoisy>(call, row, static_cast<int>(task % count), shared, shared.parts[0]);
    const auto* from = reinterpret_cast<const uint64_t*>(shared.parts);
    auto* to = reinterpret_cast<uint64_t*>(call.partials + row * count + task % count);
    if (threadIdx.x < kPartialWords) to[threadIdx.x] = from[threadIdx.x];
  }
}

template <class T, Need kNeed>
__global__ void __launch_bounds__(kThreads, kResident) finish_kernel(const Call call) {
  const Shared<T> shared(call, 1);
  const int64_t rows = call.num_listed();
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t row = call.listed(i);
    if (!call.list && !call.takes_part(row)) continue;
    finish_row<T, kNeed>(call, row, call.partials + row * call.cut.count, 0, -1, 0, shared);
    __syncthreads();  // scratch is read to the end
  }
}

bool has_clusters(int device) { return capability(device) >= 90; }

// How many CTAs a multiprocessor holds, at least.
int resident(size_t shared, bool noisy) {
  const int by_memory = static_cast<int>((227 << 10) / (shared + 1024)), most = noisy ? kResidentNoisy : kResident;
  return by_memory < most ? by_memory : most;
}

template <class T, Need kNeed, bool kNoisy>
void launch_search(Call call, int device, uintptr_t stream) {
  const bool clusters = has_clusters(device), listed = call.list != nullptr;
  const size_t shared = shared_bytes(call.cut, sizeof(T), clusters ? 2 : 1);
  const int64_t at_once = int64_t{num_multiprocessors(device)} * resident(shared, kNoisy);
  const auto grid = [&](int64_t tasks, int size) {
    const int64_t most = (at_once + size - 1) / size;
    return dim3(static_cast<unsigned>((listed && tasks > most ? most : tasks) * size));
  };
  if (clusters) {
    const Shape shape{grid(call.num_rows, call.cluster), kThreads, shared, call.cluster, listed};
    return launch("unmask_step", shape, stream, search_kernel<T, kNeed, kNoisy>, call);
  }
  call.cluster = 1;
  launch("unmask_step", {grid(call.num_rows * call.cut.count, 1), kThreads, shared}, stream, scan_kernel<T, kNeed, kNoisy>, call);
  launch("unmask_step", {grid(call.num_rows, 1), kThreads, shared}, stream, finish_kernel<T, kNeed>, call);
}

int element_bytes(int dtype) { return dtype == 0 ? 4 : 2; }

}  // namespace

// Bytes of scratch memory that unmask_step needs: candidates, list, partial results.
int64_t unmask_step_workspace(int64_t rows, int64_t vocab, int dtype, int device, uintptr_t) {
  const int64_t partials = has_clusters(device) ? 0 : rows * cut(vocab, element_bytes(dtype)).count;
  return (2 * rows + 1) * 8 + partials * static_cast<int64_t>(sizeof(Partial));
}

// As the CPU kernel of csrc/unmask_step.cpp; workspace: unmask_step_workspace() bytes, 8-byte aligned.
void unmask_step(const void* logits, int64_t stride_b, int64_t stride_l, int dtype, const int64_t* tokens,
                 const bool* eligible, int64_t num_unmask, const int64_t* num_unmask_rows, const int64_t* suppress,
                 int64_t num_suppress, const int64_t* row_ids, int64_t* out, bool* committed, float* score,
                 float* logprob, float* entropy, int64_t batch, int64_t length, int64_t vocab, int64_t mask_id,
                 double temperature, int confidence, bool has_threshold, float threshold, bool gumbel,
                 uint64_t token_key, uint64_t score_key, uint64_t gumbel_key, int64_t* workspace, int device,
                 uintptr_t stream) {
  if (batch == 0 || length == 0) return;
  const DeviceGuard guard(device);
  const bool draws = temperature > 0, tempered = draws && temperature != 1;
  double inverse = tempered ? 1 / temperature : 1;
  if (inverse > 1e30) inverse = 1e30;  // a float; any difference of logits is already infinite
  const int64_t rows = batch * length;
  int64_t* const candidate = workspace;
  int64_t* const list = rows > kDirectRows ? candidate + rows : nullptr;
  auto* const partials = reinterpret_cast<Partial*>(candidate + 2 * rows + 1);
  Call call{logits, {length, stride_b, stride_l}, tokens, eligible, mask_id, rows, vocab, suppress, num_suppress, row_ids,
            temperature, inverse, static_cast<float>(inverse), static_cast<float>(inverse / kLn2), confidence, draws,
            draws && gumbel, token_key, score_key, gumbel_key, cut(vocab, element_bytes(dtype)), 1, list, partials,
            candidate, score, logprob, entropy};
  while (call.cluster < 8 && call.cluster < call.cut.count) call.cluster *= 2;
  if (list)
    launch("unmask_step", {dim3(1), kListThreads, kListThreads / 32 * sizeof(int)}, stream, list_kernel, call, list);
  with_dtype(dtype, [&](auto x) {
    using T = decltype(x);
    const bool both = tempered && confidence != kRandom;
    if (call.gumbel) return both ? launch_search<T, kBoth, true>(call, device, stream)
                                 : launch_search<T, kPlain, true>(call, device, stream);
    return both ? launch_search<T, kBoth, false>(call, device, stream)
                : launch_search<T, kPlain, false>(call, device, stream);
  });
  const Commit commit{num_unmask_rows, num_unmask, has_threshold, threshold, out, committed};
  launch_commit(call, commit, batch, has_clusters(device), stream);
}

}  // namespace igpo::cuda
