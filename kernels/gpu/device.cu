// What the CUDA runtime says of this machine; called by igpo._C so that Python can answer with a reason.
#include <cuda_runtime.h>

#include "ops.h"

namespace igpo::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  return count;
}

const char* unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count ? "" : "no CUDA device";
}

}  // namespace igpo::cuda
