// Dropout of attention weights: 16 bits of philox(seed, {key, row / 8, head, batch}) decide for one weight, as on the
// CPU. One call of the generator serves one key and eight rows, which in tiles on the tensor cores belong to different
// lanes: each lane draws for one key and lanes exchange, so that no call is made twice.
#pragma once

#include "csrc/cuda/mma_tile.cuh"
#include "csrc/cuda/philox.cuh"
#include "csrc/ops/attention/attention_tile.cuh"

namespace ptk::cuda {

// Which entries of a thread's part of a tile are kept.
template <typename Tile>
struct KeptEntries {
  static constexpr int kCount = Tile::kRows * Tile::kCols;
  uint32_t words[(kCount + 31) / 32] = {};

  __device__ void set(int i, int j, bool kept) {
    const int index = i * Tile::kCols + j;
    words[kCount <= 32 ? 0 : index / 32] |= static_cast<uint32_t>(kept) << (index % 32);
  }
  __device__ bool at(int i, int j) const {
    const int index = i * Tile::kCols + j;
    return words[index / 32] >> (index % 32) & 1;
  }
  // Clears what is dropped, multiplies the rest.
  __device__ void apply(Tile& tile, typename Tile::Acc factor) const {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kCols; ++j) {
        tile.at(i, j) = at(i, j) ? tile.at(i, j) * factor : 0;
      }
    }
  }
};

__device__ inline uint32_t exchange(uint32_t value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Eight lanes that differ in bits 2 to 4 each hold eight 16-bit numbers, number n for the n-th of them, in words of
// two. After it, halves[n] is what the n-th lane held for this one.
__device__ inline void transpose_halves(const uint32_t (&words)[4], uint32_t (&halves)[8]) {
  const int me = lane_index() / 4;
  const bool b2 = me & 4, b1 = me & 2, b0 = me & 1;
  uint32_t pairs[2][2];  // [bit 2 of the source][word]
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const uint32_t own = b2 ? words[2 + v] : words[v], other = exchange(b2 ? words[v] : words[2 + v], 16);
    pairs[0][v] = b2 ? other : own;
    pairs[1][v] = b2 ? own : other;
  }
  uint32_t singles[2][2];  // [bit 2 of the source][bit 1 of the source]
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint32_t own = b1 ? pairs[s][1] : pairs[s][0], other = exchange(b1 ? pairs[s][0] : pairs[s][1], 8);
    singles[s][0] = b1 ? other : own;
    singles[s][1] = b1 ? own : other;
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint32_t lows = (singles[s][0] & 0xffffu) | singles[s][1] << 16;
    const uint32_t highs = singles[s][0] >> 16 | (singles[s][1] & 0xffff0000u);
    const uint32_t own = b0 ? highs : lows, other = exchange(b0 ? lows : highs, 4);
    const uint32_t even = b0 ? other : own, odd = b0 ? own : other;  // by bit 0 of the source
    halves[s * 4] = even & 0xffffu;
    halves[s * 4 + 1] = odd & 0xffffu;
    halves[s * 4 + 2] = even >> 16;
    halves[s * 4 + 3] = odd >> 16;
  }
}

// The same of four lanes that differ in bits 0 and 1, four words each.
__device__ inline void transpose_words(uint32_t (&words)[4]) {
  const int me = lane_index() % 4;
  const bool b1 = me & 2, b0 = me & 1;
  uint32_t pairs[2][2];
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const uint32_t own = b1 ? words[2 + v] : words[v], other = exchange(b1 ? words[v] : words[2 + v], 2);
    pairs[0][v] = b1 ? other : own;
    pairs[1][v] = b1 ? own : other;
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint32_t own = b0 ? pairs[s][1] : pairs[s][0], other = exchange(b0 ? pairs[s][0] : pairs[s][1], 1);
    words[s * 2] = b0 ? other : own;
    words[s * 2 + 1] = b0 ? own : other;
  }
}

