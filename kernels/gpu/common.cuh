// What every CUDA kernel of igpo shares: launching, element types, vector memory access, reductions, random numbers.
//
// The same sources are compiled as C++ against tests/cuda/emulator.h (IGPO_EMULATE), which runs them on a CPU, thread by
// thread, so that their logic is tested where there is no GPU. That sets two rules: shared memory is taken from
// `shared_memory()` (never a __shared__ variable), and what has no C++ spelling goes through a function of this file.
#pragma once

#include <cstdint>

#if defined(IGPO_EMULATE)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace igpo::cuda {

// ---- host ----------------------------------------------------------------------------------------------------------

// Throws std::runtime_error("<kernel>: <what CUDA says>") unless error is cudaSuccess.
void check(cudaError_t error, const char* kernel);
// Major * 10 + minor of the compute capability, e.g. 90; asked once per device.
int capability(int device);
int num_multiprocessors(int device);

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_, device_;
};

struct Shape {
  dim3 grid;
  int threads;
  size_t shared = 0;       // bytes of dynamic shared memory
  int cluster = 1;         // CTAs of a cluster, along x; more than 1 needs compute capability 9.0
  bool dependent = false;  // may begin while the kernel before it in the stream ends (wait_for_previous() orders them)
};

// kernel(args...) on the current device. Does nothing for an empty grid.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Shape& shape, uintptr_t stream, void (*kernel)(Parameters...), Arguments... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
#if defined(IGPO_EMULATE)
  emulator::run(name, shape.grid, shape.threads, shape.shared, shape.cluster, [&] { kernel(Parameters(args)...); });
#else
  if (shape.shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared)), name);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...), name);
#endif
}

// ---- element types -------------------------------------------------------------------------------------------------

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// body(T{}) with the element type that the tag of igpo/ops/_native.py names.
template <class Body>
void with_dtype(int dtype, Body&& body) {
  if (dtype == 0) return body(float{});
  if (dtype == 1) return body(Bf16{});
  body(Fp16{});
}

#define IGPO_DEVICE __device__ __forceinline__

IGPO_DEVICE float to_float(float x) { return x; }
IGPO_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
IGPO_DEVICE float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
IGPO_DEVICE T from_float(float x);  // rounds to nearest even
template <>
IGPO_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
IGPO_DEVICE Bf16 from_float<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
IGPO_DEVICE Fp16 from_float<Fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// ---- memory --------------------------------------------------------------------------------------------------------

// 16 bytes of elements: what one thread reads or writes at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  T at[size];
};

template <class T>
IGPO_DEVICE bool is_aligned16(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// Reads or writes that will not be repeated: the caches keep what is needed instead.
template <class T>
IGPO_DEVICE Pack<T> load_streaming(const Pack<T>* p) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(p));
  Pack<T> out;
  __builtin_memcpy(&out, &raw, 16);
  return out;
}
template <class T>
IGPO_DEVICE void store_streaming(Pack<T>* p, const Pack<T>& value) {
  uint4 raw;
  __builtin_memcpy(&raw, &value, 16);
  __stcs(reinterpret_cast<uint4*>(p), raw);
}

// Dynamic shared memory of the block, 16-byte aligned.
IGPO_DEVICE unsigned char* shared_memory() {
#if defined(IGPO_EMULATE)
  return emulator::shared_memory();
#else
  extern __shared__ uint4 igpo_shared[];
  return reinterpret_cast<unsigned char*>(igpo_shared);
#endif
}

// Where the rows of a tensor (…, V) lie: row r begins at (r / inner) * outer_stride + (r % inner) * inner_stride elements.
struct Rows {
  int64_t inner, outer_stride, inner_stride;
  IGPO_DEVICE int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

// ---- arithmetic ----------------------------------------------------------------------------------------------------

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;

// 2^x to two units in the last place; 0 below 2^-126.
IGPO_DEVICE float exp2_fast(float x) {
#if defined(IGPO_EMULATE)
  return x < -126.0f ? 0.0f : ::exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
IGPO_DEVICE float exp_fast(float x) { return exp2_fast(x * kLog2e); }

// ---- threads -------------------------------------------------------------------------------------------------------

constexpr unsigned kAllLanes = 0xffffffffu;
IGPO_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31); }
IGPO_DEVICE int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

struct Sum {
  template <class T>
  IGPO_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // the other one where one is NaN
  IGPO_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The reduction of every lane's value, in every lane; a butterfly, so the order of operations is fixed.
template <class T, class Combine>
IGPO_DEVICE T warp_reduce(T value, Combine combine) {
  for (int offset = 16; offset > 0; offset >>= 1) value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// The same over the block, in every thread; blockDim.x a multiple of 32. scratch: 33 T of shared memory, free to reuse when
// the call returns.
template <class T, class Combine>
IGPO_DEVICE T block_reduce(T value, T* scratch, Combine combine) {
  value = warp_reduce(value, combine);
  const int warps = static_cast<int>(blockDim.x >> 5);
  if (lane_id() == 0) scratch[warp_id()] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    T all = scratch[0];
    for (int w = 1; w < warps; ++w) all = combine(all, scratch[w]);
    scratch[32] = all;
  }
  __syncthreads();
  const T all = scratch[32];
  __syncthreads();
  return all;
}

// Clusters (compute capability 9.0). A launch with Shape::cluster = 1 is a cluster of one.
IGPO_DEVICE int cluster_rank() {
#if defined(IGPO_EMULATE)
  return emulator::cluster_rank();
#elif __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
// Barrier over the cluster; what was written to shared memory before it is seen after it.
IGPO_DEVICE void cluster_sync() {
#if defined(IGPO_EMULATE)
  emulator::cluster_sync();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// The shared-memory address `p` of this block, in block `rank` of the cluster.
template <class T>
IGPO_DEVICE T* in_cluster_block(T* p, int rank) {
#if defined(IGPO_EMULATE)
  return emulator::in_cluster_block(p, rank);
#elif __CUDA_ARCH__ >= 900
  T* out;
  asm("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"(p), "r"(rank));
  return out;
#else
  return p;
#endif
}

// With Shape::dependent: waits until the kernel before this one has finished and its writes are seen.
IGPO_DEVICE void wait_for_previous() {
#if !defined(IGPO_EMULATE) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets a dependent kernel be launched; its wait_for_previous() still waits for this one to finish.
IGPO_DEVICE void let_next_begin() {
#if !defined(IGPO_EMULATE) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- random numbers (igpo/ops/_philox.py, bit for bit) ---------------------------------------------------------------

struct Words {
  uint32_t w[4];
};

IGPO_DEVICE Words philox(uint64_t key, uint32_t position, uint32_t index, uint64_t row_id) {
  uint32_t c0 = position, c1 = index, c2 = static_cast<uint32_t>(row_id), c3 = static_cast<uint32_t>(row_id >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 52 random bits -> (0, 1), exact in float64.
IGPO_DEVICE double uniform53(uint32_t high, uint32_t low) {
  return (static_cast<double>((uint64_t{high} << 20) | (low >> 12)) + 0.5) * 0x1p-52;
}

}  // namespace igpo::cuda
