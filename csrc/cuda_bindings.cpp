// igpo._C.cuda: the CUDA kernels, a table grouped by op. tests/cuda/ builds the same table over the emulator.
#include "bindings.h"
#include "cuda_ops.h"

#if IGPO_HAS_CUDA
namespace igpo::bind {

void cuda(pybind11::module_& m) {
  m.def("device_count", igpo::cuda::device_count);
  m.def("unavailable", igpo::cuda::unavailable);

  IGPO_BIND_CUDA(token_logprob);
  IGPO_BIND_CUDA(token_logprob_backward);
  IGPO_BIND_CUDA(masked_cross_entropy);
  IGPO_BIND_CUDA(masked_cross_entropy_with_gradient);
  IGPO_BIND_CUDA(masked_cross_entropy_backward);
  IGPO_BIND_CUDA(masked_cross_entropy_scale);
  IGPO_BIND_CUDA(sum_rows);

  IGPO_BIND_CUDA(merge_hints);
}

}  // namespace igpo::bind
#endif
