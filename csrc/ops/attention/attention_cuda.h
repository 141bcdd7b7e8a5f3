// The CUDA kernels of attention as its glue sees them: one pair of functions per dtype, each built in a file of its
// own. Launcher is StreamLauncher, or an executor of the same interface.
#pragma once

#include "csrc/ops/attention/attention.h"

namespace ptk::cuda {

struct AttentionBackwardParams {
  BackwardParams base;
  // Scratch, laid out like lse and in its dtype.
  void* delta = nullptr;
  void* weight_scale = nullptr;
};

template <typename Scalar, typename Launcher>
void run_attention_forward(const ForwardParams& params, const Launcher& launcher);

template <typename Scalar, typename Launcher>
void run_attention_backward(const AttentionBackwardParams& params, const Launcher& launcher);

}  // namespace ptk::cuda
