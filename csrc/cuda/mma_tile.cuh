// Tile products on the tensor cores, from sm_80 on: what a fused kernel needs to multiply tiles of 16-bit rows in
// shared memory, accumulating in the registers of warps that each own 16 * MTiles rows of the result.
//
// A RowTile holds rows of up to Dim columns in panels of 64 columns. In a panel a row is 128 bytes, and chunk c of 16
// bytes lies at c ^ (row % 8): eight rows of one chunk, which is what ldmatrix reads at a time, lie in eight different
// groups of banks. It is the layout that TMA writes and wgmma reads with a swizzle of 128 bytes.
#pragma once

#include "csrc/cuda/async_copy.cuh"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/tile.cuh"

namespace ptk::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int kPanelCols = 64;
inline constexpr int kChunkCols = 8;  // 16 bytes
inline constexpr float kLog2E = 1.44269504088896341f;

__device__ inline int lane_index() {
  return threadIdx.x % kWarpSize;
}

__device__ inline int warp_index() {
  return threadIdx.x / kWarpSize;
}

template <typename Scalar, int Rows, int Dim>
struct alignas(1024) RowTile {
  static_assert(Rows % 8 == 0 && Dim % 16 == 0);
  static constexpr int kPanels = (Dim + kPanelCols - 1) / kPanelCols;
  Scalar data[kPanels * Rows * kPanelCols];

  // The 8 columns from `col`, a multiple of 8.
  __device__ Scalar* chunk(int row, int col) {
    const int place = (col / kChunkCols % kChunkCols) ^ (row % 8);
    return data + (col / kPanelCols * Rows + row) * kPanelCols + place * kChunkCols;
  }
};

// Products of a warp: entry (row(i), col(j)) of a tile of 16 * MTiles x 8 * NTiles is at(i, j).
template <int MTiles, int NTiles>
struct MmaTile {
  using Acc = float;
  static constexpr int kRows = 2 * MTiles;
  static constexpr int kCols = 2 * NTiles;
  static constexpr int kLanesPerRow = 4;
  static constexpr int kTileRows = 16 * MTiles;
  static constexpr int kTileCols = 8 * NTiles;
  float tiles[MTiles][NTiles][4];

  __device__ float& at(int i, int j) { return tiles[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ static int row(int i) { return i / 2 * 16 + i % 2 * 8 + lane_index() / 4; }
  __device__ static int col(int j) { return j / 2 * 8 + lane_index() % 4 * 2 + j % 2; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        at(i, j) = 0;
      }
    }
  }

  __device__ static float exp(float x) { return exp2_approximate(x * kLog2E); }
  // exp(unit * product - shift)
  __device__ static float exp_of_product(float product, float unit, float shift) {
    return exp2_approximate(std::fma(product, unit * kLog2E, -(shift * kLog2E)));
  }
  // Absolute error below 2e-7.
  __device__ static float tanh(float x) { return 1 - divide_approximate(2, exp2_approximate(x * (2 * kLog2E)) + 1); }
};

// Whether rows can be copied 16 bytes at a time.
template <typename Scalar>
__device__ bool is_copied_in_chunks(const Matrix<Scalar>& matrix) {
  return matrix.col_stride == 1 && matrix.row_stride % kChunkCols == 0 &&
         reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
}

// Starts to load rows from row0 on, by Threads threads; zeros stand in for what lies outside the matrix. Matrices that
// cannot be copied in chunks are loaded before this returns. Either way a group of copies is complete after it, and the
// rows are there when every thread has waited for its group and then met the others at a barrier.
template <int Threads, typename Scalar, int Rows, int Dim>
__device__ void load_rows(RowTile<Scalar, Rows, Dim>& tile, const Matrix<Scalar>& matrix, int row0) {
  constexpr int kChunks = Dim / kChunkCols;
  const bool in_chunks = is_copied_in_chunks(matrix);
#pragma unroll 2
  for (int index = threadIdx.x; index < Rows * kChunks; index += Threads) {
    const int row = index / kChunks;
    const int col = index % kChunks * kChunkCols;
    const int inside = row0 + row < matrix.rows ? max(0, min(kChunkCols, matrix.cols - col)) : 0;
    const Scalar* source = matrix.data + (row0 + row) * matrix.row_stride + col * matrix.col_stride;
    Scalar* target = tile.chunk(row, col);
    if (in_chunks) {
      copy_async(target, inside > 0 ? source : matrix.data, inside * static_cast<int>(sizeof(Scalar)));
    } else {
      for (int k = 0; k < kChunkCols; ++k) {
        target[k] = k < inside ? source[k * matrix.col_stride] : Scalar(0);
      }
    }
  }
  commit_copies();
}

