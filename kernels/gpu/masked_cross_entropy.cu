// Weighted cross-entropy (igpo/ops/masked_cross_entropy.py): every row that counts is read once, and its gradient, where it
// is wanted, is written while the row is on the chip.
#include "cuda_ops.h"
#include "row_kernels.cuh"

namespace igpo::cuda {
namespace {

// dx_v = c * (p_v - (v == y)),  c = upstream * weight / divisor.
struct CrossEntropy {
  static constexpr bool kDot = false;
  static constexpr float scale2 = kLog2e;
  const float* weights;
  const int64_t* divisor;
  const float* upstream;  // or null: 1
  int64_t upstream_stride;
  float *row_loss, *row_max, *row_log_sum;

  IGPO_DEVICE void finish(int64_t row, const Stats& s, float chosen) const {
    const float log_sum = log_sum_of(s);
    const float loss = __fsub_rn(log_sum, __fsub_rn(chosen, s.max));
    row_max[row] = s.max;
    row_log_sum[row] = log_sum;
    row_loss[row] = weights ? __fmul_rn(weights[row], loss) : loss;
  }
  IGPO_DEVICE void skip(int64_t row) const { row_loss[row] = row_max[row] = row_log_sum[row] = 0.0f; }

  IGPO_DEVICE float max(int64_t row) const { return row_max[row]; }
  IGPO_DEVICE float log_sum(int64_t row) const { return row_log_sum[row]; }
  IGPO_DEVICE RowGradient gradient(int64_t row, int64_t target, int64_t vocab, float log_sum) const {
    double factor = upstream ? upstream[row * upstream_stride] : 1.0;
    if (weights) factor *= weights[row];
    if (divisor) factor /= static_cast<double>(*divisor);
    const bool token = target >= 0 && target < vocab;
    const float c = token ? static_cast<float>(factor) : __uint_as_float(0x7fc00000u);
    return {__fmul_rn(c, expf(-log_sum)), 0.0f, -c};
  }
};

template <bool kGradient>
void forward(const char* name, const void* logits, const RowSet& set, const CrossEntropy& op, float* parts, void* out,
             const Rows& out_at, int dtype, int out_dtype, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto out_tag) {
      launch_rows<kGradient>(name, static_cast<const T*>(logits), set, op, reinterpret_cast<Stats*>(parts),
                             static_cast<decltype(out_tag)*>(out), out_at, device, stream);
    };
    if constexpr (kGradient) with_out_dtype<T>(dtype, out_dtype, run);
    else run(T{});
  });
}

// grad *= *factor, in place, where rows count and *factor is not 1. Blocks stride over the parts of rows: a factor of 1
// costs one short wave.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* grad, const float* factor, RowSet set, Cut cut) {
  const float by = *factor;
  if (by == 1.0f) return;
  const int64_t units = set.rows * cut.slices;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t row = unit / cut.slices;
    if (!set.counts(row)) continue;
    const int slice = static_cast<int>(unit % cut.slices);
    T* x = grad + set.at.offset(row) + int64_t{slice} * cut.length;
    const Part<T, kThreads> part(x, length_of(cut, set.vocab, slice), nullptr);
#pragma unroll 4
    for (int i = part.thread(); i < part.packs(); i += kThreads) {
      const Pack<T> p = part.read(i);
      write<T>(x, part.count, part.aligned, i, [&](int j) { return to_float(p.at[j]) * by; });
    }
  }
}

constexpr int kSumThreads = 1024;

// In float64: thread t adds values t, t + kSumThreads, ...; then a fixed tree.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const float* values, const int64_t* divisor, float* out, int64_t rows) {
  wait_for_previous();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kSumThreads) sum += static_cast<double>(values[i]);
  sum = block_reduce(sum, reinterpret_cast<double*>(shared_memory()), Sum());
  if (threadIdx.x == 0) *out = static_cast<float>(divisor ? sum / static_cast<double>(*divisor) : sum);
}

}  // namespace

