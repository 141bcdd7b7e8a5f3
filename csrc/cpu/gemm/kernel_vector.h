// Micro-kernels whose accumulators live in vector registers: M rows x 2 vectors of columns.
//
// Per step of k: two loads of B, M broadcasts of A, 2 M multiply-adds. M = 14 with 32 registers (28 sums, 2 B, 1-2 A),
// M = 6 with 16 (12 sums, 2 B, 1-2 A); smaller M serve the last rows. Where the last panel has columns for one vector
// only, floating-point and four-way dot kernels leave the other out (N = 1): half the time, the same bits.
#pragma once

#include "layout.h"

namespace ptk::PTK_ISA {

// One term of the batch reduction: A_i at row 0, and B_i's panel.
template <class A, class B>
struct BlockPair {
  const A* a;
  const B* b;
};
template <class T>
using GemmBlock = BlockPair<Element<T>, ElementB<T>>;

namespace detail {

// Rows of A, three to a base pointer: with base + {0, 1, 2} * ld as x86 addressing modes, 14 rows need 5 pointers.
template <class E, int M>
struct RowPointers {
  static constexpr int kBases = (M + 2) / 3;
  const char* base[kBases];
  int64_t ld_bytes;

  PTK_INLINE RowPointers make(const E* a, int64_t ld) {
    RowPointers rows;
    rows.ld_bytes = ld * static_cast<int64_t>(sizeof(E));
    for (int i = 0; i < kBases; ++i) {
      rows.base[i] = reinterpret_cast<const char*>(a) + 3 * i * rows.ld_bytes;
      // Keeps the compiler from folding the bases back into one pointer and 14 offsets.
      asm("" : "+r"(rows.base[i]));
    }
    return rows;
  }
  template <class Unit>
  inline __attribute__((always_inline)) Unit at(int row) const {
    Unit u;
    std::memcpy(&u, base[row / 3] + (row % 3) * ld_bytes, sizeof u);
    return u;
  }
  inline __attribute__((always_inline)) void advance(int64_t bytes) {
    for (int i = 0; i < kBases; ++i) base[i] += bytes;
  }
};

// An epilogue that marks itself `kLarge` is called from one place in a loop instead of once per register: the sums take
// a turn through the stack, the code stays small.
template <class Epilogue>
concept LargeEpilogue = requires { Epilogue::kLarge; };

// One that marks itself `kStrip` takes all rows of a kernel at once, so that what belongs to a column is loaded once,
// in memory that it may write to:
//   epilogue.strip(rows, row, column, columns, sums[rows][2][lanes])
template <class Epilogue>
concept StripEpilogue = requires { Epilogue::kStrip; };

// One that writes to memory that may be far away may offer prefetch(rows, row, column), called before the products.
template <class Epilogue>
PTK_INLINE void prefetch_target(const Epilogue& epilogue, int64_t rows, int64_t row, int64_t column) {
  if constexpr (requires { epilogue.prefetch(rows, row, column); }) epilogue.prefetch(rows, row, column);
}

// Hands sums[M][2][lanes] to an epilogue.
template <int M, class S, class Epilogue>
PTK_INLINE void hand_over(S* sums, int64_t row, int64_t column, int64_t columns, Epilogue& epilogue) {
  constexpr int lanes = kLanes<S>;
  if constexpr (StripEpilogue<Epilogue>) {
    epilogue.strip(M, row, column, columns, sums);
  } else {
#pragma GCC unroll 1
    for (int i = 0; i < M; ++i) {
      for (int64_t half = 0; half < 2 && half * lanes < columns; ++half) {
        const int64_t left = columns - half * lanes;
        epilogue(row + i, column + half * lanes, load(sums + (2 * i + half) * lanes), left < lanes ? left : lanes);
      }
    }
  }
}

template <int M, class S>
PTK_INLINE void store_sums(Vec<S> (&sum)[M][2], S* to) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store(to + 2 * i * kLanes<S>, sum[i][0]);
    store(to + (2 * i + 1) * kLanes<S>, sum[i][1]);
  }
}

template <int M, class S, class Epilogue>
PTK_INLINE void finish(Vec<S> (&sum)[M][2], int64_t row, int64_t column, int64_t columns, Epilogue& epilogue) {
  constexpr int lanes = kLanes<S>;
  if constexpr (!LargeEpilogue<Epilogue>) {
    if (columns >= 2 * lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        epilogue(row + i, column, sum[i][0], lanes);
        epilogue(row + i, column + lanes, sum[i][1], lanes);
      }
      return;
    }
  }
  alignas(64) S buffer[M * 2 * lanes];
  store_sums<M, S>(sum, buffer);
  hand_over<M>(buffer, row, column, columns, epilogue);
}

