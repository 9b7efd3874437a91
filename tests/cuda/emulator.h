// Runs CUDA kernels on a CPU: every thread of a block (of a cluster) is a fiber, and fibers change only where the kernel
// waits for others. It shows wrong indices, missing or diverged barriers and wrong arithmetic, not speed or memory order.
//
// Shared memory is filled with 0xff before each block, fibers run in ascending or (IGPO_EMULATE_ORDER=reverse) descending
// order, so that what a kernel reads before it is written differs between the two. A kernel that waits for
// a thread that never comes throws instead of hanging.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

// Where a fiber stands. switch_to(from, to): leaves `from`, continues `to`; start(context, stack, size, entry): a new one.
#if defined(__x86_64__)  // without the system calls of swapcontext: five times faster
struct Context {
  void* stack_pointer;
};
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(Context* from, const Context* to);
inline void switch_to(Context& from, Context& to) { emulator_switch(&from, &to); }
inline void start(Context& context, char* stack, size_t size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
  top[-1] = nullptr;  // entry returns nowhere; it finds the stack aligned as after a call
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // the registers emulator_switch restores
  context.stack_pointer = top - 8;
}
#else
struct Context {
  ucontext_t u;
};
inline void switch_to(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
inline void start(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.u);
  context.u.uc_stack.ss_sp = stack;
  context.u.uc_stack.ss_size = size;
  context.u.uc_link = nullptr;
  makecontext(&context.u, entry, 0);
}
#endif

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

struct Warp {
  Barrier barrier;
  int live = 0;
  uint64_t slots[2][kWarp];
};

struct Block {
  dim3 index;
  int live = 0, rank = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<uint4[]> shared;
};

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  dim3 index;
  bool done = false;
  Warp& warp() const { return block->warps[index.x / kWarp]; }
};

struct State {
  Context scheduler;
  std::vector<Thread> threads;
  std::vector<Block> blocks;  // of the cluster that runs
  Thread* current = nullptr;
  dim3 grid, block;
  int cluster = 1, live = 0;
  Barrier cluster_barrier;
  uint64_t progress = 0;
  std::function<void()> body;
  std::string failure;
};
inline State state;

inline void yield() { switch_to(state.current->context, state.scheduler); }

// Waits until `live` threads have arrived. A thread that ends counts as arrived, as on the device.
inline void wait(Barrier& barrier, const int& live) {
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  ++state.progress;
  while (barrier.generation == generation) {
    if (barrier.arrived >= live) {
      barrier.arrived = 0;
      ++barrier.generation;
      ++state.progress;
      return;
    }
    yield();
  }
}

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(state.current->block->shared.get()); }
inline int cluster_rank() { return state.current->block->rank; }
inline void cluster_sync() { wait(state.cluster_barrier, state.live); }

template <class T>
T* in_cluster_block(T* p, int rank) {
  auto* own = reinterpret_cast<unsigned char*>(state.current->block->shared.get());
  auto* other = reinterpret_cast<unsigned char*>(state.blocks[static_cast<size_t>(rank)].shared.get());
  return reinterpret_cast<T*>(other + (reinterpret_cast<unsigned char*>(p) - own));
}

// The value that lane `source` of the warp gives. Two sets of slots: nobody is more than one exchange ahead.
template <class T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= 8, "shuffles are of up to 8 bytes");
  Warp& warp = state.current->warp();
  uint64_t* slots = warp.slots[warp.barrier.generation & 1];
  std::memcpy(&slots[state.current->index.x % kWarp], &value, sizeof(T));
  wait(warp.barrier, warp.live);
  std::memcpy(&value, &slots[source % kWarp], sizeof(T));
  return value;
}

inline void entry() {
  Thread& thread = *state.current;
  state.body();
  thread.done = true;
  --thread.block->live;
  --thread.warp().live;
  --state.live;
  ++state.progress;
  yield();
}

inline void start(Thread& thread) {
  if (!thread.stack) thread.stack.reset(new char[kStack]);
  start(thread.context, thread.stack.get(), kStack, &entry);
  thread.done = false;
}

