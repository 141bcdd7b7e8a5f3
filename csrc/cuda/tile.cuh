// Tile products on the CUDA cores: what a fused kernel needs to multiply strided matrices of any size through small
// tiles in shared memory, accumulating in registers.
//
// A block is kThreads threads seen as a grid of kGrid x kGrid. The thread at (ty, tx) holds
//   scores.at(i, j)  = entry (ty * Rows + i, tx + kGrid * j)                of a score tile (product_of_rows),
//   outputs[c][i][j] = entry (ty * Rows + i, c * kChunk + tx * kQuad + j)   of an output (add_weighted_rows).
// Interleaved columns in the one and quads in the other keep all reads of shared memory 16 bytes wide and free of bank
// conflicts. A row of scores lives in kGrid consecutive lanes of one warp.
//
// Everything is accumulated in float (double for double). Offsets into global memory are 64-bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace ptk::cuda {

inline constexpr int kGrid = 16;
inline constexpr int kThreads = kGrid * kGrid;
inline constexpr int kQuad = 4;
inline constexpr int kChunk = kGrid * kQuad;  // columns of outputs per step
inline constexpr int kDepth = 32;             // summed-over columns of product_of_rows per step

template <typename Scalar>
using AccumulatorOf = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <typename Acc>
inline constexpr int kPadding = 16 / sizeof(Acc);

template <typename Acc>
struct alignas(16) Quad {
  Acc at[kQuad];
};

// A rows x cols matrix in global memory.
template <typename Scalar>
struct Matrix {
  const Scalar* data;
  int64_t row_stride;
  int64_t col_stride;
  int rows;
  int cols;
};

template <typename Acc, int Height, int Width>
using Tile = Acc[Height][Width + kPadding<Acc>];

__device__ inline int thread_row() {
  return threadIdx.x / kGrid;
}

__device__ inline int thread_col() {
  return threadIdx.x % kGrid;
}

// Shared memory of one block. The operands of one product at a time live in it.
template <typename Acc, int Rows, int Cols>
struct alignas(16) Tiles {
  union {
    struct {
      Tile<Acc, kGrid * Rows, kDepth> left;
      Tile<Acc, kGrid * Cols, kDepth> right;
    };
    Tile<Acc, kGrid * Cols, kChunk> values;
  };
  Tile<Acc, kGrid * Rows, kGrid * Cols> weights;

  // The entry of weights that belongs to this thread's scores[i][j].
  __device__ Acc& weight(int i, int j) { return weights[thread_row() * Rows + i][thread_col() + kGrid * j]; }
};

template <typename Acc>
__device__ Quad<Acc> load_quad(const Acc* source) {
  return *reinterpret_cast<const Quad<Acc>*>(source);
}

// Zeros stand in for what lies outside the matrix, so that tails need no other care. Neighbouring threads load
// neighbouring columns. A few loads in flight per thread are enough, and more would cost registers.
template <int Height, int Width, typename Acc, typename Scalar>
__device__ void load_tile(Tile<Acc, Height, Width>& tile, const Matrix<Scalar>& matrix, int row0, int col0) {
  constexpr int kStep = kThreads / Width;
  static_assert(kThreads % Width == 0 && Height % kStep == 0);
  const int col = threadIdx.x % Width;
  const int first = threadIdx.x / Width;
  const int rows = col0 + col < matrix.cols ? matrix.rows - row0 : 0;
  const Scalar* source = matrix.data + (row0 + first) * matrix.row_stride + (col0 + col) * matrix.col_stride;
#pragma unroll 4
  for (int row = first; row < Height; row += kStep) {
    tile[row][col] = row < rows ? static_cast<Acc>(*source) : Acc(0);
    source += kStep * matrix.row_stride;
  }
}

// Scores of a block: entry (row(i), col(j)) of its tile is at(i, j) of the thread.
template <typename Number, int Rows, int Cols>
struct ThreadTile {
  using Acc = Number;
  static constexpr int kRows = Rows;
  static constexpr int kCols = Cols;
  static constexpr int kLanesPerRow = kGrid;
  static constexpr int kTileRows = kGrid * Rows;
  static constexpr int kTileCols = kGrid * Cols;
  Acc entries[Rows][Cols];

  __device__ Acc& at(int i, int j) { return entries[i][j]; }
  __device__ static int row(int i) { return thread_row() * Rows + i; }
  __device__ static int col(int j) { return thread_col() + kGrid * j; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
#pragma unroll
      for (int j = 0; j < Cols; ++j) {
        entries[i][j] = 0;
      }
    }
  }

  __device__ static Acc exp(Acc x) { return std::exp(x); }
  // exp(unit * product - shift)
  __device__ static Acc exp_of_product(Acc product, Acc unit, Acc shift) {
    return std::exp(std::fma(unit, product, -shift));
  }
  __device__ static Acc tanh(Acc x) { return std::tanh(x); }
};

