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

#include <array>
#include <map>
#include <type_traits>

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

// Of every instance of the kernels of a family: threads, blocks that a multiprocessor should hold, and bytes of shared
// memory that a block asks for.
template <typename... Kernels>
std::vector<int64_t> plan_of() {
  const auto shared = []<typename Kernel>() -> int64_t {
    using Shared = typename Kernel::Shared;
    return std::is_empty_v<Shared> ? 0 : sizeof(Shared);
  };
  std::vector<int64_t> plan;
  for (const auto& [threads, blocks, bytes] : {std::array<int64_t, 3>{
           Kernels::kThreads, Kernels::kBlocksPerMultiprocessor, shared.template operator()<Kernels>()}...}) {
    plan.insert(plan.end(), {threads, blocks, bytes});
  }
  return plan;
}

template <template <typename, int> typename Kernel>
std::vector<int64_t> plan_on_cores() {
  using Half = torch::headeronly::Half;
  return plan_of<Kernel<double, 64>, Kernel<double, 128>, Kernel<double, 256>, Kernel<double, 512>, Kernel<float, 64>,
                 Kernel<float, 128>, Kernel<float, 256>, Kernel<float, 512>, Kernel<Half, 512>>();
}

template <template <typename> typename Kernel>
std::vector<int64_t> plan_of_types() {
  return plan_of<Kernel<double>, Kernel<float>, Kernel<torch::headeronly::Half>>();
}

// For every pair of head dims that the kernels on the tensor cores are built for, in the order of the plans beside
// them.
template <template <typename, int, int> typename Kernel, int NarrowV = 96>
std::vector<int64_t> plan_on_tensor_cores() {
  using Scalar = torch::headeronly::BFloat16;
  return plan_of<Kernel<Scalar, 64, 64>, Kernel<Scalar, 96, NarrowV>, Kernel<Scalar, 128, 128>,
                 Kernel<Scalar, 192, 128>, Kernel<Scalar, 192, 192>, Kernel<Scalar, 256, 256>>();
}

template <typename Scalar, int DimQk, int DimV>
using GradKeyValueSm80 = ptk::cuda::AttentionGradKeyValueSm80<Scalar, DimQk, DimV, true, true>;

template <typename Scalar>
using GradMaskOnCores = ptk::cuda::AttentionGradMask<ptk::cuda::ThreadScoreGradients<Scalar>>;

template <template <typename, ptk::CacheType> typename Kernel>
std::vector<int64_t> plan_of_caches() {
  using ptk::CacheType;
  return plan_of<Kernel<double, CacheType::as_query>, Kernel<float, CacheType::as_query>,
                 Kernel<torch::headeronly::Half, CacheType::as_query>, Kernel<double, CacheType::s8>,
                 Kernel<float, CacheType::e4m3>>();
}

std::vector<int64_t> kernel_plan(std::string kernel) {
  using namespace ptk::cuda;
  const std::map<std::string, std::vector<int64_t>> plans{
      {"AttentionForward", plan_on_cores<AttentionForward>()},
      {"AttentionGradQuery", plan_on_cores<AttentionGradQuery>()},
      {"AttentionGradKeyValue", plan_on_cores<AttentionGradKeyValue>()},
      {"AttentionGradMask<ThreadScoreGradients>", plan_of_types<GradMaskOnCores>()},
      {"AttentionGradMask<ScoreGradientsSm80>", plan_on_tensor_cores<AttentionGradMaskSm80>()},
      {"AttentionDelta", plan_of_types<AttentionDelta>()},
      {"AttentionWeightScale", plan_of_types<AttentionWeightScale>()},
      {"AttentionHeadSums", plan_of_types<AttentionHeadSums>()},
      {"AttentionForwardSm80", plan_on_tensor_cores<AttentionForwardSm80>()},
      {"AttentionGradQuerySm80", plan_on_tensor_cores<AttentionGradQuerySm80>()},
      {"AttentionGradKeyValueSm80", plan_on_tensor_cores<GradKeyValueSm80>()},
      {"AttentionForwardSm90", plan_on_tensor_cores<AttentionForwardSm90, 128>()},
      {"KvPlace", plan_of<KvPlace>()},
      {"KvAppend", plan_of_caches<KvAppend>()},
      {"KvSplit", plan_of_caches<KvSplit>()},
      {"KvCombine", plan_of_types<KvCombine>()},
      {"WriteValues", plan_of<WriteValues>()},
  };
  return plans.at(kernel);
}

// Bits of a matrix descriptor of wgmma.
int64_t operand_descriptor(int64_t start, int64_t panel_stride, int64_t bytes_further) {
  const uint64_t descriptor =
      ptk::cuda::operand_descriptor({static_cast<uint32_t>(start), static_cast<uint32_t>(panel_stride)});
  return static_cast<int64_t>(ptk::cuda::advance(descriptor, static_cast<int>(bytes_further)));
}