// Rounded once, whatever number of rows the kernel is for; emulation leaves it to the compiler, or would take minutes.
template <class E>
PTK_INLINE Vec<E> multiply_into(Vec<E> a, Vec<E> b, Vec<E> sum) {
#if PTK_EMULATE
  return a * b + sum;
#else
  return multiply_add<E>(a, b, sum);
#endif
}

// f64, f32, and 16-bit floats widened at packing.
template <class T, int M, int N>
PTK_INLINE void fma_sums(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                         Vec<Element<T>> (&sum)[M][2]) {
  using E = Element<T>;
  using V = Vec<E>;
  constexpr int nr = GemmTraits<T>::kNr;
  for (int64_t block = 0; block < count; ++block) {
    auto a = RowPointers<E, M>::make(blocks[block].a + row * lda, lda);
    const E* b = blocks[block].b;
#pragma GCC unroll 1
    for (int64_t i = 0; i < k; ++i) {
      V b0 = load(b), b1{};
      // As an operand in memory one of them would be loaded M times, and loads are what limits.
      PTK_OPAQUE(b0);
      if constexpr (N == 2) {
        b1 = load(b + nr / 2);
        PTK_OPAQUE(b1);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        V x = broadcast(a.template at<E>(m));
        sum[m][0] = multiply_into<E>(x, b0, sum[m][0]);
        if constexpr (N == 2) sum[m][1] = multiply_into<E>(x, b1, sum[m][1]);
      }
      a.advance(sizeof(E));
      b += nr;
    }
  }
}

// Out of line, so that constants of an epilogue take no register from the loop.
template <class T, int M, int N>
static __attribute__((noinline)) void fma_buffer(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda,
                                                 int64_t row, Sum<T>* buffer) {
  Vec<Element<T>> sum[M][2] = {};
  fma_sums<T, M, N>(blocks, count, k, lda, row, sum);
  store_sums<M, Sum<T>>(sum, buffer);
}

template <class T, int M, class Epilogue>
PTK_INLINE void fma_kernel(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                           int64_t column, int64_t columns, Epilogue& epilogue) {
  const bool is_narrow = columns <= kLanes<Sum<T>>;
  prefetch_target(epilogue, M, row, column);
  if (LargeEpilogue<Epilogue> || is_narrow) {
    alignas(64) Sum<T> buffer[M * GemmTraits<T>::kNr];
    if (is_narrow) {
      fma_buffer<T, M, 1>(blocks, count, k, lda, row, buffer);
    } else {
      fma_buffer<T, M, 2>(blocks, count, k, lda, row, buffer);
    }
    hand_over<M>(buffer, row, column, columns, epilogue);
  } else {
    Vec<Element<T>> sum[M][2] = {};
    fma_sums<T, M, 2>(blocks, count, k, lda, row, sum);
    finish<M, Sum<T>>(sum, row, column, columns, epilogue);
  }
}

#if PTK_ISA_LEVEL == 4
PTK_INLINE Vec<float> dot_bf16(Vec<float> sum, uint32_t a, Vec<uint32_t> b) {
#if PTK_EMULATE
  auto low = [](auto v) { return bit_cast<Vec<float>>(v << 16); };
  auto high = [](auto v) { return bit_cast<Vec<float>>(v & 0xffff0000u); };
  Vec<uint32_t> x = broadcast(a);
  return sum + (high(x) * high(b) + low(x) * low(b));
#else
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#endif
}

template <class T, int M, int N>
PTK_INLINE void dot_bf16_sums(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                              Vec<float> (&sum)[M][2]) {
  constexpr int nr = GemmTraits<T>::kNr;
  for (int64_t block = 0; block < count; ++block) {
    auto a = RowPointers<bf16, M>::make(blocks[block].a + row * lda, lda);
    const auto* b = reinterpret_cast<const uint32_t*>(blocks[block].b);
#pragma GCC unroll 1
    for (int64_t i = 0; i < k; i += 2) {
      Vec<uint32_t> b0 = load(b), b1{};
      if constexpr (N == 2) b1 = load(b + nr / 2);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        uint32_t x = a.template at<uint32_t>(m);
        sum[m][0] = dot_bf16(sum[m][0], x, b0);
        if constexpr (N == 2) sum[m][1] = dot_bf16(sum[m][1], x, b1);
      }
      a.advance(sizeof(uint32_t));
      b += nr;
    }
  }
}

