// IGPO_BIND(kernel): m.kernel(...) in Python calls the kernel of the current instruction set with the interpreter lock
// released. Pointer parameters become integers (addresses), everything else is passed as it is.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "ops.h"

namespace igpo::bind {

template <class T>
struct Argument {
  using Type = T;
  static T cast(T value) { return value; }
};
template <class T>
struct Argument<T*> {
  using Type = uintptr_t;
  static T* cast(uintptr_t address) { return reinterpret_cast<T*>(address); }
};

template <class... Args>
void kernel(pybind11::module_& m, const char* name, void (*portable)(Args...), void (*avx2)(Args...),
            void (*avx512)(Args...)) {
  m.def(name, [=](typename Argument<Args>::Type... args) {
    pybind11::gil_scoped_release unlocked;
    const auto chosen = isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : portable;
    chosen(Argument<Args>::cast(args)...);
  });
}

// IGPO_BIND_CUDA(kernel): the same for a CUDA kernel. The lock is kept: a launch takes microseconds.
template <class Result, class... Args>
void cuda_kernel(pybind11::module_& m, const char* name, Result (*run)(Args...)) {
  m.def(name, [=](typename Argument<Args>::Type... args) { return run(Argument<Args>::cast(args)...); });
}
void cuda(pybind11::module_& m);  // csrc/cuda_bindings.cpp

}  // namespace igpo::bind

#define IGPO_BIND_CUDA(name) igpo::bind::cuda_kernel(m, #name, igpo::cuda::name)

#if defined(__x86_64__)
#define IGPO_BIND(name) igpo::bind::kernel(m, #name, igpo::portable::name, igpo::avx2::name, igpo::avx512::name)
#else
#define IGPO_BIND(name) igpo::bind::kernel(m, #name, igpo::portable::name, igpo::portable::name, igpo::portable::name)
#endif
