// Direct kernels for quantized input: exact sums of integers over a group.
//
//   up to avx512        both operands widened to 16 bits, products added in pairs
//   from avx512_vnni on products of unsigned codes of the weight and signed codes of the input, added in fours: 4-bit
//                       codes are unsigned as they are, signed bytes become so with their sign bit flipped. What that
//                       adds, 8 or 128 sums of the input's codes, is what the sums start from, negated.
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_direct_rows.h"

namespace ptk::PTK_ISA {

// total[r][m] += scale * (part - zero * sum of the input's codes), in the lanes of the groups of a span.
template <int M, int R>
PTK_INLINE void fold_integers(const DirectInput<true>& in, int64_t m0, const DirectRows<R>& rows, int64_t span,
                              int64_t g, int64_t parts, float per_sum, Vec<int32_t> (&part)[R][M],
                              Vec<float> (&total)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Vec<float> scale = spread_groups(rows.scales[r] + g, parts);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Vec<float> sum = __builtin_convertvector(part[r][m], Vec<float>);
      if (in.w.zeros)
        sum -= spread_groups(rows.zeros[r] + g, parts) * per_sum *
               __builtin_convertvector(load(in.sum(span, m0 + m)), Vec<float>);
      total[r][m] += scale * sum;
    }
  }
}

#if PTK_ISA_LEVEL >= 3

// Bytes of `a` are unsigned, those of `b` signed.
PTK_INLINE Vec<int32_t> dot_bytes(Vec<int32_t> sum, Vec<uint8_t> a, Vec<int8_t> b) {
#if PTK_EMULATE
  const Vec<uint32_t> x = bit_cast<Vec<uint32_t>>(a), y = bit_cast<Vec<uint32_t>>(b);
  for (int byte = 0; byte < 4; ++byte)
    sum += bit_cast<Vec<int32_t>>(x >> 8 * byte & 0xff) * (bit_cast<Vec<int32_t>>(y << (24 - 8 * byte)) >> 24);
  return sum;
#else
  return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#endif
}

// Codes in a vector.
PTK_INLINE int64_t integer_block(const QuantizedWeightView& w) {
  return w.format == CodeFormat::u4 ? 128 : 64;
}
PTK_INLINE Vec<int32_t> add_lanes(Vec<int32_t> sum, const DirectCode* codes, int64_t) {
  return dot_bytes(sum, broadcast<uint8_t>(1), load(codes));
}
// What a code is above its value, negated.
PTK_INLINE int32_t integer_factor(const QuantizedWeightView& w) {
  return w.format == CodeFormat::u4 ? -8 : -128;
}

struct DirectBytes {
  static constexpr int64_t kBlock = 64;

  static bool suits(const QuantizedWeightView& w) {
    return w.format == CodeFormat::s8 &&
           (w.groups() == 1 || w.group % kBlock == 0 || (kBlock % w.group == 0 && w.k % kBlock == 0));
  }

  PTK_INLINE Vec<uint8_t> codes(const uint8_t* p, int64_t valid) {
    Vec<uint8_t> v;
    if (valid >= kBlock) {
      v = load(p);
    } else {
#if PTK_X86_AVX512
      v = (Vec<uint8_t>)_mm512_maskz_loadu_epi8((1ull << valid) - 1, p);
#else
      v = load_partial(p, valid);
#endif
    }
    return v ^ 0x80;
  }

  template <int M, int R>
  static void dots(const DirectInput<true>& in, int64_t m0, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    const int64_t span = most(w.group, kBlock), parts = w.groups() == 1 ? 1 : span / w.group;
    const DirectCode* x = in.codes + m0 * in.ld;
    for (int64_t k = 0, s = 0, g = 0; k < w.k; ++s, g += parts) {
      const int64_t end = least(k + span, w.k);
      Vec<int32_t> part[R][M];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) part[r][m] = load(in.sum(s, m0 + m));
      }
      for (; k < end; k += kBlock) {
        Vec<int8_t> input[M];
        for (int m = 0; m < M; ++m) input[m] = load(x + m * in.ld + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          rows.prefetch(r, k);
          const Vec<uint8_t> code = codes(rows.codes[r] + k, w.k - k);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) part[r][m] = dot_bytes(part[r][m], code, input[m]);
        }
      }
      k = end;
      fold_integers<M, R>(in, m0, rows, s, g, parts, -1.0f / 128, part, total);
    }
  }
};

// Codes of even k in the low halves of bytes, of odd k in the high halves.
struct DirectNibblesByBytes {
  static constexpr int64_t kBlock = 128;

  static bool suits(const QuantizedWeightView& w) {
    return w.format == CodeFormat::u4 && w.k % kBlock == 0 && (w.group % kBlock == 0 || kBlock % w.group == 0);
  }

