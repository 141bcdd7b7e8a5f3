// Attention for the CUDA dispatch key. Its schemas are registered by libptkernels.so, but for the one that chooses
// kernels.
#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention/attention_cuda_glue.h"
#include "csrc/ops/attention/attention_varlen_glue.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CUDA, library) {
  using Backend = ptk::cuda::AttentionBackend<ptk::cuda::StreamLauncher>;
  library.impl("attention", TORCH_BOX(&ptk::attention_forward<Backend>));
  library.impl("_attention_backward", TORCH_BOX(&ptk::attention_backward<Backend>));
  library.impl("attention_varlen", TORCH_BOX(&ptk::varlen_forward<Backend>));
  library.impl("_attention_varlen_backward", TORCH_BOX(&ptk::varlen_backward<Backend>));
}

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("_set_cuda_architecture(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CompositeExplicitAutograd, library) {
  library.impl("_set_cuda_architecture", TORCH_BOX(&ptk::cuda::set_newest_architecture));
}
