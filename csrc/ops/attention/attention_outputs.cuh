// What the forward kernels on the tensor cores do with the outputs in their registers.
#pragma once

#include "csrc/cuda/mma_tile.cuh"
#include "csrc/ops/attention/attention_scores.cuh"

namespace ptk::cuda {

template <typename Outputs>
__device__ void shrink_rows(Outputs& out, const float (&shrink)[Outputs::kRows]) {
#pragma unroll
  for (int i = 0; i < Outputs::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Outputs::kCols; ++j) {
      out.at(i, j) *= shrink[i];
    }
  }
}

// Writes out and lse of a warp's rows from row0 on. factor makes up for dropped weights.
template <typename Scalar, typename Tile, typename Outputs>
__device__ void write_rows(const ForwardParams& params, const Sequence& sequence, int64_t head, int row0,
                           const RowSoftmax<Tile>& softmax, Outputs& out, float unit, float factor) {
  const Problem& problem = params.problem;
  float* lse = static_cast<float*>(params.lse) + row_statistics_offset(problem, sequence, head);
  const float* sink = head_sink<float>(problem, sequence.batch, head);
  float normalise[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    float row_lse;
    normalise[i] = factor * softmax.finish_row(i, unit, sink, row_lse);
    const int row = row0 + Tile::row(i);
    if (lane_index() % Tile::kLanesPerRow == 0 && row < sequence.len_q) {
      lse[row] = row_lse;
    }
  }
  store_outputs(out, normalise, head_data<Scalar>(params.out, sequence.batch, head, sequence.first_q),
                params.out.strides[2], row0, sequence.len_q, static_cast<int>(problem.dim_v));
}

}  // namespace ptk::cuda