  static void arrange(int8_t* codes, int64_t k) { arrange_lanes<2>(codes, k); }

  template <int M, int R>
  static void dots(const DirectInput<true>& in, int64_t m0, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    const int64_t span = most(w.group, kBlock), parts = span / w.group;
    const DirectCode* x = in.codes + m0 * in.ld;
    for (int64_t k = 0, s = 0, g = 0; k < w.k; ++s, g += parts) {
      const int64_t end = least(k + span, w.k);
      Vec<int32_t> part[R][M];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) part[r][m] = load(in.sum(s, m0 + m));
      }
      for (; k < end; k += kBlock) {
        Vec<int8_t> even[M], odd[M];
        for (int m = 0; m < M; ++m) {
          even[m] = load(x + m * in.ld + k);
          odd[m] = load(x + m * in.ld + k + kBlock / 2);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          rows.prefetch(r, k / 2);
          const Vec<uint16_t> bytes = load(reinterpret_cast<const uint16_t*>(rows.codes[r] + k / 2));
          const Vec<uint8_t> low = bit_cast<Vec<uint8_t>>(bytes & 0x0f0f),
                             high = bit_cast<Vec<uint8_t>>(bytes >> 4 & 0x0f0f);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) part[r][m] = dot_bytes(dot_bytes(part[r][m], low, even[m]), high, odd[m]);
        }
      }
      fold_integers<M, R>(in, m0, rows, s, g, parts, -1.0f / 8, part, total);
    }
  }
};

#else

// Lanes of a group are not told apart: its sums may lie in any of them.
PTK_INLINE int64_t integer_block(const QuantizedWeightView&) {
  return 1;
}
PTK_INLINE Vec<int32_t> add_lanes(Vec<int32_t> sum, const DirectCode* codes, int64_t) {
  return sum + detail::multiply_add_pairs(load(codes), broadcast<int16_t>(1));
}
PTK_INLINE int32_t integer_factor(const QuantizedWeightView&) {
  return 1;
}

struct DirectBytes {
  static constexpr int64_t kBlock = kLanes<int16_t>;

  static bool suits(const QuantizedWeightView& w) {
    return w.format == CodeFormat::s8 && (w.group % kBlock == 0 || w.groups() == 1);
  }

  template <int M, int R>
  static void dots(const DirectInput<true>& in, int64_t m0, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    const DirectCode* x = in.codes + m0 * in.ld;
    for (int64_t g = 0, k = 0; k < w.k; ++g) {
      const int64_t end = least((g + 1) * w.group, w.k);
      Vec<int32_t> part[R][M] = {};
      for (; k + kBlock <= end; k += kBlock) {
        rows.prefetch(k / kBlock % R, k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<int16_t> code = detail::load_widened(reinterpret_cast<const int8_t*>(rows.codes[r]) + k);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) part[r][m] += detail::multiply_add_pairs(code, load(x + m * in.ld + k));
        }
      }
      for (; k < end; ++k)
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < M; ++m) part[r][m][0] += static_cast<int8_t>(rows.codes[r][k]) * x[m * in.ld + k];
      fold_integers<M, R>(in, m0, rows, g, g, 1, 1.0f, part, total);
    }
  }
};

// The low halves of a block's bytes meet its even inputs, the high halves its odd ones.
struct DirectNibblesByBytes {
  static constexpr int64_t kBlock = 2 * kLanes<int16_t>;

  static bool suits(const QuantizedWeightView& w) {
    return w.format == CodeFormat::u4 && w.k % kBlock == 0 && w.group % kBlock == 0;
  }

  static void arrange(int16_t* codes, int64_t k) { arrange_lanes<2>(codes, k); }

  template <int M, int R>
  static void dots(const DirectInput<true>& in, int64_t m0, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    const DirectCode* input = in.codes + m0 * in.ld;
    for (int64_t g = 0, k = 0; k < w.k; ++g) {
      const int64_t end = least((g + 1) * w.group, w.k);
      Vec<int32_t> part[R][M] = {};
      for (; k < end; k += kBlock) {
        rows.prefetch(k / kBlock % R, k / 2);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<int16_t> bytes = detail::load_widened(reinterpret_cast<const int8_t*>(rows.codes[r]) + k / 2);
          const Vec<int16_t> low = (bytes & 15) - 8, high = (bytes >> 4 & 15) - 8;
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const int16_t* x = input + m * in.ld + k;
            part[r][m] +=
                detail::multiply_add_pairs(low, load(x)) + detail::multiply_add_pairs(high, load(x + kLanes<int16_t>));
          }
        }
      }
      fold_integers<M, R>(in, m0, rows, g, g, 1, 1.0f, part, total);
    }
  }
};

#endif

}  // namespace ptk::PTK_ISA