template <class T, int M>
static __attribute__((noinline)) void narrow_dot_bf16(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda,
                                                      int64_t row, Sum<T>* buffer) {
  Vec<float> sum[M][2] = {};
  dot_bf16_sums<T, M, 1>(blocks, count, k, lda, row, sum);
  store_sums<M, Sum<T>>(sum, buffer);
}

template <class T, int M, class Epilogue>
PTK_INLINE void dot_bf16_kernel(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                                int64_t column, int64_t columns, Epilogue& epilogue) {
  if (columns <= kLanes<float>) {
    alignas(64) Sum<T> buffer[M * GemmTraits<T>::kNr];
    narrow_dot_bf16<T, M>(blocks, count, k, lda, row, buffer);
    return hand_over<M>(buffer, row, column, columns, epilogue);
  }
  Vec<float> sum[M][2] = {};
  dot_bf16_sums<T, M, 2>(blocks, count, k, lda, row, sum);
  finish<M, Sum<T>>(sum, row, column, columns, epilogue);
}
#endif

#if PTK_ISA_LEVEL == 3 || PTK_ISA_LEVEL == 4
// sum + four products of unsigned a and signed b per 32-bit lane.
PTK_INLINE Vec<int32_t> dot_u8s8(Vec<int32_t> sum, uint32_t a, Vec<int32_t> b) {
#if PTK_EMULATE
  for (int byte = 0; byte < 4; ++byte)
    sum += static_cast<int32_t>(a >> 8 * byte & 0xff) * ((b << (24 - 8 * byte)) >> 24);
  return sum;
#else
  return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(static_cast<int>(a)), (__m512i)b);
#endif
}

// The column sums that undo the shift of signed A (GemmTraits::kShiftA) cost one dot product with ones per vector of B.
template <class T, int M, int N>
PTK_INLINE void dot_8bit_sums(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                              Vec<int32_t> (&sum)[M][2]) {
  constexpr int nr = GemmTraits<T>::kNr;
  Vec<int32_t> column_sum[2] = {};
  for (int64_t block = 0; block < count; ++block) {
    auto a = RowPointers<T, M>::make(blocks[block].a + row * lda, lda);
    const auto* b = reinterpret_cast<const int32_t*>(blocks[block].b);
#pragma GCC unroll 1
    for (int64_t i = 0; i < k; i += 4) {
      Vec<int32_t> b0 = load(b), b1{};
      if constexpr (N == 2) b1 = load(b + nr / 2);
      if constexpr (kShiftedA<T>) {
        column_sum[0] = dot_u8s8(column_sum[0], 0x01010101u, b0);
        if constexpr (N == 2) column_sum[1] = dot_u8s8(column_sum[1], 0x01010101u, b1);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const uint32_t x = a.template at<uint32_t>(m);
        sum[m][0] = dot_u8s8(sum[m][0], x, b0);
        if constexpr (N == 2) sum[m][1] = dot_u8s8(sum[m][1], x, b1);
      }
      a.advance(sizeof(uint32_t));
      b += nr;
    }
  }
  if constexpr (kShiftedA<T>) {
    for (int m = 0; m < M; ++m) {
      sum[m][0] -= column_sum[0] << 7;
      sum[m][1] -= column_sum[1] << 7;
    }
  }
}

template <class T, int M>
static __attribute__((noinline)) void narrow_dot_8bit(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda,
                                                      int64_t row, int32_t* buffer) {
  Vec<int32_t> sum[M][2] = {};
  dot_8bit_sums<T, M, 1>(blocks, count, k, lda, row, sum);
  store_sums<M, int32_t>(sum, buffer);
}

template <class T, int M, class Epilogue>
PTK_INLINE void dot_8bit_kernel(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                                int64_t column, int64_t columns, Epilogue& epilogue) {
  if (columns <= kLanes<int32_t>) {
    alignas(64) int32_t buffer[M * GemmTraits<T>::kNr];
    narrow_dot_8bit<T, M>(blocks, count, k, lda, row, buffer);
    return hand_over<M>(buffer, row, column, columns, epilogue);
  }
  Vec<int32_t> sum[M][2] = {};
  dot_8bit_sums<T, M, 2>(blocks, count, k, lda, row, sum);
  finish<M, Sum<T>>(sum, row, column, columns, epilogue);
}
#endif

