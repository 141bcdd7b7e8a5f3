// Which kernels a call of attention runs, for one dtype.
#pragma once

#include "csrc/ops/attention/attention_backward.cuh"
#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_forward.cuh"

namespace ptk::cuda {

template <typename Scalar, typename Launcher>
void run_attention_forward(const ForwardParams& params, const Launcher& launcher) {
  with_head_dim(params.problem,
                [&]<int HeadDim>() { launcher.template run<AttentionForward<Scalar, HeadDim>>(params); });
}

template <typename Scalar, typename Launcher>
void run_attention_backward(const AttentionBackwardParams& params, const Launcher& launcher) {
  launcher.template run<AttentionDelta<Scalar>>(params);
  launcher.template run<AttentionWeightScale<Scalar>>(params);
  with_head_dim(params.base.problem, [&]<int HeadDim>() {
    if (params.base.grad_key.data != nullptr || params.base.grad_value.data != nullptr) {
      launcher.template run<AttentionGradKeyValue<Scalar, HeadDim>>(params);
    }
    if (params.base.grad_query.data != nullptr) {
      launcher.template run<AttentionGradQuery<Scalar, HeadDim>>(params);
    }
  });
}

}  // namespace ptk::cuda
