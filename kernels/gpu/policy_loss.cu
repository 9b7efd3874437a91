// The clipped policy loss, its metrics and its gradient (igpo/ops/policy_loss.py): 13 bytes read per token (17 with a
// reference policy) and 4 written.
//
// Small batches take one launch: a cluster of eight blocks, which share the number of tokens and the sums of rows through
// shared memory. Others, and GPUs without clusters, take two or three: tokens (for "token-mean"), rows, sums of rows.
// Either way a row is summed in float64 by the same lanes, and rows in the same order: the same bits.
#include "common.cuh"
#include "cuda_ops.h"

namespace igpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kCluster = 8;
constexpr int kSums = 5;                // per row: loss, clipped, kl, ratio, tokens
constexpr int kParts = 256;             // partial numbers of tokens
constexpr int64_t kLongRow = 512;       // beyond it a block takes a row, else a warp: by length, so that bits do not depend on B
constexpr int64_t kOneLaunch = 65536;   // tokens that eight multiprocessors finish before more could be started (chosen)
constexpr int64_t kOneLaunchRows = 1024;  // whose sums fit in 40 KB of shared memory
constexpr float kMaxLogRatio = 20.0f;

enum Aggregate { kTokenMean, kSequenceMean, kConstant };

struct Batch {
  const float *logprob, *old_logprob, *advantages, *ref;  // ref may be null
  const bool* mask;
  float* grad;  // contiguous
  int64_t logprob_stride, old_stride, advantage_stride, ref_stride, mask_stride;
  int64_t rows, length;
  float low, high, kl_coef, scale;
  int kl, aggregate;
  bool sequence;
};

struct Out {
  float *loss, *clip_fraction, *kl, *ratio_mean;
};

// Four tokens: what a lane takes at once, in one access where the address allows it.
struct Four {
  float at[4];
};
IGPO_DEVICE Four load_four(const float* p, int64_t left) {
  Four out{};
  if (left >= 4 && is_aligned16(p)) {
    const Pack<float> pack = *reinterpret_cast<const Pack<float>*>(p);
#pragma unroll
    for (int j = 0; j < 4; ++j) out.at[j] = pack.at[j];
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < left) out.at[j] = p[j];
  }
  return out;
}
IGPO_DEVICE void store_four(float* p, const Four& value, int64_t left) {
  if (left >= 4 && is_aligned16(p)) {
    *reinterpret_cast<Pack<float>*>(p) = {{value.at[0], value.at[1], value.at[2], value.at[3]}};
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < left) p[j] = value.at[j];
  }
}
// Bit j: the mask of token j.
IGPO_DEVICE unsigned load_mask(const bool* p, int64_t left) {
  unsigned bits = 0;
  if (left >= 4 && (reinterpret_cast<uintptr_t>(p) & 3) == 0) {
    const uint32_t bytes = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
    for (int j = 0; j < 4; ++j) bits |= ((bytes >> (8 * j)) & 0xff) ? 1u << j : 0u;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < left && p[j]) bits |= 1u << j;
  }
  return bits;
}

// Who works on a row: a warp, or (kWide) a block.
template <bool kWide>
struct Team {
  double* scratch;  // kThreads / 32 * kSums numbers of shared memory
  IGPO_DEVICE int64_t lane() const { return kWide ? threadIdx.x : lane_id(); }
  IGPO_DEVICE int64_t size() const { return kWide ? kThreads : 32; }
  IGPO_DEVICE double sum(double value) const {
    if constexpr (kWide)
      return block_reduce(value, scratch, Sum{});
    else
      return warp_reduce(value, Sum{});
  }
};

// The sums over the block of each thread's, in `out`, written by one thread; scratch is free when the call returns.
IGPO_DEVICE void block_sums(double (&sums)[kSums], double* scratch, double* out) {
#pragma unroll
  for (int j = 0; j < kSums; ++j) {
    sums[j] = warp_reduce(sums[j], Sum{});
    if (lane_id() == 0) scratch[warp_id() * kSums + j] = sums[j];
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int j = 0; j < kSums; ++j) {
      double all = 0;
      for (int w = 0; w < kWarps; ++w) all += scratch[w * kSums + j];
      out[j] = all;
    }
  __syncthreads();
}

