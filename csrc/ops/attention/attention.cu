// Attention for the CUDA dispatch key. Its schema is registered by libptkernels.so.
#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention/attention_cuda_glue.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CUDA, library) {
  using Backend = ptk::cuda::AttentionBackend<ptk::cuda::StreamLauncher>;
  library.impl("attention", TORCH_BOX(&ptk::attention_forward<Backend>));
  library.impl("_attention_backward", TORCH_BOX(&ptk::attention_backward<Backend>));
}
