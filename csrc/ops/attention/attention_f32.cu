#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention/attention_dispatch.cuh"

namespace ptk::cuda {

template void run_attention_forward<float>(const ForwardParams&, const StreamLauncher&);
template void run_attention_backward<float>(const AttentionBackwardParams&, const StreamLauncher&);

}  // namespace ptk::cuda
