#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention/attention_dispatch.cuh"

#include <torch/headeronly/util/Half.h>

namespace ptk::cuda {

template void run_attention_forward<torch::headeronly::Half>(const ForwardParams&, const StreamLauncher&);
template void run_attention_backward<torch::headeronly::Half>(const AttentionBackwardParams&, const StreamLauncher&);

}  // namespace ptk::cuda
