// What the CUDA kernels of attention share: which tile a block works on, where a sequence lies, and what its rows see.
#pragma once

#include "csrc/cuda/tile.cuh"
#include "csrc/ops/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ptk::cuda {

// Score tile of a block on the CUDA cores, as entries per thread, when the block also accumulates `Outputs`
// head-dim-wide results in registers: as many rows as let those take at most 128 of the 255 that a thread can have.
// Where they take 16 or fewer, two blocks fit a multiprocessor.
template <typename Acc, int HeadDim, int Outputs>
struct AttentionTile {
  static constexpr int kChunks = HeadDim / kChunk;
  static constexpr int kMaxRows = sizeof(Acc) == 8 ? 2 : 4;
  static constexpr int kRegistersPerRow = Outputs * kChunks * kQuad * static_cast<int>(sizeof(Acc) / 4);
  static constexpr int kRows = std::clamp(128 / kRegistersPerRow, 1, kMaxRows);
  static constexpr int kBlocksPerMultiprocessor = kRows * kRegistersPerRow <= 16 ? 2 : 1;
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

// Indices from begin up to end.
struct Span {
  int begin;
  int end;
};

// One sequence of the batch: its lengths, its first rows in packed operands, and the band that its rows see: row i sees
// the keys from i + low up to i + high.
struct Sequence {
  int batch;
  int64_t first_q, first_k;
  int len_q, len_k;
  int diagonal, low, high;

  __device__ static int within(int64_t index, int length) {
    return static_cast<int>(index < 0 ? 0 : index > length ? length : index);
  }

  // Keys that a row sees; none where it lies outside.
  __device__ Span keys_of(int row) const {
    if (row >= len_q) {
      return {0, 0};
    }
    return {within(int64_t{row} + low, len_k), within(int64_t{row} + high, len_k)};
  }

  __device__ bool sees(int row, int key) const {
    const int offset = key - row;
    return row < len_q && key < len_k && offset >= low && offset < high;
  }

  // Keys that rows from row0 up to row1 see between them.
  __device__ Span keys_of(int row0, int row1) const { return {keys_of(row0).begin, keys_of(min(row1, len_q) - 1).end}; }

  // Rows that see any of the keys from key0 up to key1.
  __device__ Span rows_of(int key0, int key1) const {
    return {within(int64_t{key0} - high + 1, len_q), within(int64_t{min(key1, len_k)} - low, len_q)};
  }

  // Whether each of a tile's rows sees each of its keys. Rows outside count where they have nowhere to be written to.
  __device__ bool sees_all(int row0, int row1, int key0, int key1) const {
    return row1 <= len_q && key1 <= keys_of(row0).end && keys_of(row1 - 1).begin <= key0;
  }
};

__host__ __device__ inline Sequence sequence_of(const Problem& problem, int64_t batch) {
  Sequence s;
  s.batch = static_cast<int>(batch);
  s.first_q = 0;
  s.first_k = 0;
  s.len_q = static_cast<int>(problem.len_q);
  s.len_k = static_cast<int>(problem.len_k);
  if (problem.first_q != nullptr) {
    s.first_q = problem.first_q[batch];
    s.first_k = problem.first_k[batch];
    s.len_q = static_cast<int>(problem.first_q[batch + 1] - s.first_q);
    s.len_k = static_cast<int>(problem.first_k[batch + 1] - s.first_k);
  }
  s.diagonal = problem.bottom_right ? s.len_k - s.len_q : 0;
  // Bounds beyond the operands are all the same, and these fit an int.
  const int64_t right = problem.is_causal ? 0 : problem.right;
  s.low = static_cast<int>(max(s.diagonal - problem.left, -int64_t{s.len_q}));
  s.high = static_cast<int>(min(s.diagonal + right + 1, int64_t{s.len_k}));
  return s;
}

// Where a block works. Kept in shared memory by kernels that need their registers for gradients and outputs.
struct BlockPlace {
  BlockPosition position;
  Sequence sequence;
};

// By all threads, which meet in it.
__device__ inline void place_block(BlockPlace& place, const Problem& problem, int64_t heads, int64_t length, int tile) {
  if (threadIdx.x == 0) {
    place.position = block_position(heads, length, tile);
    place.sequence = sequence_of(problem, place.position.batch);
  }
  __syncthreads();
}

template <typename Scalar>
__device__ Matrix<Scalar> head_matrix(const ConstView& view, int64_t batch, int64_t head, int64_t first, int rows,
                                      int64_t cols) {
  return {static_cast<const Scalar*>(view.data) + batch * view.strides[0] + head * view.strides[1] +
              first * view.strides[2],
          view.strides[2], view.strides[3], rows, static_cast<int>(cols)};
}

// Rows of query, or of what is laid out like it, of one sequence and head.
template <typename Scalar>
__device__ Matrix<Scalar> query_matrix(const ConstView& view, const Sequence& s, int64_t head, int64_t cols) {
  return head_matrix<Scalar>(view, s.batch, head, s.first_q, s.len_q, cols);
}

template <typename Scalar>
__device__ Matrix<Scalar> key_matrix(const ConstView& view, const Sequence& s, int64_t head, int64_t cols) {
  return head_matrix<Scalar>(view, s.batch, head, s.first_k, s.len_k, cols);
}

template <typename Scalar>
__device__ Scalar* head_data(const View& view, int64_t batch, int64_t head, int64_t first) {
  return static_cast<Scalar*>(view.data) + batch * view.strides[0] + head * view.strides[1] + first * view.strides[2];
}

// Of lse and of what is laid out like it: [batch, heads, length], or [heads, rows] of packed sequences.
__device__ inline int64_t row_statistics_offset(const Problem& problem, const Sequence& s, int64_t head) {
  return problem.first_q != nullptr ? head * problem.total_q + s.first_q
                                    : (s.batch * problem.heads_q + head) * problem.len_q;
}

// Calls run.template operator()<HeadDim>() with the smallest head dim that the kernels on the CUDA cores are built for
// and both fit in. Narrow types have kernels of their own below 512.
template <typename Scalar, typename Run>
void with_head_dim(const Problem& problem, Run&& run) {
  const int64_t head_dim = problem.dim_qk > problem.dim_v ? problem.dim_qk : problem.dim_v;
  if constexpr (sizeof(Scalar) > 2) {
    if (head_dim <= 64) {
      return run.template operator()<64>();
    }
    if (head_dim <= 128) {
      return run.template operator()<128>();
    }
    if (head_dim <= 256) {
      return run.template operator()<256>();
    }
  }
  run.template operator()<512>();
}

}  // namespace ptk::cuda
