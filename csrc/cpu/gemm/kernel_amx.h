// Tile micro-kernel: 32 x 32 sums in four tiles, two tiles of A, two of B, one step of k = 64 bytes of A's rows.
//
// Four multiplications per four loads: every operand tile is used twice, and four independent sums cover the latency of
// the multiplier. A short last row block uses the upper two sum tiles only. Sums leave through a 4 KiB buffer in L1, or
// straight to memory where the epilogue is a plain store.
#pragma once

#include "kernel_vector.h"

#if PTK_ISA_LEVEL >= 5

namespace ptk::PTK_ISA::detail {

template <Multiply kMultiply>
struct TileMultiply;

#define PTK_DEFINE_TILE_MULTIPLY(kind, instruction)                                                                    \
  template <>                                                                                                          \
  struct TileMultiply<kind> {                                                                                          \
    PTK_INLINE void upper() {                                                                                          \
      instruction(0, 4, 6);                                                                                            \
      instruction(1, 4, 7);                                                                                            \
    }                                                                                                                  \
    PTK_INLINE void lower() {                                                                                          \
      instruction(2, 5, 6);                                                                                            \
      instruction(3, 5, 7);                                                                                            \
    }                                                                                                                  \
  }
PTK_DEFINE_TILE_MULTIPLY(Multiply::dot_bf16, PTK_TILE_DP_BF16);
PTK_DEFINE_TILE_MULTIPLY(Multiply::dot_s8, PTK_TILE_DP_S8S8);
PTK_DEFINE_TILE_MULTIPLY(Multiply::dot_u8, PTK_TILE_DP_U8S8);
#undef PTK_DEFINE_TILE_MULTIPLY

PTK_INLINE void zero_tiles() {
  PTK_TILE_ZERO(0);
  PTK_TILE_ZERO(1);
  PTK_TILE_ZERO(2);
  PTK_TILE_ZERO(3);
}

template <class S>
PTK_INLINE void store_tiles(S* p, int64_t ld, bool lower) {
  const int64_t stride = ld * static_cast<int64_t>(sizeof(S));
  PTK_TILE_STORE(0, p, stride);
  PTK_TILE_STORE(1, p + 16, stride);
  if (lower) {
    PTK_TILE_STORE(2, p + 16 * ld, stride);
    PTK_TILE_STORE(3, p + 16 * ld + 16, stride);
  }
}

template <class S>
PTK_INLINE void load_tiles(const S* p, int64_t ld, bool lower) {
  const int64_t stride = ld * static_cast<int64_t>(sizeof(S));
  PTK_TILE_LOAD(0, p, stride);
  PTK_TILE_LOAD(1, p + 16, stride);
  if (lower) {
    PTK_TILE_LOAD(2, p + 16 * ld, stride);
    PTK_TILE_LOAD(3, p + 16 * ld + 16, stride);
  }
}

// sums += A B over all blocks, in tiles 0 to 3.
template <class T>
PTK_INLINE void multiply_tiles(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                               bool lower) {
  using Mul = TileMultiply<GemmTraits<T>::kMultiply>;
  constexpr int nr = GemmTraits<T>::kNr, step = GemmTraits<T>::kKStep;
  static_assert(nr == 32);
  const int64_t a_stride = lda * static_cast<int64_t>(sizeof(Element<T>));
  for (int64_t block = 0; block < count; ++block) {
    const Element<T>* a = blocks[block].a + row * lda;
    const ElementB<T>* b = blocks[block].b;
    for (int64_t i = 0; i < k; i += step) {
      // A panel row holds the 32 columns' units of one k group: 128 bytes, half of them to each B tile.
      PTK_TILE_LOAD(6, b, 128);
      PTK_TILE_LOAD(7, reinterpret_cast<const char*>(b) + 64, 128);
      PTK_TILE_LOAD(4, a, a_stride);
      Mul::upper();
      if (lower) {
        PTK_TILE_LOAD(5, a + 16 * lda, a_stride);
        Mul::lower();
      }
      a += step;
      b += step * nr;
    }
  }
}

template <class T, class Epilogue>
PTK_INLINE void tile_kernel(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                            int64_t rows, int64_t column, int64_t columns, Epilogue& epilogue) {
  using S = Sum<T>;
  const bool lower = rows > 16;
  constexpr bool has_target = requires { epilogue.tile_target(row, column); };
  if constexpr (has_target) {
    if ((rows == 32 || rows == 16) && columns >= 32) {
      const auto target = epilogue.tile_target(row, column);
      if constexpr (Epilogue::kAddsTiles) {
        load_tiles(target.data, target.ld, lower);
      } else {
        zero_tiles();
      }
      multiply_tiles<T>(blocks, count, k, lda, row, lower);
      return store_tiles(target.data, target.ld, lower);
    }
  }
  prefetch_target(epilogue, rows, row, column);
  zero_tiles();
  multiply_tiles<T>(blocks, count, k, lda, row, lower);
  alignas(64) S buffer[32 * 32];
  store_tiles(buffer, 32, lower);
  if constexpr (StripEpilogue<Epilogue>) {
    epilogue.strip(static_cast<int>(rows), row, column, columns, buffer);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      epilogue(row + i, column, load(buffer + i * 32), columns < 16 ? columns : 16);
      if (columns > 16) epilogue(row + i, column + 16, load(buffer + i * 32 + 16), columns < 32 ? columns - 16 : 16);
    }
  }
}

}  // namespace ptk::PTK_ISA::detail

#endif