IGPO_DEVICE float bounded(float x) { return x < -kMaxLogRatio ? -kMaxLogRatio : x > kMaxLogRatio ? kMaxLogRatio : x; }

struct Term {
  float value, slope, ratio;  // slope: d value / d log ratio
  bool clipped;
};

IGPO_DEVICE Term surrogate(const Batch& batch, float log_ratio, float advantage) {
  const float ratio = expf(bounded(log_ratio)), least = 1.0f - batch.low, most = 1.0f + batch.high;
  const float inside = ratio < least ? least : ratio > most ? most : ratio;
  const float plain = ratio * advantage, limited = inside * advantage;
  const bool clipped = limited < plain;
  const float slope = fabsf(log_ratio) < kMaxLogRatio ? -plain : 0.0f;
  return {clipped ? -limited : -plain, clipped ? 0.0f : slope, ratio, clipped};
}

// The estimate of the KL divergence at one token and its slope; 0 k1, 1 k2, 2 k3.
IGPO_DEVICE float divergence(float delta, int kl, float& slope) {
  if (kl == 0) {
    slope = 1.0f;
    return delta;
  }
  if (kl == 1) {
    slope = delta;
    return 0.5f * delta * delta;
  }
  const float rise = expm1f(bounded(-delta));
  slope = fabsf(delta) < kMaxLogRatio ? -rise : 1.0f;
  return rise + delta;
}

IGPO_DEVICE int64_t count_row(const Batch& batch, int64_t row, int64_t lane, int64_t team) {
  const bool* mask = batch.mask + row * batch.mask_stride;
  int64_t tokens = 0;
  for (int64_t i = 4 * lane; i < batch.length; i += 4 * team) tokens += __popc(load_mask(mask + i, batch.length - i));
  return tokens;
}

// Gradient of a row, and its sums into `out`. tokens: of the batch, for kTokenMean.
template <bool kWide>
IGPO_DEVICE void do_row(const Batch& batch, int64_t row, double tokens, double* out, const Team<kWide>& team) {
  const float* logprob = batch.logprob + row * batch.logprob_stride;
  const float* old = batch.old_logprob + row * batch.old_stride;
  const float* ref = batch.ref ? batch.ref + row * batch.ref_stride : nullptr;
  const bool* mask = batch.mask + row * batch.mask_stride;
  float* grad = batch.grad + row * batch.length;
  const float advantage = batch.advantages[row * batch.advantage_stride];
  const int64_t length = batch.length, step = 4 * team.size();

  float weight = batch.scale;
  Term term{};
  if (batch.sequence || batch.aggregate == kSequenceMean) {
    const double mine = static_cast<double>(count_row(batch, row, team.lane(), team.size()));
    const double counted = team.sum(mine), count = counted > 0 ? counted : 1;
    if (batch.aggregate == kSequenceMean) weight = 1.0f / (static_cast<float>(count) * static_cast<float>(batch.rows));
    if (batch.sequence) {
      double sum = 0;
      for (int64_t i = 4 * team.lane(); i < length; i += step) {
        const unsigned on = load_mask(mask + i, length - i);
        if (on == 0) continue;
        const Four now = load_four(logprob + i, length - i), before = load_four(old + i, length - i);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (on >> j & 1) sum += static_cast<double>(now.at[j] - before.at[j]);
      }
      // n tokens carry the term and each holds 1/n of its slope: n * (1/n) = 1
      term = surrogate(batch, static_cast<float>(team.sum(sum) / count), advantage);
    }
  }
  if (batch.aggregate == kTokenMean) weight = 1.0f / static_cast<float>(tokens > 0 ? tokens : 1);

  double loss = 0, kl = 0, ratio = 0;
  int clipped = 0, counted = 0;
  for (int64_t i = 4 * team.lane(); i < length; i += step) {
    const int64_t left = length - i;
    const unsigned on = load_mask(mask + i, left);
    Four gradient{};
    if (on) {  // elsewhere nothing is looked at, -inf and NaN included
      const Four now = load_four(logprob + i, left);
      const Four before = batch.sequence ? Four{} : load_four(old + i, left);
      const Four reference = ref ? load_four(ref + i, left) : Four{};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(on >> j & 1)) continue;
        if (!batch.sequence) term = surrogate(batch, now.at[j] - before.at[j], advantage);
        float slope = 0, estimate = 0;
        if (ref) estimate = divergence(now.at[j] - reference.at[j], batch.kl, slope);
        gradient.at[j] = weight * (term.slope + batch.kl_coef * slope);
        loss += static_cast<double>(weight * (term.value + batch.kl_coef * estimate));
        kl += static_cast<double>(estimate);
        ratio += static_cast<double>(term.ratio);
        clipped += term.clipped;
        ++counted;
      }
    }
    store_four(grad + i, gradient, left);
  }
  double sums[kSums] = {loss, static_cast<double>(clipped), kl, ratio, static_cast<double>(counted)};
  if constexpr (kWide) {
    block_sums(sums, team.scratch, out);
  } else {
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      sums[j] = warp_reduce(sums[j], Sum{});
      if (lane_id() == 0) out[j] = sums[j];
    }
  }
}

