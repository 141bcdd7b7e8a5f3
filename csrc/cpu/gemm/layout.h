// How operands lie in memory for the micro-kernels, per element type and ISA level.
//
//   C[m, n] = sum over blocks i, over k:  A_i[m, k] * B_i[k, n]
//
// A is read in place: row-major, any row stride, k contiguous. B is packed into panels of kNr columns; within a panel,
// k runs outermost in groups of kPack consecutive values, so that one vector load feeds one multiply-add (kPack = 1) or
// one dot-product instruction (kPack = 2 for bf16, 4 for 8-bit; 2 for 8-bit where only 16-bit pairs can be multiplied):
//
//   packed[panel][k / kPack][column in panel][k % kPack]     k padded with zeros to a multiple of kKStep
//
// A's rows must be readable, and zero, up to the same multiple of kKStep, and come in groups of kRowPad readable rows
// (tile loads have no partial form). Contents of the extra rows do not matter.
#pragma once

#include "../amx.h"

namespace ptk::PTK_ISA {

enum class Multiply { fma, dot_bf16, madd_s16, dot_u4, dot_s8, dot_u8 };

// Micro-kernel shape for operands of storage type T. `Element` is the type both operands are packed to.
template <class T>
struct GemmTraits {
  static constexpr Multiply kMultiply = Multiply::fma;
  using Element = Acc<T>;
  using Sum = Acc<T>;
  static constexpr int kPack = 1, kKStep = 1, kRowPad = 1;
  static constexpr int kNr = 2 * kLanes<Sum>;
  static constexpr int kMr = PTK_ISA_LEVEL >= 2 ? 14 : 6;
};

#if PTK_ISA_LEVEL >= 4
template <>
struct GemmTraits<bf16> {
  static constexpr Multiply kMultiply = Multiply::dot_bf16;
  using Element = bf16;
  using Sum = float;
  static constexpr bool kTiles = PTK_ISA_LEVEL >= 5;
  static constexpr int kPack = 2, kKStep = kTiles ? 32 : 2, kRowPad = kTiles ? 16 : 1;
  static constexpr int kNr = 32, kMr = kTiles ? 32 : 14;
};
#endif

// 8-bit: A is T (signed or unsigned), B always signed; exact 32-bit sums at every level.
#if PTK_ISA_LEVEL < 3
// A is widened at packing, once; B on its way into the registers, once for kMr rows.
template <class T>
struct Gemm8Traits {
  static constexpr Multiply kMultiply = Multiply::madd_s16;
  using Element = int16_t;
  using Sum = int32_t;
  static constexpr int kPack = 2, kKStep = 2, kRowPad = 1;
  static constexpr int kNr = 2 * kLanes<int32_t>;
  static constexpr int kMr = PTK_ISA_LEVEL == 2 ? 14 : 6;
};
#else
template <class T>
struct Gemm8Traits {
  static constexpr Multiply kMultiply = std::is_same_v<T, int8_t> ? Multiply::dot_s8 : Multiply::dot_u8;
  using Element = T;
  using Sum = int32_t;
  static constexpr bool kTiles = PTK_ISA_LEVEL >= 5;
  // vpdpbusd takes unsigned A: packing adds 128 to signed numbers, the kernel takes 128 column sums of B off again.
  static constexpr bool kShiftA = !kTiles && std::is_same_v<T, int8_t>;
  static constexpr int kPack = 4, kKStep = kTiles ? 64 : 4, kRowPad = kTiles ? 16 : 1;
  static constexpr int kNr = 2 * kLanes<int32_t>;
  static constexpr int kMr = kTiles ? 32 : 12;
};
#endif
// A of unsigned numbers below 16, one to a byte; B signed bytes above -128. Sums of eight products of pairs fit into 16
// bits, which spares the levels without a four-way dot product half of the multiplications.
struct u4 {
  uint8_t bits;
};
#if PTK_ISA_LEVEL == 1 || PTK_ISA_LEVEL == 2
template <>
struct GemmTraits<u4> {
  static constexpr Multiply kMultiply = Multiply::dot_u4;
  using Element = uint8_t;
  using Sum = int32_t;
  static constexpr int kPack = 4, kKStep = 4, kRowPad = 1;
  static constexpr int kNr = 2 * kLanes<int32_t>;
  static constexpr int kMr = PTK_ISA_LEVEL == 2 ? 14 : 6;
};
#else
template <>
struct GemmTraits<u4> : Gemm8Traits<uint8_t> {};
#endif
template <>
struct GemmTraits<int8_t> : Gemm8Traits<int8_t> {};
template <>
struct GemmTraits<uint8_t> : Gemm8Traits<uint8_t> {};

template <class T>
using Element = typename GemmTraits<T>::Element;
template <class T>
using Sum = typename GemmTraits<T>::Sum;
// B's element type: as A's, but signed for the 8-bit products.
template <class T>
using ElementB = std::conditional_t<sizeof(T) == 1, int8_t, Element<T>>;

PTK_INLINE constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
PTK_INLINE constexpr int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

PTK_INLINE constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Whether A's bytes are packed with their sign bit flipped.
template <class T>
inline constexpr bool kShiftedA = requires { requires GemmTraits<T>::kShiftA; };

template <class T>
PTK_INLINE constexpr int64_t padded_k(int64_t k) {
  return round_up(k, GemmTraits<T>::kKStep);
}
template <class T>
PTK_INLINE constexpr int64_t padded_n(int64_t n) {
  return round_up(n, GemmTraits<T>::kNr);
}
template <class T>
PTK_INLINE constexpr int64_t padded_m(int64_t m) {
  return round_up(m, GemmTraits<T>::kRowPad);
}

}  // namespace ptk::PTK_ISA
