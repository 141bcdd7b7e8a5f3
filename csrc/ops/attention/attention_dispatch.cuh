// Which kernels on the CUDA cores a call of attention runs, for one dtype.
#pragma once

#include "csrc/ops/attention/attention_backward.cuh"
#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_forward.cuh"

namespace ptk::cuda {

template <typename Scalar, typename Launcher>
void run_attention_forward(const ForwardParams& params, const Launcher& launcher) {
  with_head_dim<Scalar>(params.problem,
                        [&]<int HeadDim>() { launcher.template run<AttentionForward<Scalar, HeadDim>>(params); });
}

template <typename Scalar, typename Launcher>
void run_attention_backward(const AttentionBackwardParams& params, const Launcher& launcher) {
  run_attention_row_statistics<Scalar>(params, launcher);
  const BackwardParams& base = params.base;
  with_head_dim<Scalar>(base.problem, [&]<int HeadDim>() {
    if (base.grad_key.data != nullptr || base.grad_value.data != nullptr) {
      launcher.template run<AttentionGradKeyValue<Scalar, HeadDim>>(params);
    }
    if (base.grad_query.data != nullptr || params.slope_sums != nullptr) {
      launcher.template run<AttentionGradQuery<Scalar, HeadDim>>(params);
    }
  });
  if (base.grad_mask.data != nullptr) {
    launcher.template run<AttentionGradMask<ThreadScoreGradients<Scalar>>>(params);
  }
  run_attention_head_sums<Scalar>(params, launcher);
}

}  // namespace ptk::cuda
