#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention/attention_dispatch.cuh"

#include <torch/headeronly/util/BFloat16.h>

namespace ptk::cuda {

template void run_attention_forward<torch::headeronly::BFloat16>(const ForwardParams&, const StreamLauncher&);
template void run_attention_backward<torch::headeronly::BFloat16>(const AttentionBackwardParams&,
                                                                  const StreamLauncher&);

}  // namespace ptk::cuda