// scores.at(i, j) += <left row, right row>, for the tile of left's rows from left_row0 and right's rows from
// right_row0.
template <int Rows, int Cols, typename Acc, typename Scalar>
__device__ void product_of_rows(Tiles<Acc, Rows, Cols>& tiles, const Matrix<Scalar>& left, int left_row0,
                                const Matrix<Scalar>& right, int right_row0, ThreadTile<Acc, Rows, Cols>& scores) {
  for (int depth0 = 0; depth0 < left.cols; depth0 += kDepth) {
    __syncthreads();  // nobody still reads the tiles that are about to be overwritten
    load_tile<kGrid * Rows, kDepth>(tiles.left, left, left_row0, depth0);
    load_tile<kGrid * Cols, kDepth>(tiles.right, right, right_row0, depth0);
    __syncthreads();
#pragma unroll 1
    for (int depth = 0; depth < kDepth; depth += kQuad) {
      Quad<Acc> b[Cols];
#pragma unroll
      for (int j = 0; j < Cols; ++j) {
        b[j] = load_quad(&tiles.right[thread_col() + kGrid * j][depth]);
      }
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
        const Quad<Acc> a = load_quad(&tiles.left[thread_row() * Rows + i][depth]);
#pragma unroll
        for (int j = 0; j < Cols; ++j) {
#pragma unroll
          for (int k = 0; k < kQuad; ++k) {
            scores.entries[i][j] = std::fma(a.at[k], b[j].at[k], scores.entries[i][j]);
          }
        }
      }
    }
  }
}

// No barrier of its own: between the add_weighted_rows that read the last weights and this lies a product_of_rows.
template <int Rows, int Cols, typename Acc>
__device__ void store_weights(Tiles<Acc, Rows, Cols>& tiles, const ThreadTile<Acc, Rows, Cols>& weights) {
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
#pragma unroll
    for (int j = 0; j < Cols; ++j) {
      tiles.weight(i, j) = weights.entries[i][j];
    }
  }
}

// outputs += weights (as last stored) * the tile of values' rows from row0. Chunks that lie outside the matrix are
// skipped.
template <int Rows, int Cols, int Chunks, typename Acc, typename Scalar>
__device__ void add_weighted_rows(Tiles<Acc, Rows, Cols>& tiles, const Matrix<Scalar>& values, int row0,
                                  Acc (&outputs)[Chunks][Rows][kQuad]) {
#pragma unroll
  for (int chunk = 0; chunk < Chunks; ++chunk) {
    if (chunk * kChunk < values.cols) {
      __syncthreads();
      load_tile<kGrid * Cols, kChunk>(tiles.values, values, row0, chunk * kChunk);
      __syncthreads();
#pragma unroll 1
      for (int depth = 0; depth < kGrid * Cols; depth += kQuad) {
        Quad<Acc> b[kQuad];
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          b[k] = load_quad(&tiles.values[depth + k][thread_col() * kQuad]);
        }
#pragma unroll
        for (int i = 0; i < Rows; ++i) {
          const Quad<Acc> a = load_quad(&tiles.weights[thread_row() * Rows + i][depth]);
#pragma unroll
          for (int k = 0; k < kQuad; ++k) {
#pragma unroll
            for (int j = 0; j < kQuad; ++j) {
              outputs[chunk][i][j] = std::fma(a.at[k], b[k].at[j], outputs[chunk][i][j]);
            }
          }
        }
      }
    }
  }
}

// Largest `value` among groups of Lanes neighbouring lanes. A NaN does not win here; it reaches the result through exp.
template <int Lanes, typename Acc>
__device__ Acc max_over_lanes(Acc value) {
#pragma unroll
  for (int lane = Lanes / 2; lane > 0; lane /= 2) {
    value = std::fmax(value, __shfl_xor_sync(0xffffffffu, value, lane));
  }
  return value;
}

template <int Lanes, typename Acc>
__device__ Acc sum_over_lanes(Acc value) {
#pragma unroll
  for (int lane = Lanes / 2; lane > 0; lane /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, lane);
  }
  return value;
}

// Writes factor[i] * outputs where they lie inside a matrix of unit column stride.
template <int Rows, int Chunks, typename Acc, typename Scalar>
__device__ void store_outputs(const Acc (&outputs)[Chunks][Rows][kQuad], const Acc (&factor)[Rows], Scalar* data,
                              int64_t row_stride, int row0, int rows, int cols) {
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
    const int row = row0 + thread_row() * Rows + i;
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const int col = chunk * kChunk + thread_col() * kQuad + j;
        if (row < rows && col < cols) {
          data[row * row_stride + col] = static_cast<Scalar>(factor[i] * outputs[chunk][i][j]);
        }
      }
    }
  }
}

}  // namespace ptk::cuda