class Dropout {
public:
  __device__ Dropout(const Problem& problem, int64_t batch, int64_t head)
      : is_used_(problem.seeds != nullptr), keep_below_(problem.keep_below), head_(static_cast<uint32_t>(head)) {
    if (is_used_) {
      const auto per_seed = static_cast<uint32_t>(problem.batch_per_seed);
      batch_ = static_cast<uint32_t>(batch) % per_seed;
      seed_ = static_cast<uint64_t>(problem.seeds[static_cast<uint32_t>(batch) / per_seed]);
    }
  }

  __device__ bool is_used() const { return is_used_; }

  // What kept weights are multiplied with; where none is kept, nothing is divided by 0.
  template <typename Acc>
  __device__ Acc factor() const {
    return is_used_ && keep_below_ > 0
               ? divide_in_range(static_cast<Acc>(Problem::kKeepAll), static_cast<Acc>(keep_below_))
               : Acc(1);
  }

  // row0 and, in a transposed tile, col0 are multiples of 8 where the tile is one of the tensor cores.
  template <bool Transposed, typename Tile>
  __device__ KeptEntries<Tile> draw(int row0, int col0) const {
    KeptEntries<Tile> kept;
    if constexpr (Tile::kLanesPerRow != 4) {
      draw_alone<Transposed>(kept, row0, col0);
    } else if constexpr (Transposed) {
      draw_transposed(kept, row0, col0);
    } else {
      draw_together(kept, row0, col0);
    }
    return kept;
  }

private:
  __device__ void bits_of(int key, int group, uint32_t (&bits)[4]) const {
    philox(static_cast<uint32_t>(key), static_cast<uint32_t>(group), head_, batch_, seed_, bits);
  }

  __device__ bool is_kept(uint32_t half) const { return half < keep_below_; }

  template <bool Transposed, typename Tile>
  __device__ void draw_alone(KeptEntries<Tile>& kept, int row0, int col0) const {
    static_assert(Tile::kRows * Tile::kCols <= 32);  // one word, whose bits can be chosen at run time
#pragma unroll 1
    for (int index = 0; index < Tile::kRows * Tile::kCols; ++index) {
      const int i = index / Tile::kCols, j = index % Tile::kCols;
      const int row = row0 + Tile::row(i), col = col0 + Tile::col(j);
      const int query = Transposed ? col : row;
      uint32_t bits[4];
      bits_of(Transposed ? row : col, query / 8, bits);
      const uint32_t low = query & 2 ? bits[1] : bits[0], high = query & 2 ? bits[3] : bits[2];
      const uint32_t word = query & 4 ? high : low;
      kept.set(i, j, is_kept(query & 1 ? word >> 16 : word & 0xffffu));
    }
  }

  template <typename Tile>
  __device__ void draw_together(KeptEntries<Tile>& kept, int row0, int col0) const {
    static_assert(Tile::kCols % 8 == 0);
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j0 = 0; j0 < Tile::kCols; j0 += 8) {
        uint32_t bits[4], halves[8];
        bits_of(col0 + Tile::col(j0 + lane / 4), (row0 + i / 2 * 16 + i % 2 * 8) / 8, bits);
        transpose_halves(bits, halves);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          kept.set(i, j0 + j, is_kept(halves[j]));
        }
      }
    }
  }

  template <typename Tile>
  __device__ void draw_transposed(KeptEntries<Tile>& kept, int row0, int col0) const {
    static_assert(Tile::kCols % 8 == 0);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j0 = 0; j0 < Tile::kCols; j0 += 8) {
        uint32_t bits[4];
        bits_of(row0 + Tile::row(i), col0 / 8 + j0 / 2 + lane_index() % 4, bits);
        transpose_words(bits);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          kept.set(i, j0 + j, is_kept(j % 2 ? bits[j / 2] >> 16 : bits[j / 2] & 0xffffu));
        }
      }
    }
  }

  bool is_used_;
  uint32_t keep_below_;
  uint32_t head_, batch_ = 0;
  uint64_t seed_ = 0;
};

}  // namespace ptk::cuda
