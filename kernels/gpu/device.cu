// What the CUDA runtime says of this machine, and the host side of common.cuh.
#include <stdexcept>
#include <string>

#include "common.cuh"
#include "cuda_ops.h"

namespace igpo::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  return count;
}

const char* unavailable() {
  int count = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  // without any driver CUDA calls it "insufficient"
  const bool no_driver = cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0;
  if (no_driver || error == cudaErrorNoDevice) return "no CUDA device";
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count ? "" : "no CUDA device";
}

void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

namespace {

constexpr int kMaxDevices = 64;

// An attribute of a device, asked for once: racing callers write the same value.
int attribute(int device, cudaDeviceAttr which, int (&cache)[kMaxDevices]) {
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("device index " + std::to_string(device));
  if (cache[device] == 0) check(cudaDeviceGetAttribute(&cache[device], which, device), "cudaDeviceGetAttribute");
  return cache[device];
}

}  // namespace

int capability(int device) {
  static int major[kMaxDevices], minor_plus_1[kMaxDevices];
  const int high = attribute(device, cudaDevAttrComputeCapabilityMajor, major);
  if (minor_plus_1[device] == 0) {
    int low = 0;
    check(cudaDeviceGetAttribute(&low, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    minor_plus_1[device] = low + 1;
  }
  return high * 10 + minor_plus_1[device] - 1;
}

int num_multiprocessors(int device) {
  static int count[kMaxDevices];
  return attribute(device, cudaDevAttrMultiProcessorCount, count);
}

DeviceGuard::DeviceGuard(int device) : device_(device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() {
  if (before_ != device_) cudaSetDevice(before_);
}

}  // namespace igpo::cuda