// The loss and the metrics from the sums of rows, by one block.
IGPO_DEVICE void finish(const double* rows, int64_t number, double* scratch, const Out& out) {
  double sums[kSums] = {}, *all = scratch + kWarps * kSums;
  for (int64_t row = threadIdx.x; row < number; row += kThreads)
    for (int j = 0; j < kSums; ++j) sums[j] += rows[row * kSums + j];
  block_sums(sums, scratch, all);
  if (threadIdx.x != 0) return;
  const double tokens = all[4] > 0 ? all[4] : 1;
  *out.loss = static_cast<float>(all[0]);
  *out.clip_fraction = static_cast<float>(all[1] / tokens);
  *out.kl = static_cast<float>(all[2] / tokens);
  *out.ratio_mean = static_cast<float>(all[3] / tokens);
}

constexpr int kScratch = (kWarps + 1) * kSums;  // also the 33 numbers of block_reduce
static_assert(kScratch >= 33);

template <bool kWide>
__global__ void __launch_bounds__(kThreads) policy_loss_kernel(Batch batch, Out out) {
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  double *tokens = scratch + kScratch, *sums = tokens + 1;  // of this block's rows; of every row, in the first block
  const int64_t teams = kWide ? kCluster : kCluster * kWarps;
  const int64_t first = kWide ? cluster_rank() : cluster_rank() * kWarps + warp_id();
  const Team<kWide> team{scratch};
  double all = 0;
  if (batch.aggregate == kTokenMean) {
    int64_t mine = 0;
    for (int64_t row = first; row < batch.rows; row += teams) mine += count_row(batch, row, team.lane(), team.size());
    const double here = block_reduce(static_cast<double>(mine), scratch, Sum{});
    if (threadIdx.x == 0) *tokens = here;
  }
  cluster_sync();  // without it a block could write to the shared memory of one that has not begun
  if (batch.aggregate == kTokenMean)
    for (int rank = 0; rank < kCluster; ++rank) all += *in_cluster_block(tokens, rank);
  for (int64_t row = first; row < batch.rows; row += teams)
    do_row(batch, row, all, in_cluster_block(sums, 0) + row * kSums, team);
  cluster_sync();
  if (cluster_rank() == 0) finish(sums, batch.rows, scratch, out);
}

