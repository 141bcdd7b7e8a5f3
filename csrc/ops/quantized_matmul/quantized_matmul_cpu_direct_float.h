// Direct kernels for float input: codes become floats in registers.
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_direct_rows.h"

namespace ptk::PTK_ISA {

PTK_INLINE Vec<float> add_lanes(Vec<float> sum, const float* x, int64_t valid) {
  return sum + load_partial(x, valid);
}

// Any format, input in the order of k.
template <class D>
struct DirectFloat {
  static constexpr int64_t kBlock = kLanes<float>;

  template <int M, int R>
  static void dots(const DirectInput<false>& in, int64_t m0, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    constexpr int64_t bits = D::kBits;
    const int64_t whole = w.k / kBlock * kBlock;
    const float* x = in.x + m0 * in.ld;
    for (int64_t g = 0, k = 0; k < w.k; ++g) {
      const int64_t end = least((g + 1) * w.group, whole);
      Vec<float> part[R][M];
      clear<M, R>(part);
      for (; k < end; k += kBlock) {
        rows.prefetch(k / kBlock % R, k * bits / 8);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<float> value = D::values(rows.codes[r], k);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) part[r][m] += value * load(x + m * in.ld + k);
        }
      }
      for (; k < least((g + 1) * w.group, w.k); ++k)
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < M; ++m)
            part[r][m][0] += static_cast<float>(D::value(rows.codes[r], k)) * x[m * in.ld + k];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          if (w.zeros) part[r][m] -= rows.zeros[r][g] * load(in.sum(g, m0 + m));
          total[r][m] += rows.scales[r][g] * part[r][m];
        }
      }
    }
  }
};

// 4-bit codes, a vector of 32-bit words at a time: word l of a block holds codes 8 l to 8 l + 7, so step j of a block
// meets inputs j, 8 + j, 16 + j, ... The scale of a lane is that of its word. A register of sixteen floats is a table
// of what the codes stand for, and its lookup sees four bits only.
struct DirectNibbles {
  static constexpr int64_t kBlock = 8 * kLanes<float>;
  static constexpr bool kTable = kLanes<float> == 16;

  static bool suits(const QuantizedWeightView& w) {
    return (w.format == CodeFormat::u4 || (kTable && code_bits(w.format) == 4)) && w.k % kBlock == 0 &&
           (w.group % kBlock == 0 || kBlock % w.group == 0);
  }

  static void arrange(float* x, int64_t k) { arrange_lanes<8>(x, k); }

  PTK_INLINE Vec<float> values(Vec<uint32_t> words, int j, [[maybe_unused]] Vec<float> book) {
    if constexpr (kTable) {
      return __builtin_shuffle(book, bit_cast<Vec<int32_t>>(words >> (4 * j)));
    } else {
      return __builtin_convertvector(bit_cast<Vec<int32_t>>((words ^ 0x88888888u) << (28 - 4 * j)) >> 28, Vec<float>);
    }
  }

  template <int M, int R>
  static void dots(const DirectInput<false>& in, int64_t m0, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    const int64_t span = most(w.group, kBlock), parts = span / w.group;
    Vec<float> book = iota<float>() - 8.0f;
    if (kTable && w.format != CodeFormat::u4) book = load(codebook_of(w.format));
    const float* input = in.x + m0 * in.ld;
    for (int64_t k = 0, s = 0, g = 0; k < w.k; ++s, g += parts) {
      const int64_t end = least(k + span, w.k);
      Vec<float> part[R][M];
      clear<M, R>(part);
      for (; k < end; k += kBlock) {
        Vec<uint32_t> words[R];
        for (int r = 0; r < R; ++r) {
          rows.prefetch(r, k / 2);
          words[r] = load(reinterpret_cast<const uint32_t*>(rows.codes[r] + k / 2));
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          Vec<float> x[M];
          for (int m = 0; m < M; ++m) x[m] = load(input + m * in.ld + k + j * kLanes<float>);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const Vec<float> value = values(words[r], j, book);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) part[r][m] += value * x[m];
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<float> scale = spread_groups(rows.scales[r] + g, parts);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          if (w.zeros) part[r][m] -= spread_groups(rows.zeros[r] + g, parts) * load(in.sum(s, m0 + m));
          total[r][m] += scale * part[r][m];
        }
      }
    }
  }
};

}  // namespace ptk::PTK_ISA
