// Backend of attention's torch glue that runs the CUDA kernels through a Launcher: StreamLauncher on a GPU.
#pragma once

#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_glue.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace ptk::cuda {

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
inline void check_length(const char* name, int64_t length) {
  constexpr int64_t kMaxLength = (int64_t{1} << 31) - 128;
  PTK_CHECK(length <= kMaxLength, "attention: ", name, ": got length ", length, ", expected at most ", kMaxLength,
            " on cuda");
}

// What the kernels here do not compute; Python sends such calls to the reference.
inline void check_options(const Problem& p) {
  const auto refuse = [](bool used, const char* name) {
    PTK_CHECK(!used, "attention: ", name, ": got a value, expected none on cuda, which has no kernel for it");
  };
  refuse(p.left < kUnbounded || p.right < kUnbounded, "window");
  refuse(p.bottom_right, "bottom_right");
  refuse(p.softcap != 0, "softcap");
  refuse(p.alibi.data != nullptr, "alibi_slopes");
  refuse(p.sinks.data != nullptr, "sinks");
  refuse(p.seeds != nullptr, "dropout_p");
}

template <typename Launcher>
struct AttentionBackend {
  static constexpr const char* kDevice = Launcher::kDevice;

  static bool owns(const Tensor& tensor) { return Launcher::owns(tensor); }

  static void forward(const ForwardParams& params, const Tensor& query) {
    check_options(params.problem);
    check_length("query", params.problem.len_q);
    check_length("key", params.problem.len_k);
    const Launcher launcher(query.get_device_index());
    with_scalar(params.problem.dtype, [&]<typename Scalar>() { run_attention_forward<Scalar>(params, launcher); });
  }

  static void backward(const BackwardParams& params, const Tensor& query) {
    check_options(params.problem);
    PTK_CHECK(params.grad_mask.data == nullptr,
              "attention: output_mask: got true for attn_mask, which has no kernel on "
              "cuda");
    check_length("query", params.problem.len_q);
    check_length("key", params.problem.len_k);
    const Launcher launcher(query.get_device_index());
    const Tensor delta = empty_lse(query, params.problem);
    const Tensor weight_scale = empty_lse(query, params.problem);
    const AttentionBackwardParams with_scratch{params, delta.mutable_data_ptr(), weight_scale.mutable_data_ptr()};
    with_scalar(params.problem.dtype,
                [&]<typename Scalar>() { run_attention_backward<Scalar>(with_scratch, launcher); });
  }
};

}  // namespace ptk::cuda
