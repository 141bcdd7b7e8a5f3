// Which kernel for sm_90a a call of attention runs, for one dtype, and the tensor maps that it needs.
#pragma once

#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_forward_sm90.cuh"

namespace ptk::cuda {

inline TensorMapShape map_shape(const ConstView& view, int64_t batch, int64_t heads, int64_t length, int64_t dim,
                                int tile_rows) {
  return {view.data, batch, heads, length, dim, view.strides[0], view.strides[1], view.strides[2], tile_rows};
}

template <typename Scalar, typename Launcher>
void run_attention_forward_sm90(const ForwardParams& params, const Launcher& launcher) {
  const Problem& p = params.problem;
  const auto run = [&]<int DimQk, int DimV>() {
    using Kernel = AttentionForwardSm90<Scalar, DimQk, DimV>;
    const auto map = [&](const ConstView& view, int64_t heads, int64_t length, int64_t dim, int tile_rows) {
      return make_tensor_map(map_shape(view, p.batch, heads, length, dim, tile_rows), kIsBfloat16<Scalar>);
    };
    launcher.template run<Kernel>({map(params.query, p.heads_q, p.len_q, p.dim_qk, Kernel::kBlockRows),
                                   map(params.key, p.heads_kv, p.len_k, p.dim_qk, Kernel::kBlockCols),
                                   map(params.value, p.heads_kv, p.len_k, p.dim_v, Kernel::kBlockCols), params,
                                   make_schedule(p, Kernel::kBlockRows), launcher.multiprocessors()});
  };
  if (fits(p, {64, 64})) {
    run.template operator()<64, 64>();
  } else if (fits(p, {128, 128})) {
    run.template operator()<128, 128>();
  } else if (fits(p, {192, 128})) {
    run.template operator()<192, 128>();
  } else {
    run.template operator()<256, 256>();
  }
}

}  // namespace ptk::cuda
