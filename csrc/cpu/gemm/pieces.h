// Products of float32 from bfloat16 pieces, for levels whose bfloat16 products are many times as fast as float32's.
//
//   x = hi + lo + rest,   hi = bf16(x),  lo = bf16(x - hi),   |rest| <= 2^-17 |x|
//
//   3 products  a b ~ hi hi' + hi lo' + lo hi'     relative error of a product below 2^-15
//   1 product   a b ~ hi hi'                       below 2^-7
//
// Sums are float32. An operand lies as bfloat16 operands do, with a second plane for lo where there are three products:
// behind it in every row of A (half of the row stride on) and in every panel of B (half of the panel stride on). The
// engine sums over a list of blocks: the products are its blocks, the small ones first.
#pragma once

#include "gemm.h"

namespace ptk::PTK_ISA {

template <int kProducts>
struct f32_pieces {};

// How many planes an operand has.
template <class G>
inline constexpr int kPlanes = 1;
template <>
inline constexpr int kPlanes<f32_pieces<3>> = 2;

#if PTK_ISA_LEVEL >= 4

template <int kProducts>
struct GemmTraits<f32_pieces<kProducts>> : GemmTraits<bf16> {};

// hi[i] + lo[i] ~ src[i * stride] for i < n, zeros up to n_padded; without `lo` hi alone.
static inline void split_row(const float* src, int64_t stride, int64_t n, int64_t n_padded, bf16* hi, bf16* lo) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes<float> <= n; i += kLanes<float>) {
      const Vec<float> x = load(src + i);
      store_as(hi + i, x);
      // Infinity less infinity would be NaN, and hi says all there is to say.
      const Vec<float> high = load_as(hi + i), rest = x == high ? Vec<float>{} : x - high;
      if (lo) store_as(lo + i, rest);
    }
  }
  for (; i < n; ++i) {
    const float x = src[i * stride];
    hi[i] = to_bf16(x);
    const float high = to_float(hi[i]);
    if (lo) lo[i] = to_bf16(x == high ? 0 : x - high);
  }
  std::memset(hi + n, 0, (n_padded - n) * sizeof(bf16));
  if (lo) std::memset(lo + n, 0, (n_padded - n) * sizeof(bf16));
}

// As pack_a and pack_b. `ld` and `panel_stride` count all planes.
template <class G>
static inline void pack_a_pieces(const float* src, int64_t stride_m, int64_t stride_k, int64_t m, int64_t k, bf16* dst,
                                 int64_t ld) {
  for (int64_t i = 0; i < m; ++i) {
    bf16* row = dst + i * ld;
    split_row(src + i * stride_m, stride_k, k, padded_k<G>(k), row, kPlanes<G> > 1 ? row + ld / 2 : nullptr);
  }
}

template <class G>
static inline void pack_b_pieces(const float* src, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n, bf16* dst,
                                 int64_t panel_stride) {
  constexpr int64_t nr = GemmTraits<G>::kNr, depth = 64;
  alignas(64) bf16 hi[nr * depth], lo[nr * depth];
  for (int64_t n0 = 0; n0 < n; n0 += nr, dst += panel_stride) {
    const int64_t columns = least(nr, n - n0);
    for (int64_t k0 = 0; k0 < k; k0 += depth) {
      const int64_t count = least(depth, k - k0), padded = padded_k<G>(count);
      const float* from = src + n0 * stride_n + k0 * stride_k;
      // Split along what is contiguous.
      const bool by_column = stride_k == 1;
      const int64_t lines = by_column ? columns : count, length = by_column ? count : columns;
      const int64_t to = by_column ? depth : nr;
      for (int64_t i = 0; i < lines; ++i)
        split_row(from + i * (by_column ? stride_n : stride_k), by_column ? 1 : stride_n, length, length, hi + i * to,
                  lo + i * to);
      for (int plane = 0; plane < kPlanes<G>; ++plane)
        pack_b_panel<bf16>(plane ? lo : hi, by_column ? 1 : nr, by_column ? depth : 1, count, columns,
                           dst + plane * panel_stride / 2 + k0 * nr, padded);
    }
  }
}

template <class G, class Epilogue>
PTK_INLINE void gemm_pieces(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b,
                            int64_t panel_stride, const Epilogue& epilogue) {
  const GemmBlock<bf16> blocks[] = {{a + lda / 2, b}, {a, b + panel_stride / 2}, {a, b}};
  constexpr int count = kPlanes<G> > 1 ? 3 : 1;
  gemm<bf16>(m, n, k, blocks + 3 - count, count, lda, panel_stride, epilogue);
}

#endif

}  // namespace ptk::PTK_ISA
