// The door between Python and the kernels: a table, grouped by op. Addresses arrive as integers (tensor.data_ptr()).
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "ops.h"
#include "parallel.h"

PYBIND11_MODULE(_C, m) {
  m.attr("build_id") = IGPO_BUILD_ID;
  m.attr("has_cuda") = IGPO_HAS_CUDA;
  m.def("isa", igpo::isa_name);
  m.def("set_isa", igpo::set_isa);
  m.def("thread_runtime", igpo::thread_runtime);
#if IGPO_HAS_CUDA
  pybind11::module_ cuda = m.def_submodule("cuda");
  igpo::bind::cuda(cuda);
#endif

  IGPO_BIND(merge_hints);
  IGPO_BIND(unmask_step);

  IGPO_BIND(token_logprob);
  IGPO_BIND(token_logprob_backward);

  IGPO_BIND(masked_cross_entropy);
  IGPO_BIND(masked_cross_entropy_backward);
  IGPO_BIND(sample_hint_mask);
  IGPO_BIND(keep_top_entropy);
  IGPO_BIND(forward_mask);
  IGPO_BIND(policy_loss);
}
