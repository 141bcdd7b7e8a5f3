// What the CUDA kernels of attention share: which tile a block works on, how many entries a thread holds, and the mask.
#pragma once

#include "csrc/cuda/tile.cuh"
#include "csrc/ops/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ptk::cuda {

// Score tile of a block, as entries per thread, when the block also accumulates `Outputs` head-dim-wide results in
// registers: as many rows as let those take at most 128 of the 255 that a thread can have. Where they take 32 or fewer,
// two blocks fit a multiprocessor.
template <typename Acc, int HeadDim, int Outputs>
struct AttentionTile {
  static constexpr int kChunks = HeadDim / kChunk;
  static constexpr int kMaxRows = sizeof(Acc) == 8 ? 2 : 4;
  static constexpr int kRegistersPerRow = Outputs * kChunks * kQuad * static_cast<int>(sizeof(Acc) / 4);
  static constexpr int kRows = std::clamp(128 / kRegistersPerRow, 1, kMaxRows);
  static constexpr int kBlocksPerMultiprocessor = kRows * kRegistersPerRow <= 32 ? 2 : 1;
  static constexpr int kCols = kMaxRows;
  static constexpr int kBlockRows = kGrid * kRows;
  static constexpr int kBlockCols = kGrid * kCols;
};

struct BlockPosition {
  int64_t batch;
  int64_t head;
  int row0;
};

__host__ __device__ inline int64_t tile_count(int64_t length, int tile) {
  return (length + tile - 1) / tile;
}

// Tiles of one head are neighbours, so that blocks that run together share keys and values in L2. The last tile comes
// first: under causality it is the longest, and starting it first shortens the tail of the launch.
__device__ inline BlockPosition block_position(int64_t heads, int64_t length, int tile) {
  const int64_t tiles = tile_count(length, tile);
  const int64_t sequence = blockIdx.x / tiles;
  return {sequence / heads, sequence % heads, static_cast<int>(tiles - 1 - blockIdx.x % tiles) * tile};
}

template <typename Scalar>
__device__ Matrix<Scalar> head_matrix(const ConstView& view, int64_t batch, int64_t head, int64_t rows, int64_t cols) {
  return {static_cast<const Scalar*>(view.data) + batch * view.strides[0] + head * view.strides[1], view.strides[2],
          view.strides[3], static_cast<int>(rows), static_cast<int>(cols)};
}

template <typename Scalar>
__device__ Scalar* head_data(const View& view, int64_t batch, int64_t head) {
  return static_cast<Scalar*>(view.data) + batch * view.strides[0] + head * view.strides[1];
}

// Of lse and of what is laid out like it.
__device__ inline int64_t row_statistics_offset(const Problem& problem, int64_t batch, int64_t head) {
  return (batch * problem.heads_q + head) * problem.len_q;
}

// Scaled and masked score of one (row, col) of a head; -inf where row may not attend to col or either is outside.
// The same bits in every kernel, so that exp(score - lse) cannot overflow however large the mask is.
template <typename Scalar, typename Acc>
__device__ Acc masked_score(const Problem& problem, int64_t mask_offset, int row, int col, Acc product) {
  if (row >= problem.len_q || col >= problem.len_k || (problem.is_causal && col > row)) {
    return -INFINITY;
  }
  const Acc scale = static_cast<Acc>(problem.scale);
  const int64_t offset = mask_offset + row * problem.mask.strides[2] + col * problem.mask.strides[3];
  switch (problem.mask_kind) {
  case MaskKind::boolean:
    return static_cast<const uint8_t*>(problem.mask.data)[offset] ? scale * product : static_cast<Acc>(-INFINITY);
  case MaskKind::same_dtype:
    return std::fma(scale, product, static_cast<Acc>(static_cast<const Scalar*>(problem.mask.data)[offset]));
  case MaskKind::f32:
    return std::fma(scale, product, static_cast<Acc>(static_cast<const float*>(problem.mask.data)[offset]));
  case MaskKind::none:
    break;
  }
  return scale * product;
}

__device__ inline int64_t mask_offset(const Problem& problem, int64_t batch, int64_t head) {
  return batch * problem.mask.strides[0] + head * problem.mask.strides[1];
}

// Calls run.template operator()<HeadDim>() with the smallest head dim that the kernels are built for and both fit in.
template <typename Run>
void with_head_dim(const Problem& problem, Run&& run) {
  const int64_t head_dim = problem.dim_qk > problem.dim_v ? problem.dim_qk : problem.dim_v;
  if (head_dim <= 64) {
    run.template operator()<64>();
  } else if (head_dim <= 128) {
    run.template operator()<128>();
  } else if (head_dim <= 256) {
    run.template operator()<256>();
  } else {
    run.template operator()<512>();
  }
}

}  // namespace ptk::cuda