void masked_cross_entropy(const void* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                          const int64_t* targets, const float* weights, float* row_loss, float* row_max, float* log_sum,
                          float* parts, int64_t rows, int64_t vocab, int64_t ignore_index, int dtype, int device,
                          uintptr_t stream) {
  const RowSet set{targets, weights, rows, vocab, ignore_index, {inner, outer_stride, inner_stride}};
  const CrossEntropy op{weights, nullptr, nullptr, 0, row_loss, row_max, log_sum};
  forward<false>("masked_cross_entropy", logits, set, op, parts, nullptr, set.at, dtype, dtype, device, stream);
}

void masked_cross_entropy_with_gradient(const void* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                                        const int64_t* targets, const float* weights, const int64_t* divisor,
                                        float* row_loss, float* row_max, float* log_sum, float* parts, void* out,
                                        int64_t out_inner, int64_t out_outer_stride, int64_t out_inner_stride,
                                        int64_t rows, int64_t vocab, int64_t ignore_index, int dtype, int out_dtype,
                                        int device, uintptr_t stream) {
  const RowSet set{targets, weights, rows, vocab, ignore_index, {inner, outer_stride, inner_stride}};
  const CrossEntropy op{weights, divisor, nullptr, 0, row_loss, row_max, log_sum};
  forward<true>("masked_cross_entropy_with_gradient", logits, set, op, parts, out,
                {out_inner, out_outer_stride, out_inner_stride}, dtype, out_dtype, device, stream);
}

// grad_stride: 0 when all rows share one grad_loss.
void masked_cross_entropy_backward(const float* grad_loss, int64_t grad_stride, const void* logits, int64_t inner,
                                   int64_t outer_stride, int64_t inner_stride, const int64_t* targets,
                                   const float* weights, const int64_t* divisor, const float* row_max,
                                   const float* log_sum, void* out, int64_t out_inner, int64_t out_outer_stride,
                                   int64_t out_inner_stride, int64_t rows, int64_t vocab, int64_t ignore_index, int dtype,
                                   int out_dtype, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const RowSet set{targets, weights, rows, vocab, ignore_index, {inner, outer_stride, inner_stride}};
  const CrossEntropy op{weights, divisor, grad_loss, grad_stride, nullptr, const_cast<float*>(row_max),
                        const_cast<float*>(log_sum)};
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    with_out_dtype<T>(dtype, out_dtype, [&](auto out_tag) {
      launch_gradient("masked_cross_entropy_backward", static_cast<const T*>(logits), set, op,
                      static_cast<decltype(out_tag)*>(out), Rows{out_inner, out_outer_stride, out_inner_stride}, stream);
    });
  });
}

// grad: rows x vocab, contiguous.
void masked_cross_entropy_scale(void* grad, const float* factor, const int64_t* targets, const float* weights,
                                int64_t rows, int64_t vocab, int64_t ignore_index, int dtype, int device,
                                uintptr_t stream) {
  const DeviceGuard guard(device);
  const RowSet set{targets, weights, rows, vocab, ignore_index, {1, vocab, 0}};
  const Cut c = cut(vocab);
  const int64_t units = rows * c.slices, most = int64_t{8} * num_multiprocessors(device);
  const Shape shape{dim3(static_cast<unsigned>(units < most ? units : most)), kThreads};
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    launch("masked_cross_entropy_scale", shape, stream, scale_kernel<T>, static_cast<T*>(grad), factor, set, c);
  });
}

// out = Σ values / divisor.
void sum_rows(const float* values, const int64_t* divisor, float* out, int64_t rows, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  // begins while the rows are finished, where the device can do that
  const Shape shape{dim3(1), kSumThreads, 33 * sizeof(double), 1, capability(device) >= 90};
  launch("sum_rows", shape, stream, sum_kernel, values, divisor, out, rows);
}

}  // namespace igpo::cuda
