// The CUDA kernels of attention, their dispatch and their torch glue, run on the CPU by cuda_host.h and registered for
// CPU tensors in the namespace ptkernels_cuda_host, as if the GPU had compute capability 9.0.
#include "tests/cuda_host/cuda_host.h"

#include "csrc/ops/attention/attention_cuda_glue.h"
#include "csrc/ops/attention/attention_dispatch.cuh"
#include "csrc/ops/attention/attention_dispatch_sm80.cuh"
#include "csrc/ops/attention/attention_dispatch_sm90.cuh"
#include "csrc/ops/attention/attention_varlen_glue.h"
#include "csrc/ops/attention_kv_cache/kv_cache_cuda_glue.h"

#include <torch/csrc/stable/library.h>

namespace {

cuda_host::Order order = cuda_host::Order::ascending;

struct HostLauncher {
  static constexpr const char* kDevice = "cpu";

  static bool owns(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

  explicit HostLauncher(int32_t) {}

  template <typename Kernel>
  void run(const typename Kernel::Params& params) const {
    cuda_host::launch<Kernel>(params, order);
  }
  int capability() const { return 90; }
  int multiprocessors() const { return 3; }
};

void set_order(int64_t value) {
  order = static_cast<cuda_host::Order>(value);
}

// Every thread but the first waits at a barrier.
struct Diverging {
  static constexpr int kThreads = ptk::cuda::kThreads;
  struct Params {};
  struct Shared {};
  static int64_t blocks(const Params&) { return 1; }
  static void run(const Params&, Shared&) {
    if (threadIdx.x != 0) {
      __syncthreads();
    }
  }
};

// Thread t reads what thread t + 1 wrote, with no barrier between.
struct Racing {
  static constexpr int kThreads = ptk::cuda::kThreads;
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

// Heads and tiles in the order of a schedule.
std::vector<int64_t> tile_order(int64_t heads, int64_t tiles, int64_t heads_per_section) {
  const ptk::cuda::TileSchedule schedule{heads, tiles, heads_per_section};
  std::vector<int64_t> order;
  for (int64_t index = 0; index < schedule.count(); ++index) {
    const auto place = schedule.at(index);
    order.push_back(place.head);
    order.push_back(place.tile);
  }
  return order;
}

std::string architecture_for(torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
                             int64_t capability, std::string newest) {
  ptk::Options options;
  ptk::ForwardParams params;
  params.problem = ptk::make_problem<ptk::cuda::AttentionBackend<HostLauncher>>(query, key, value, options);
  params.query = ptk::view(query);
  params.key = ptk::view(key);
  params.value = ptk::view(value);
  return ptk::cuda::architecture_name(ptk::cuda::choose_architecture(params.problem, static_cast<int>(capability),
                                                                     ptk::cuda::architecture_of(newest),
                                                                     ptk::cuda::fits_copy_engine(params)));
}

// Query heads and rows of a tile on Hopper, and how many tiles there are.
std::vector<int64_t> query_tile(int64_t heads_q, int64_t heads_kv, int64_t len_q, int64_t tile_rows) {
  ptk::Problem problem;
  problem.batch = 1;
  problem.heads_q = heads_q;
  problem.heads_kv = heads_kv;
  problem.len_q = len_q;
  const ptk::cuda::QueryTile tile = ptk::cuda::choose_query_tile(problem, static_cast<int>(tile_rows));
  return {tile.heads, tile.rows, ptk::cuda::make_schedule(problem, tile).count()};
}

int64_t backward_scratch_bytes(int64_t batch, int64_t heads_q, int64_t len_q, bool has_slopes) {
  ptk::Problem problem;
  problem.batch = batch;
  problem.heads_q = heads_q;
  problem.len_q = len_q;
  return ptk::cuda::backward_scratch_count(problem, has_slopes) * static_cast<int64_t>(sizeof(float));
}

// Bytes of shared memory that a block of a kernel asks for, for every pair of head dims that it is built for, in the
// order of the plan beside the kernel.
std::vector<int64_t> shared_bytes(std::string kernel) {
  using Scalar = torch::headeronly::BFloat16;
  using ptk::cuda::AttentionForwardSm80, ptk::cuda::AttentionForwardSm90, ptk::cuda::BackwardPlanSm80;
  const auto of = []<typename... Kernels>(const std::tuple<Kernels...>*) {
    return std::vector<int64_t>{sizeof(typename Kernels::Shared)...};
  };
  if (kernel == "attention_forward_sm80") {
    return of(static_cast<std::tuple<AttentionForwardSm80<Scalar, 64, 64>, AttentionForwardSm80<Scalar, 96, 96>,
                                     AttentionForwardSm80<Scalar, 128, 128>, AttentionForwardSm80<Scalar, 192, 128>,
                                     AttentionForwardSm80<Scalar, 192, 192>, AttentionForwardSm80<Scalar, 256, 256>>*>(
        nullptr));
  }
  if (kernel == "attention_backward_sm80") {
    return of(
        static_cast<std::tuple<BackwardPlanSm80<Scalar, 64, 64>, BackwardPlanSm80<Scalar, 96, 96>,
                               BackwardPlanSm80<Scalar, 128, 128>, BackwardPlanSm80<Scalar, 192, 128>,
                               BackwardPlanSm80<Scalar, 192, 192>, BackwardPlanSm80<Scalar, 256, 256>>*>(nullptr));
  }
  return of(static_cast<std::tuple<AttentionForwardSm90<Scalar, 64, 64>, AttentionForwardSm90<Scalar, 96, 128>,
                                   AttentionForwardSm90<Scalar, 128, 128>, AttentionForwardSm90<Scalar, 192, 128>,
                                   AttentionForwardSm90<Scalar, 192, 192>, AttentionForwardSm90<Scalar, 256, 256>>*>(
      nullptr));
}

int64_t split_count(int64_t blocks, int64_t multiprocessors, int64_t capacity) {
  return ptk::cuda::split_count(blocks, static_cast<int>(multiprocessors), capacity);
}

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
              "float dropout_p=0.0, Tensor? relative_bias=None, int mask_block_size=1) -> (Tensor, Tensor)");
  library.def("_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
              "Tensor out, Tensor lse, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
              "bool[] output_mask=[True, True, True], Tensor? alibi_slopes=None, Tensor? sinks=None, "
              "Tensor? dropout_seed=None, int window_left=-1, int window_right=-1, bool bottom_right=False, "
              "float softcap=0.0, float dropout_p=0.0, Tensor? relative_bias=None, int mask_block_size=1) "
              "-> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  library.def("attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
              "int max_seqlen_q, int max_seqlen_k, bool is_causal=False, float? scale=None, Tensor? alibi_slopes=None, "
              "Tensor? sinks=None, Tensor? dropout_seed=None, int window_left=-1, int window_right=-1, "
              "bool bottom_right=False, float softcap=0.0, float dropout_p=0.0) -> (Tensor, Tensor)");
  library.def("_attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
              "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
              "bool[] output_mask, bool is_causal=False, float? scale=None, Tensor? alibi_slopes=None, "
              "Tensor? sinks=None, Tensor? dropout_seed=None, int window_left=-1, int window_right=-1, "
              "bool bottom_right=False, float softcap=0.0, float dropout_p=0.0) "
              "-> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  library.def("attention_with_kv_cache(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
              "Tensor? block_table=None, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, "
              "float? scale=None, bool is_causal=True, int window_left=-1, int window_right=-1, float softcap=0.0, "
              "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None) "
              "-> (Tensor, Tensor)");
  library.def(
      "attention_with_kv_cache_append(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor cache_seqlens, Tensor? block_table=None, Tensor? cache_batch_idx=None, "
      "Tensor? cache_leftpad=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
      "bool rotary_interleaved=False, float? scale=None, bool is_causal=True, int window_left=-1, "
      "int window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, "
      "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> (Tensor, Tensor)");
  library.def("set_order(int order) -> ()");
  library.def("set_architecture(str name) -> ()");
  library.def("tile_order(int heads, int tiles, int heads_per_section) -> int[]");
  library.def("architecture_for(Tensor query, Tensor key, Tensor value, int capability, str newest) -> str");
  library.def("query_tile(int heads_q, int heads_kv, int len_q, int tile_rows) -> int[]");
  library.def("backward_scratch_bytes(int batch, int heads_q, int len_q, bool has_slopes) -> int");
  library.def("shared_bytes(str kernel) -> int[]");
  library.def("split_count(int blocks, int multiprocessors, int capacity) -> int");
  library.def("run_diverging() -> ()");
  library.def("run_racing(Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels_cuda_host, CPU, library) {
  using Backend = ptk::cuda::AttentionBackend<HostLauncher>;
  library.impl("attention", TORCH_BOX(&ptk::attention_forward<Backend>));
  library.impl("_attention_backward", TORCH_BOX(&ptk::attention_backward<Backend>));
  library.impl("attention_varlen", TORCH_BOX(&ptk::varlen_forward<Backend>));
  library.impl("_attention_varlen_backward", TORCH_BOX(&ptk::varlen_backward<Backend>));
  using Cache = ptk::cuda::KvCacheBackend<HostLauncher>;
  library.impl("attention_with_kv_cache", TORCH_BOX(&Cache::attend));
  library.impl("attention_with_kv_cache_append", TORCH_BOX(&Cache::append));
  library.impl("run_racing", TORCH_BOX(&run_racing));
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels_cuda_host, CompositeExplicitAutograd, library) {
  library.impl("set_order", TORCH_BOX(&set_order));
  library.impl("set_architecture", TORCH_BOX(&ptk::cuda::set_newest_architecture));
  library.impl("tile_order", TORCH_BOX(&tile_order));
  library.impl("architecture_for", TORCH_BOX(&architecture_for));
  library.impl("query_tile", TORCH_BOX(&query_tile));
  library.impl("backward_scratch_bytes", TORCH_BOX(&backward_scratch_bytes));
  library.impl("shared_bytes", TORCH_BOX(&shared_bytes));
  library.impl("split_count", TORCH_BOX(&split_count));
  library.impl("run_diverging", TORCH_BOX(&run_diverging));
}
