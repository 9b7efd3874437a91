// igpo._C.cuda: the CUDA kernels, a table grouped by op. tests/cuda/ builds the same table over the emulator.
#include "bindings.h"
#include "cuda_ops.h"

#if IGPO_HAS_CUDA
namespace igpo::bind {

void cuda(pybind11::module_& m) {
  m.def("device_count", igpo::cuda::device_count);
  m.def("unavailable", igpo::cuda::unavailable);

  IGPO_BIND_CUDA(merge_hints);
  IGPO_BIND_CUDA(unmask_step);
  IGPO_BIND_CUDA(unmask_step_workspace);
}

}  // namespace igpo::bind
#endif
