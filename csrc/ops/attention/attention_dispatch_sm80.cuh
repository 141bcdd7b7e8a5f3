// Which kernels for sm_80 a call of attention runs, for one dtype.
#pragma once

#include "csrc/ops/attention/attention_backward_sm80.cuh"
#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_forward_sm80.cuh"

namespace ptk::cuda {

// Calls run.template operator()<DimQk, DimV>() with the first of kTensorCoreHeadDims that both head dims fit in.
template <int Index = 0, typename Run>
void with_tensor_core_head_dims(const Problem& problem, Run&& run) {
  constexpr HeadDims kDims = kTensorCoreHeadDims[Index];
  if constexpr (Index + 1 < std::size(kTensorCoreHeadDims)) {
    if (!fits(problem, kDims)) {
      return with_tensor_core_head_dims<Index + 1>(problem, run);
    }
  }
  run.template operator()<kDims.qk, kDims.v>();
}

template <typename Scalar, typename Launcher>
void run_attention_forward_sm80(const ForwardParams& params, const Launcher& launcher) {
  with_tensor_core_head_dims(params.problem, [&]<int DimQk, int DimV>() {
    launcher.template run<AttentionForwardSm80<Scalar, DimQk, DimV>>(params);
  });
}

// In three head dims, to which the others are padded.
template <typename Scalar, typename Launcher>
void run_grad_mask_sm80(const AttentionBackwardParams& params, const Launcher& launcher) {
  if (fits(params.base.problem, {64, 64})) {
    launcher.template run<AttentionGradMaskSm80<Scalar, 64, 64>>(params);
  } else if (fits(params.base.problem, {128, 128})) {
    launcher.template run<AttentionGradMaskSm80<Scalar, 128, 128>>(params);
  } else {
    launcher.template run<AttentionGradMaskSm80<Scalar, 256, 256>>(params);
  }
}

template <typename Scalar, typename Launcher>
void run_attention_backward_sm80(const AttentionBackwardParams& params, const Launcher& launcher) {
  run_attention_row_statistics<Scalar>(params, launcher);
  const BackwardParams& base = params.base;
  with_tensor_core_head_dims(base.problem, [&]<int DimQk, int DimV>() {
    if (base.grad_key.data != nullptr || base.grad_value.data != nullptr) {
      run_grad_key_value_sm80<Scalar, DimQk, DimV>(params, launcher);
    }
    if (base.grad_query.data != nullptr || params.slope_sums != nullptr) {
      launcher.template run<AttentionGradQuerySm80<Scalar, DimQk, DimV>>(params);
    }
  });
  if (base.grad_mask.data != nullptr) {
    run_grad_mask_sm80<Scalar>(params, launcher);
  }
  run_attention_head_sums<Scalar>(params, launcher);
}

}  // namespace ptk::cuda
