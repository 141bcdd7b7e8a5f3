#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention/attention_dispatch_sm80.cuh"

namespace ptk::cuda {

template void run_attention_forward_sm80<torch::headeronly::BFloat16>(const ForwardParams&, const StreamLauncher&);

}  // namespace ptk::cuda