// What the copy engine is told of an operand of attention on Hopper: sizes, strides and box; or what it would refuse.
std::tuple<std::vector<int64_t>, std::string> tensor_map(torch::stable::Tensor tensor, int64_t heads, int64_t rows) {
  const ptk::cuda::QueryTile tile{static_cast<int>(heads), static_cast<int>(rows)};
  const ptk::cuda::TensorMapShape shape =
      ptk::cuda::map_shape(ptk::view(tensor), tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3), tile);
  const ptk::cuda::TensorMapParameters parameters = ptk::cuda::tensor_map_parameters(shape);
  std::vector<int64_t> numbers;
  numbers.insert(numbers.end(), std::begin(parameters.sizes), std::end(parameters.sizes));
  numbers.insert(numbers.end(), std::begin(parameters.strides), std::end(parameters.strides));
  numbers.insert(numbers.end(), std::begin(parameters.box), std::end(parameters.box));
  const char* refused = ptk::cuda::refused_by_copy_engine(parameters, reinterpret_cast<uintptr_t>(shape.data));
  return {numbers, refused == nullptr ? "" : refused};
}

// For every tile of queries on Hopper, and each of its warps: batch, head, first row; then the tiles of keys as
// columns.
std::vector<int64_t> warp_rows(torch::stable::Tensor query, torch::stable::Tensor key, bool is_causal,
                               bool bottom_right, int64_t window_left) {
  using Kernel = ptk::cuda::AttentionForwardSm90<torch::headeronly::BFloat16, 64, 64>;
  ptk::Options options;
  options.is_causal = is_causal;
  options.bottom_right = bottom_right;
  options.window_left = window_left;
  Kernel::Params params{};
  ptk::Problem& p = params.base.problem;
  p = ptk::make_problem<ptk::cuda::AttentionBackend<HostLauncher>>(query, key, key, options);
  params.sequence = ptk::cuda::sequence_of(p, 0);
  params.tile = ptk::cuda::choose_query_tile(p, Kernel::kBlockRows);
  params.schedule = ptk::cuda::make_schedule(p, params.tile);
  std::vector<int64_t> rows;
  for (int index = 0; index < params.schedule.count(); ++index) {
    const Kernel::Work work = Kernel::work_at(params, index);
    for (int row = 0; row < Kernel::kBlockRows; row += 16) {
      const ptk::cuda::QueryTile::Place warp = params.tile.at(row);
      rows.insert(rows.end(), {work.batch, work.head + warp.head, work.row0 + warp.row, work.first_col,
                               work.first_col + work.tiles * Kernel::kBlockCols});
    }
  }
  return rows;
}

// How far the first number of a head's rows lies from the first of the operand, and of its row statistics.
std::vector<int64_t> head_offsets(std::vector<int64_t> strides, int64_t batch, int64_t head, int64_t row, int64_t heads,
                                  int64_t length) {
  ptk::Problem problem;
  problem.heads_q = heads;
  problem.len_q = length;
  ptk::cuda::Sequence sequence{};
  sequence.batch = static_cast<int>(batch);
  sequence.first_q = sequence.first_k = row;
  ptk::View view;
  std::copy(strides.begin(), strides.end(), view.strides);
  const ptk::ConstView input{nullptr, {strides[0], strides[1], strides[2], strides[3]}};
  const auto bytes = [](const void* place) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(place)); };
  return {bytes(ptk::cuda::head_data<char>(view, batch, head, row)),
          bytes(ptk::cuda::query_matrix<char>(input, sequence, head, 1).data),
          bytes(ptk::cuda::key_matrix<char>(input, sequence, head, 1).data),
          ptk::cuda::row_statistics_offset(problem, sequence, head)};
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
              "bool bottom_right=False, float softcap=0.0, float dropout_p=0.0, Tensor? relative_bias=None) -> "
              "(Tensor, Tensor)");
  library.def("_attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
              "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
              "bool[] output_mask, bool is_causal=False, float? scale=None, Tensor? alibi_slopes=None, "
              "Tensor? sinks=None, Tensor? dropout_seed=None, int window_left=-1, int window_right=-1, "
              "bool bottom_right=False, float softcap=0.0, float dropout_p=0.0, Tensor? relative_bias=None) "
              "-> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
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
  library.def("set_architecture(str name) -> str");
  library.def("tile_order(int heads, int tiles, int heads_per_section) -> int[]");
  library.def("architecture_for(Tensor query, Tensor key, Tensor value, int capability, str newest) -> str");
  library.def("query_tile(int heads_q, int heads_kv, int len_q, int tile_rows) -> int[]");
  library.def("backward_scratch_bytes(int batch, int heads_q, int len_q, bool has_slopes) -> int");
  library.def("kernel_plan(str kernel) -> int[]");
  library.def("operand_descriptor(int start, int panel_stride, int bytes_further) -> int");
  library.def("tensor_map(Tensor tensor, int heads, int rows) -> (int[], str)");
  library.def("warp_rows(Tensor query, Tensor key, bool is_causal, bool bottom_right, int window_left) -> int[]");
  library.def("head_offsets(int[] strides, int batch, int head, int row, int heads, int length) -> int[]");
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
  library.impl("kernel_plan", TORCH_BOX(&kernel_plan));
  library.impl("operand_descriptor", TORCH_BOX(&operand_descriptor));
  library.impl("tensor_map", TORCH_BOX(&tensor_map));
  library.impl("warp_rows", TORCH_BOX(&warp_rows));
  library.impl("head_offsets", TORCH_BOX(&head_offsets));
  library.impl("split_count", TORCH_BOX(&split_count));
  library.impl("run_diverging", TORCH_BOX(&run_diverging));
}