#if PTK_ISA_LEVEL < 3
// Without a four-way dot instruction: pairs of 16-bit numbers are multiplied and added (exact: |a * b| <= 255 * 128,
// and the 32-bit sum of a pair cannot overflow), never by the saturating 8-bit form.
PTK_INLINE Vec<int32_t> multiply_add_pairs(Vec<int16_t> a, Vec<int16_t> b) {
#if PTK_X86_AVX512
  return (Vec<int32_t>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif PTK_ISA_LEVEL == 1
  return (Vec<int32_t>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif PTK_ISA_LEVEL == 0 && defined(__SSE2__)
  return (Vec<int32_t>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  Vec<int32_t> x = bit_cast<Vec<int32_t>>(a), y = bit_cast<Vec<int32_t>>(b);
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

PTK_INLINE Vec<int16_t> load_widened(const int8_t* p) {
#if PTK_X86_AVX512
  return (Vec<int16_t>)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PTK_ISA_LEVEL == 1
  return (Vec<int16_t>)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  using Bytes = typename VectorOf<int8_t, kVectorBytes / 2>::unaligned;
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Vec<int16_t>);
#endif
}

template <class T, int M, class Epilogue>
PTK_INLINE void madd_kernel(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                            int64_t column, int64_t columns, Epilogue& epilogue) {
  constexpr int nr = GemmTraits<T>::kNr;
  Vec<int32_t> sum[M][2] = {};
  for (int64_t block = 0; block < count; ++block) {
    auto a = RowPointers<int16_t, M>::make(blocks[block].a + row * lda, lda);
    const int8_t* b = blocks[block].b;
#pragma GCC unroll 1
    for (int64_t i = 0; i < k; i += 2) {
      Vec<int16_t> b0 = load_widened(b), b1 = load_widened(b + nr);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        Vec<int16_t> x = bit_cast<Vec<int16_t>>(broadcast(a.template at<int32_t>(m)));
        sum[m][0] += multiply_add_pairs(x, b0);
        sum[m][1] += multiply_add_pairs(x, b1);
      }
      a.advance(sizeof(int32_t));
      b += 2 * nr;
    }
  }
  finish<M, Sum<T>>(sum, row, column, columns, epilogue);
}
#endif

#if PTK_ISA_LEVEL == 1 || PTK_ISA_LEVEL == 2
// Products of unsigned a and signed b, added in pairs: at most 2 * 15 * 127, so eight of them never saturate.
PTK_INLINE Vec<int16_t> multiply_add_bytes(Vec<uint8_t> a, Vec<int8_t> b) {
#if PTK_X86_AVX512
  return (Vec<int16_t>)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#elif PTK_ISA_LEVEL == 1
  return (Vec<int16_t>)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#else
  const Vec<int16_t> x = bit_cast<Vec<int16_t>>(a), y = bit_cast<Vec<int16_t>>(b);
  return (x & 0xff) * (y << 8 >> 8) + bit_cast<Vec<int16_t>>(bit_cast<Vec<uint16_t>>(a) >> 8) * (y >> 8);
#endif
}

template <class T, int M, class Epilogue>
PTK_INLINE void dot_u4_kernel(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                              int64_t column, int64_t columns, Epilogue& epilogue) {
  constexpr int nr = GemmTraits<T>::kNr;
  constexpr int64_t exact = 8 * 4;
  const Vec<int16_t> ones = broadcast(int16_t(1));
  Vec<int32_t> sum[M][2] = {};
  for (int64_t block = 0; block < count; ++block) {
    auto a = RowPointers<uint8_t, M>::make(blocks[block].a + row * lda, lda);
    const int8_t* b = blocks[block].b;
    for (int64_t i = 0; i < k;) {
      Vec<int16_t> part[M][2] = {};
#pragma GCC unroll 1
      for (const int64_t end = least(k, i + exact); i < end; i += 4) {
        const Vec<int8_t> b0 = load(b), b1 = load(b + 2 * nr);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Vec<uint8_t> x = bit_cast<Vec<uint8_t>>(broadcast(a.template at<int32_t>(m)));
          part[m][0] += multiply_add_bytes(x, b0);
          part[m][1] += multiply_add_bytes(x, b1);
        }
        a.advance(sizeof(int32_t));
        b += 4 * nr;
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        sum[m][0] += multiply_add_pairs(part[m][0], ones);
        sum[m][1] += multiply_add_pairs(part[m][1], ones);
      }
    }
  }
  finish<M, Sum<T>>(sum, row, column, columns, epilogue);
}
#endif

}  // namespace detail
}  // namespace ptk::PTK_ISA