__global__ void __launch_bounds__(kThreads) policy_loss_tokens_kernel(Batch batch, double* parts) {
  int64_t mine = 0;
  for (int64_t row = blockIdx.x; row < batch.rows; row += gridDim.x) mine += count_row(batch, row, threadIdx.x, kThreads);
  const double here = block_reduce(static_cast<double>(mine), reinterpret_cast<double*>(shared_memory()), Sum{});
  if (threadIdx.x == 0) parts[blockIdx.x] = here;
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads)
    policy_loss_rows_kernel(Batch batch, const double* __restrict__ parts, int num_parts, double* __restrict__ sums) {
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  double tokens = 0;
  if (batch.aggregate == kTokenMean)
    tokens = block_reduce(static_cast<int>(threadIdx.x) < num_parts ? parts[threadIdx.x] : 0.0, scratch, Sum{});
  const int64_t row = kWide ? int64_t{blockIdx.x} : int64_t{blockIdx.x} * kWarps + warp_id();
  if (row < batch.rows) do_row(batch, row, tokens, sums + row * kSums, Team<kWide>{scratch});
}

__global__ void __launch_bounds__(kThreads)
    policy_loss_finish_kernel(const double* __restrict__ sums, int64_t rows, Out out) {
  finish(sums, rows, reinterpret_cast<double*>(shared_memory()), out);
}

template <bool kWide>
void run(const Batch& batch, const Out& out, double* workspace, int device, uintptr_t stream) {
  const size_t scratch = kScratch * sizeof(double);
  if (capability(device) >= 90 && batch.rows * batch.length <= kOneLaunch && batch.rows <= kOneLaunchRows) {
    const size_t shared = scratch + (1 + static_cast<size_t>(batch.rows) * kSums) * sizeof(double);
    launch("policy_loss", {dim3(kCluster), kThreads, shared, kCluster}, stream, policy_loss_kernel<kWide>, batch, out);
    return;
  }
  double* sums = workspace + kParts;
  const int parts = static_cast<int>(batch.rows < kParts ? batch.rows : kParts);
  if (batch.aggregate == kTokenMean)
    launch("policy_loss_tokens", {dim3(static_cast<unsigned>(parts)), kThreads, scratch}, stream,
           policy_loss_tokens_kernel, batch, workspace);
  const int64_t blocks = kWide ? batch.rows : (batch.rows + kWarps - 1) / kWarps;
  launch("policy_loss_rows", {dim3(static_cast<unsigned>(blocks)), kThreads, scratch}, stream,
         policy_loss_rows_kernel<kWide>, batch, workspace, parts, sums);
  launch("policy_loss_finish", {dim3(1), kThreads, scratch}, stream, policy_loss_finish_kernel, sums, batch.rows, out);
}

}  // namespace

// logprob, old_logprob, ref_logprob (or null), token_mask: (rows, length), rows *_stride elements apart; advantages: (rows,).
// grad: contiguous. aggregate: 0 token-mean, 1 sequence-mean, 2 every term is multiplied by scale. workspace: rows * 5 + 256.
void policy_loss(const float* logprob, const float* old_logprob, const float* advantages, const bool* token_mask,
                 const float* ref_logprob, float* grad, float* loss, float* clip_fraction, float* divergence,
                 float* ratio_mean, double* workspace, int64_t rows, int64_t length, int64_t logprob_stride,
                 int64_t old_stride, int64_t advantage_stride, int64_t mask_stride, int64_t ref_stride, double low,
                 double high, bool sequence, double kl_coef, int kl, int aggregate, double scale, int device,
                 uintptr_t stream) {
  const DeviceGuard guard(device);
  const Batch batch{logprob, old_logprob, advantages, ref_logprob, token_mask, grad, logprob_stride, old_stride,
                    advantage_stride, ref_stride, mask_stride, rows, length, static_cast<float>(low),
                    static_cast<float>(high), static_cast<float>(kl_coef), static_cast<float>(scale), kl, aggregate, sequence};
  const Out out{loss, clip_fraction, divergence, ratio_mean};
  if (length > kLongRow)
    run<true>(batch, out, workspace, device, stream);
  else
    run<false>(batch, out, workspace, device, stream);
}

}  // namespace igpo::cuda