// scores += <left row, right row> for the warp's rows of left, from left_row on, and the first rows of right.
template <typename Scalar, int LeftRows, int RightRows, int Dim, int MTiles, int NTiles>
__device__ void product_of_rows(MmaTile<MTiles, NTiles>& scores, RowTile<Scalar, LeftRows, Dim>& left, int left_row,
                                RowTile<Scalar, RightRows, Dim>& right) {
  static_assert(NTiles % 2 == 0);
  const int lane = lane_index();
#pragma unroll
  for (int k = 0; k < Dim; k += 16) {
    uint32_t a[MTiles][4];
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      load_matrices(a[m], left.chunk(left_row + m * 16 + lane % 16, k + lane / 16 * 8));
    }
#pragma unroll
    for (int n = 0; n < NTiles; n += 2) {
      uint32_t b[4];
      load_matrices(b, right.chunk(n * 8 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
#pragma unroll
      for (int m = 0; m < MTiles; ++m) {
        multiply_accumulate<Scalar>(scores.tiles[m][n], a[m], b[0], b[1]);
        multiply_accumulate<Scalar>(scores.tiles[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Weights as left operands: the layout of a product is that of two neighbouring operands, whose registers take half as
// many.
template <int MTiles, int NTiles>
struct PackedTile {
  uint32_t pairs[MTiles][NTiles / 2][4];
};

template <typename Scalar, int MTiles, int NTiles>
__device__ PackedTile<MTiles, NTiles> pack(const MmaTile<MTiles, NTiles>& weights) {
  static_assert(NTiles % 2 == 0);
  PackedTile<MTiles, NTiles> packed;
#pragma unroll
  for (int m = 0; m < MTiles; ++m) {
#pragma unroll
    for (int n = 0; n < NTiles; ++n) {
      const float (&w)[4] = weights.tiles[m][n];
      packed.pairs[m][n / 2][n % 2 * 2] = pack_pair<Scalar>(w[0], w[1]);
      packed.pairs[m][n / 2][n % 2 * 2 + 1] = pack_pair<Scalar>(w[2], w[3]);
    }
  }
  return packed;
}

// outputs += weights * the first rows of values.
template <typename Scalar, int Rows, int Dim, int MTiles, int NTiles>
__device__ void add_weighted_rows(MmaTile<MTiles, Dim / 8>& outputs, const PackedTile<MTiles, NTiles>& weights,
                                  RowTile<Scalar, Rows, Dim>& values) {
  const int lane = lane_index();
#pragma unroll
  for (int n = 0; n < NTiles; n += 2) {
#pragma unroll
    for (int d = 0; d < Dim; d += 16) {
      uint32_t b[4];
      load_matrices_transposed(b, values.chunk(n * 8 + lane % 16, d + lane / 16 * 8));
#pragma unroll
      for (int m = 0; m < MTiles; ++m) {
        multiply_accumulate<Scalar>(outputs.tiles[m][d / 8], weights.pairs[m][n / 2], b[0], b[1]);
        multiply_accumulate<Scalar>(outputs.tiles[m][d / 8 + 1], weights.pairs[m][n / 2], b[2], b[3]);
      }
    }
  }
}

// Writes factor[i] * outputs, rounded to Scalar, where they lie inside a matrix of unit column stride.
template <int MTiles, int NTiles, typename Scalar>
__device__ void store_outputs(MmaTile<MTiles, NTiles>& outputs, const float (&factor)[2 * MTiles], Scalar* data,
                              int64_t row_stride, int row0, int rows, int cols) {
  const bool in_pairs = reinterpret_cast<uintptr_t>(data) % 4 == 0 && row_stride % 2 == 0;
#pragma unroll
  for (int i = 0; i < 2 * MTiles; ++i) {
    const int row = row0 + outputs.row(i);
    if (row < rows) {
#pragma unroll
      for (int j = 0; j < 2 * NTiles; j += 2) {
        const int col = outputs.col(j);
        Scalar* target = data + row * row_stride + col;
        const float low = factor[i] * outputs.at(i, j), high = factor[i] * outputs.at(i, j + 1);
        if (in_pairs && col + 1 < cols) {
          *reinterpret_cast<uint32_t*>(target) = pack_pair<Scalar>(low, high);
        } else {
          if (col < cols) target[0] = static_cast<Scalar>(low);
          if (col + 1 < cols) target[1] = static_cast<Scalar>(high);
        }
      }
    }
  }
}

}  // namespace ptk::cuda
