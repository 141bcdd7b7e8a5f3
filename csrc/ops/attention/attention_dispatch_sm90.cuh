// Which kernel for sm_90a a call of attention runs, for one dtype, and the tensor maps that it needs.
#pragma once

#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_forward_sm90.cuh"

namespace ptk::cuda {

inline TensorMapShape map_shape(const ConstView& view, int64_t batch, int64_t heads, int64_t length, int64_t dim,
                                const QueryTile& tile) {
  return {view.data,       batch,           heads,           length,    dim,
          view.strides[0], view.strides[1], view.strides[2], tile.rows, tile.heads};
}

template <typename Scalar, typename Launcher>
void run_attention_forward_sm90(const ForwardParams& params, const Launcher& launcher) {
  const Problem& p = params.problem;
  const auto run = [&]<int DimQk, int DimV>() {
    using Kernel = AttentionForwardSm90<Scalar, DimQk, DimV>;
    const auto map = [&](const ConstView& view, int64_t heads, int64_t length, int64_t dim, const QueryTile& tile) {
      return make_tensor_map(map_shape(view, p.batch, heads, length, dim, tile), kIsBfloat16<Scalar>);
    };
    const QueryTile tile = choose_query_tile(p, Kernel::kBlockRows);
    const QueryTile keys{1, Kernel::kBlockCols};
    const TileSchedule schedule = make_schedule(p, tile);
    constexpr int64_t kMaxTiles = int64_t{1} << 30;  // counted with int
    PTK_CHECK(schedule.count() <= kMaxTiles, "attention: query: got ", schedule.count(),
              " tiles of rows, expected at most ", kMaxTiles, " on cuda");
    launcher.template run<Kernel>({map(params.query, p.heads_q, p.len_q, p.dim_qk, tile),
                                   map(params.key, p.heads_kv, p.len_k, p.dim_qk, keys),
                                   map(params.value, p.heads_kv, p.len_k, p.dim_v, keys), params, sequence_of(p, 0),
                                   tile, schedule, static_cast<int>(schedule.count()), launcher.multiprocessors()});
  };
  // Outputs are as wide as products of 64 or 128 columns make them.
  if (fits(p, {64, 64})) {
    run.template operator()<64, 64>();
  } else if (fits(p, {96, 128})) {
    run.template operator()<96, 128>();
  } else if (fits(p, {128, 128})) {
    run.template operator()<128, 128>();
  } else if (fits(p, {192, 128})) {
    run.template operator()<192, 128>();
  } else if (fits(p, {192, 192})) {
    run.template operator()<192, 192>();
  } else {
    run.template operator()<256, 256>();
  }
}

}  // namespace ptk::cuda
