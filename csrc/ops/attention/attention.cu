// Attention for the CUDA dispatch key. Its schema is registered by libptkernels.so.
#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_glue.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace ptk {
namespace {

// Calls run.template operator()<Scalar>() with the type of dtype.
template <typename Run>
void with_scalar(DType dtype, Run&& run) {
  switch (dtype) {
  case DType::f64:
    return run.template operator()<double>();
  case DType::f32:
    return run.template operator()<float>();
  case DType::bf16:
    return run.template operator()<torch::headeronly::BFloat16>();
  case DType::f16:
    return run.template operator()<torch::headeronly::Half>();
  }
}

// The kernels index rows with int, and step past the end by at most one tile.
void check_lengths(const Problem& problem) {
  constexpr int64_t kMaxLength = (int64_t{1} << 31) - 128;
  PTK_CHECK(problem.len_q <= kMaxLength, "attention: query: got length ", problem.len_q, ", expected at most ",
            kMaxLength, " on cuda");
  PTK_CHECK(problem.len_k <= kMaxLength, "attention: key: got length ", problem.len_k, ", expected at most ",
            kMaxLength, " on cuda");
}

struct CudaBackend {
  static constexpr const char* kDevice = "cuda";

  static bool owns(const Tensor& tensor) { return tensor.is_cuda(); }

  static void forward(const ForwardParams& params, const Tensor& query) {
    check_lengths(params.problem);
    const cuda::StreamLauncher launcher(query.get_device_index());
    with_scalar(params.problem.dtype,
                [&]<typename Scalar>() { cuda::run_attention_forward<Scalar>(params, launcher); });
  }

  static void backward(const BackwardParams& params, const Tensor& query) {
    check_lengths(params.problem);
    const cuda::StreamLauncher launcher(query.get_device_index());
    const Tensor delta = empty_lse(query, params.problem);
    const cuda::AttentionBackwardParams with_scratch{params, delta.mutable_data_ptr()};
    with_scalar(params.problem.dtype,
                [&]<typename Scalar>() { cuda::run_attention_backward<Scalar>(with_scratch, launcher); });
  }
};

}  // namespace
}  // namespace ptk

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CUDA, library) {
  library.impl("attention", TORCH_BOX(&ptk::attention_forward<ptk::CudaBackend>));
  library.impl("_attention_backward", TORCH_BOX(&ptk::attention_backward<ptk::CudaBackend>));
}
