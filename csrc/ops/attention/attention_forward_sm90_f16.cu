#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention/attention_dispatch_sm90.cuh"

namespace ptk::cuda {

template void run_attention_forward_sm90<torch::headeronly::Half>(const ForwardParams&, const StreamLauncher&);

}  // namespace ptk::cuda
