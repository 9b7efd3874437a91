// The CUDA kernels over the emulator, as a Python module with the table of igpo._C.cuda.
#include <cstdlib>

#include "bindings.h"
#include "common.cuh"
#include "cuda_ops.h"

namespace igpo::cuda {

int device_count() { return 1; }
const char* unavailable() { return ""; }
void check(cudaError_t, const char*) {}
int capability(int) {
  const char* chosen = std::getenv("IGPO_EMULATE_CAPABILITY");
  return chosen ? std::atoi(chosen) : 90;
}
int num_multiprocessors(int) { return 4; }
DeviceGuard::DeviceGuard(int device) : before_(device), device_(device) {}
DeviceGuard::~DeviceGuard() = default;

}  // namespace igpo::cuda

PYBIND11_MODULE(igpo_emulated, m) { igpo::bind::cuda(m); }
