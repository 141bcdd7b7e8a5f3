// The CUDA kernels of attention, their dispatch and their torch glue, run on the CPU by cuda_host.h and registered for
// CPU tensors in the namespace ptkernels_cuda_host.
#include "tests/cuda_host/cuda_host.h"

#include "csrc/ops/attention/attention_cuda_glue.h"
#include "csrc/ops/attention/attention_dispatch.cuh"

#include <torch/csrc/stable/library.h>

namespace {

cuda_host::Order order = cuda_host::Order::ascending;

struct HostLauncher {
  static constexpr const char* kDevice = "cpu";

  static bool owns(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

  explicit HostLauncher(int32_t) {}

  template <typename Kernel>
  void run(const typename Kernel::Params& params) const {
    cuda_host::launch<Kernel>(params, ptk::cuda::kThreads, order);
  }
};

void set_order(int64_t value) {
  order = static_cast<cuda_host::Order>(value);
}

// Every thread but the first waits at a barrier.
struct Diverging {
  struct Params {};
  struct Shared {
    float unused;
  };
  static int64_t blocks(const Params&) { return 1; }
  static void run(const Params&, Shared&) {
    if (threadIdx.x != 0) {
      __syncthreads();
    }
  }
};

// Thread t reads what thread t + 1 wrote, with no barrier between.
struct Racing {
  struct Params {
    float* out;
  };
  struct Shared {
    float values[ptk::cuda::kThreads];
  };
  static int64_t blocks(const Params&) { return 1; }
  static void run(const Params& params, Shared& shared) {
    shared.values[threadIdx.x] = static_cast<float>(threadIdx.x);
    params.out[threadIdx.x] = shared.values[(threadIdx.x + 1) % ptk::cuda::kThreads];
  }
};

void run_diverging() {
  HostLauncher(0).run<Diverging>({});
}

void run_racing(torch::stable::Tensor out) {
  HostLauncher(0).run<Racing>({static_cast<float*>(out.mutable_data_ptr())});
}

}  // namespace

STABLE_TORCH_LIBRARY(ptkernels_cuda_host, library) {
  library.def("attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, "
              "float? scale=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? dropout_seed=None, "
              "int window_left=-1, int window_right=-1, bool bottom_right=False, float softcap=0.0, "
              "float dropout_p=0.0, Tensor? relative_bias=None) -> (Tensor, Tensor)");
  library.def("_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
              "Tensor out, Tensor lse, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
              "bool[] output_mask=[True, True, True], Tensor? alibi_slopes=None, Tensor? sinks=None, "
              "Tensor? dropout_seed=None, int window_left=-1, int window_right=-1, bool bottom_right=False, "
              "float softcap=0.0, float dropout_p=0.0, Tensor? relative_bias=None) "
              "-> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  library.def("set_order(int order) -> ()");
  library.def("run_diverging() -> ()");
  library.def("run_racing(Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels_cuda_host, CPU, library) {
  using Backend = ptk::cuda::AttentionBackend<HostLauncher>;
  library.impl("attention", TORCH_BOX(&ptk::attention_forward<Backend>));
  library.impl("_attention_backward", TORCH_BOX(&ptk::attention_backward<Backend>));
  library.impl("run_racing", TORCH_BOX(&run_racing));
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels_cuda_host, CompositeExplicitAutograd, library) {
  library.impl("set_order", TORCH_BOX(&set_order));
  library.impl("run_diverging", TORCH_BOX(&run_diverging));
}