// All threads of the blocks [first, first + cluster) along x, to their ends.
inline void run_cluster(const char* name, dim3 first, size_t shared) {
  const int threads = static_cast<int>(state.block.x);
  const bool reverse = std::getenv("IGPO_EMULATE_ORDER") && !std::strcmp(std::getenv("IGPO_EMULATE_ORDER"), "reverse");
  state.blocks.clear();
  state.blocks.resize(static_cast<size_t>(state.cluster));
  state.cluster_barrier = {};
  state.live = state.cluster * threads;
  for (int rank = 0; rank < state.cluster; ++rank) {
    Block& block = state.blocks[static_cast<size_t>(rank)];
    block.index = dim3(first.x + static_cast<unsigned>(rank), first.y, first.z);
    block.rank = rank;
    block.live = threads;
    block.warps.resize(static_cast<size_t>((threads + kWarp - 1) / kWarp));
    block.shared.reset(new uint4[shared / 16 + 1]);
    std::memset(static_cast<void*>(block.shared.get()), 0xff, shared);
    for (int i = 0; i < threads; ++i) {
      Thread& thread = state.threads[static_cast<size_t>(rank * threads + i)];
      thread.block = &block;
      thread.index = dim3(static_cast<unsigned>(i), 0, 0);
      ++thread.warp().live;
      start(thread);
    }
  }
  while (state.live > 0) {
    const uint64_t before = state.progress;
    const int all = state.cluster * threads;
    for (int i = 0; i < all; ++i) {
      Thread& thread = state.threads[static_cast<size_t>(reverse ? all - 1 - i : i)];
      if (thread.done) continue;
      state.current = &thread;
      switch_to(state.scheduler, thread.context);
    }
    if (state.progress == before)
      throw std::runtime_error(std::string(name) + ": threads wait for others that will not come (diverged barrier)");
  }
}

template <class Body>
void run(const char* name, dim3 grid, int threads, size_t shared, int cluster, Body&& body) {
  if (threads < 1 || threads > 1024) throw std::runtime_error(std::string(name) + ": 1 to 1024 threads per block");
  if (shared > 227 * 1024) throw std::runtime_error(std::string(name) + ": more shared memory than a block can have");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error(std::string(name) + ": grid.y and grid.z are 16-bit");
  if (cluster < 1 || grid.x % static_cast<unsigned>(cluster)) throw std::runtime_error(std::string(name) + ": cluster does not divide the grid");
  state.body = std::forward<Body>(body);
  state.grid = grid;
  state.block = dim3(static_cast<unsigned>(threads));
  state.cluster = cluster;
  const size_t fibers = static_cast<size_t>(cluster * threads);
  if (state.threads.size() < fibers) {
    state.threads.clear();
    state.threads.resize(fibers);
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += static_cast<unsigned>(cluster)) run_cluster(name, dim3(x, y, z), shared);
}

}  // namespace emulator

#define threadIdx (emulator::state.current->index)
#define blockIdx (emulator::state.current->block->index)
#define blockDim (emulator::state.block)
#define gridDim (emulator::state.grid)

inline void __syncthreads() { emulator::wait(emulator::state.current->block->barrier, emulator::state.current->block->live); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::state.current->warp().barrier, emulator::state.current->warp().live); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int emulator_lane() { return static_cast<int>(threadIdx.x % emulator::kWarp); }
template <class T> T __shfl_sync(unsigned, T value, int source) { return emulator::exchange(value, source); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return emulator::exchange(value, emulator_lane() ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T value, int delta) {
  return emulator::exchange(value, emulator_lane() < delta ? emulator_lane() : emulator_lane() - delta);
}
template <class T> T __shfl_down_sync(unsigned, T value, int delta) {
  return emulator::exchange(value, emulator_lane() + delta >= emulator::kWarp ? emulator_lane() : emulator_lane() + delta);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned bits = 0;
  unsigned mine = predicate ? 1u << emulator_lane() : 0u;
  for (int lane = 0; lane < emulator::kWarp; ++lane) bits |= emulator::exchange(mine, lane) & (1u << lane);
  return bits;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return !__any_sync(mask, !predicate); }

template <class T> T atomicAdd(T* p, T value) { const T before = *p; *p = before + value; return before; }
template <class T> T atomicMax(T* p, T value) { const T before = *p; *p = std::max(before, value); return before; }
template <class T> T atomicMin(T* p, T value) { const T before = *p; *p = std::min(before, value); return before; }
template <class T> T atomicOr(T* p, T value) { const T before = *p; *p = before | value; return before; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T value) { *p = value; }
template <class T> void __stcg(T* p, T value) { *p = value; }

inline float __uint_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t __float_as_uint(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline long long __double_as_longlong(double x) { long long bits; std::memcpy(&bits, &x, 8); return bits; }
inline double __longlong_as_double(long long bits) { double x; std::memcpy(&x, &bits, 8); return x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
// compiled with -ffp-contract=off: no product is fused with a sum
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { __half h; std::memcpy(&h, &bits, 2); return h; }
inline uint16_t __half_as_ushort(__half h) { uint16_t bits; std::memcpy(&bits, &h, 2); return bits; }
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
