// What the CUDA kernels of attention share: which tile a block works on, how many entries a thread holds, and the mask.
#pragma once

#include "csrc/cuda/tile.cuh"
#include "csrc/ops/attention/attention.h"

#include <cmath>
#include <cstdint>

namespace ptk::cuda {

// Entries of the score tile per thread are TileRows x TileCols. Rows is chosen so that the accumulators of
// `outputs` head-dim-wide results stay in registers: at most 128 of the 255 a thread can have.
template <typename Acc, int HeadDim, int Outputs>
struct AttentionTile {
  static constexpr int kChunks = HeadDim / kChunk;
  static constexpr int kMaxRows = sizeof(Acc) == 8 ? 2 : 4;
  static constexpr int kRegistersPerRow = Outputs * kChunks * kQuad * static_cast<int>(sizeof(Acc) / 4);
  static constexpr int kRows = 128 / kRegistersPerRow < kMaxRows ? 128 / kRegistersPerRow : kMaxRows;
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
__device__ Matrix<Scalar> head_matrix(const void* data, const int64_t (&strides)[4], int64_t batch, int64_t head,
                                      int64_t rows, int64_t cols) {
  return {static_cast<const Scalar*>(data) + batch * strides[0] + head * strides[1], strides[2], strides[3],
          static_cast<int>(rows), static_cast<int>(cols)};
}

// Scaled and masked score of one (row, col) of a head; -inf where row may not attend to col or either is outside.
template <typename Scalar, typename Acc>
__device__ Acc masked_score(const Problem& problem, int64_t mask_offset, int row, int col, Acc product) {
  if (row >= problem.len_q || col >= problem.len_k || (problem.is_causal && col > row)) {
    return -INFINITY;
  }
  const Acc score = static_cast<Acc>(problem.scale) * product;
  const int64_t offset = mask_offset + row * problem.mask_strides[2] + col * problem.mask_strides[3];
  switch (problem.mask_kind) {
  case MaskKind::boolean:
    return static_cast<const uint8_t*>(problem.mask)[offset] ? score : static_cast<Acc>(-INFINITY);
  case MaskKind::same_dtype:
    return score + static_cast<Acc>(static_cast<const Scalar*>(problem.mask)[offset]);
  case MaskKind::f32:
    return score + static_cast<const float*>(problem.mask)[offset];
  case MaskKind::none:
    break;
  }
  return score;
}

__device__ inline int64_t mask_offset(const Problem& problem, int64_t batch, int64_t head) {
  return batch * problem.mask_strides[0] + head * problem.mask_strides[1];
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
