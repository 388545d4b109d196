// The Python module of the GPU's kernels.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <utility>

#include "ffi/handlers.h"
#include "launchers.h"

namespace {

namespace py = pybind11;

py::capsule capsule(XLA_FFI_Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::dict registrations() {
  py::dict handlers;
  handlers["sparse_attn_attention_forward"] = capsule(sparse_attn_attention_forward);
  handlers["sparse_attn_attention_backward"] = capsule(sparse_attn_attention_backward);
  handlers["sparse_attn_select_blocks"] = capsule(sparse_attn_select_blocks);
  handlers["sparse_attn_paged_attention"] = capsule(sparse_attn_paged_attention);
  handlers["sparse_attn_block_extrema"] = capsule(sparse_attn_block_extrema);
  handlers["sparse_attn_select_by_bounds"] = capsule(sparse_attn_select_by_bounds);
  handlers["sparse_attn_plan_unions"] = capsule(sparse_attn_plan_unions);
  handlers["sparse_attn_plan_inverse"] = capsule(sparse_attn_plan_inverse);
  return handlers;
}

// 1000 x major + 10 x minor: what compiled the kernels, and the newest that the driver knows, 0 if
// there is none.
std::pair<int, int> cuda_versions() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {CUDART_VERSION, driver};
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "The hand-written CUDA kernels, as compiled.";
  module.def(
      "registrations", registrations,
      "What jax.ffi.register_ffi_target takes for platform \"CUDA\": handlers by target name.");
  module.def(
      "cuda_versions", cuda_versions,
      "1000 x major + 10 x minor of the CUDA that compiled the kernels, and of the driver's, 0 "
      "if there is no driver.");
  module.def("variants", sparse_attn_variants,
             "The compiled variants, as JSON (csrc/launchers.h).");
  module.def("kernels", sparse_attn_kernels, "What each kernel takes of a GPU, as JSON.");
}
