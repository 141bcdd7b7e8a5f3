// Attention with a cache for the CUDA dispatch key. Its schemas are registered by libptkernels.so.
#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention_kv_cache/kv_cache_cuda_glue.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CUDA, library) {
  using Backend = ptk::cuda::KvCacheBackend<ptk::cuda::StreamLauncher>;
  library.impl("attention_with_kv_cache", TORCH_BOX(&Backend::attend));
  library.impl("attention_with_kv_cache_append", TORCH_BOX(&Backend::append));
}
