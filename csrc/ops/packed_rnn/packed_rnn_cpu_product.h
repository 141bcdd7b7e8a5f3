// Products of the recurrences, C = or += A B, where every weight is met by a few rows only.
//
//   many rows   the engine, panel by panel, depth in steps whose part of a panel stays in L1
//   one or two  several panels at once: the sums of one panel are fewer than a multiply-add takes cycles
//   streamed    B as the user has it, [columns, depth]: squares are transposed in registers on their way to the sums.
//               For calls that meet a weight only once, where packing it would cost more than the product.
//   along rows  B as the user has it again, and vectors along its rows: as fast as memory gives them, for calls of one
//               sequence, whose weights are read for a row at a time
//
// A sum runs over its terms in the same order in the first three: the engine's, from 0 in every step of depth. Along
// rows it is the sum of one sum per lane, the same for any number of rows.
#pragma once

#include "csrc/cpu/gemm/gemm.h"

namespace ptk::PTK_ISA {

template <class T>
inline constexpr int64_t kRnnDepth = 1024 / sizeof(Element<T>);

// Tile products add up in an order of their own.
template <class T>
inline constexpr bool kRnnVectors = !detail::kUsesTiles<T>;

// Rows that a streamed product takes.
template <class T>
inline constexpr int64_t kStreamedRows = kRnnVectors<T> ? (PTK_ISA_LEVEL >= 2 ? 8 : 4) : 0;

namespace detail {

// One lane of the engine's products: an element, or the pair that meets in one instruction.
template <class T>
using RnnUnit = UnitOf<Element<T>>;
template <class T>
inline constexpr int kUnitElements = sizeof(RnnUnit<T>) / sizeof(Element<T>);

template <class T>
PTK_INLINE Vec<Acc<T>> add_product(Vec<Acc<T>> sum, const Element<T>* a, Vec<RnnUnit<T>> b) {
#if PTK_ISA_LEVEL == 4
  if constexpr (kUnitElements<T> == 2) {
    uint32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return dot_bf16(sum, pair, bit_cast<Vec<uint32_t>>(b));
  }
#endif
  if constexpr (kUnitElements<T> == 1) return sum + broadcast(*a) * b;
  return sum;
}

template <class T>
PTK_INLINE Vec<Acc<T>> add_units(Vec<Acc<T>> sum, Vec<RnnUnit<T>> a, Vec<RnnUnit<T>> b) {
  if constexpr (kUnitElements<T> == 1) return sum + a * b;
#if PTK_ISA_LEVEL >= 4
  if constexpr (kUnitElements<T> == 2) {
#if PTK_EMULATE
    const auto low = [](auto v) { return bit_cast<Vec<float>>(bit_cast<Vec<uint32_t>>(v) << 16); };
    const auto high = [](auto v) { return bit_cast<Vec<float>>(bit_cast<Vec<uint32_t>>(v) & 0xffff0000u); };
    return sum + (high(a) * high(b) + low(a) * low(b));
#else
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  }
#endif
  return sum;
}

template <class A>
PTK_INLINE void put_sum(A* c, Vec<A> sum, bool add) {
  store(c, add ? load(c) + sum : sum);
}

template <class T, int M, int Panels>
static inline void thin_panels(int64_t k, const Element<T>* a, int64_t lda, const ElementB<T>* b, int64_t panel_stride,
                               Acc<T>* c, int64_t ldc, bool add) {
  constexpr int nr = GemmTraits<T>::kNr, lanes = kLanes<Acc<T>>, pack = kUnitElements<T>;
  for (int64_t k0 = 0; k0 < k; k0 += kRnnDepth<T>) {
    Vec<Acc<T>> sum[M][Panels][2] = {};
    const int64_t end = least(k, k0 + kRnnDepth<T>);
    for (int64_t i = k0; i < end; i += pack) {
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) {
        const auto* unit = reinterpret_cast<const RnnUnit<T>*>(b + p * panel_stride + i * nr);
        const Vec<RnnUnit<T>> b0 = load(unit), b1 = load(unit + lanes);
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) {
          sum[m][p][0] = add_product<T>(sum[m][p][0], a + m * lda + i, b0);
          sum[m][p][1] = add_product<T>(sum[m][p][1], a + m * lda + i, b1);
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < Panels; ++p)
        for (int half = 0; half < 2; ++half)
          put_sum(c + m * ldc + p * nr + half * lanes, sum[m][p][half], add || k0 > 0);
  }
}

template <class T>
static constexpr T kNothing[64 / sizeof(T)] = {};

// A vector of columns: `valid` rows of W, [columns, depth].
template <class T, int M>
static inline void streamed_vector(int64_t k, const Element<T>* a, int64_t lda, const T* w, int64_t ldw, int64_t valid,
                                   int64_t rows, Acc<T>* c, int64_t ldc, bool add) {
  using Unit = RnnUnit<T>;
  constexpr int lanes = kLanes<Unit>, pack = kUnitElements<T>, square = lanes * pack;
  for (int64_t k0 = 0; k0 < k; k0 += kRnnDepth<T>) {
    Vec<Acc<T>> sum[M] = {};
    const int64_t end = least(k, k0 + kRnnDepth<T>);
    for (int64_t i = k0; i < end; i += square) {
      const int64_t left = end - i;
      Vec<Unit> units[lanes];
#pragma GCC unroll 16
      for (int n = 0; n < lanes; ++n) {
        const T* from = n < valid ? w + n * ldw + i : kNothing<T>;
        T last[square] = {};
        if (left < square) {
          std::memcpy(last, from, left * sizeof(T));
          from = last;
        }
        if constexpr (std::is_same_v<T, Element<T>>) {
          units[n] = load(reinterpret_cast<const Unit*>(from));
        } else {
          units[n] = load_as(from);
        }
      }
      transpose<Unit>(units);
#pragma GCC unroll 16
      for (int u = 0; u < lanes; ++u) {
        if (u * pack >= left) break;
        for (int m = 0; m < M; ++m) sum[m] = add_product<T>(sum[m], a + m * lda + i + u * pack, units[u]);
      }
    }
    for (int m = 0; m < M; ++m)
      if (m < rows) put_sum(c + m * ldc, sum[m], add || k0 > 0);
  }
}

// Elements of a row of W as the units of a vector.
template <class T>
PTK_INLINE Vec<RnnUnit<T>> load_units(const T* p) {
  if constexpr (std::is_same_v<T, Element<T>>) {
    return load(reinterpret_cast<const RnnUnit<T>*>(p));
  } else {
    return load_as(p);
  }
}

// One sum per lane for each of Rows rows of A with each of Columns rows of W; those from `valid` on count as zeros. A
// row is read a cache line at a time: where many rows begin in the same set of the cache, nothing of the line would be
// left for a second read.
template <class T, int Rows, int Columns>
PTK_INLINE void sums_along_rows(int64_t k, const Element<T>* a, int64_t lda, const T* w, int64_t ldw, int64_t valid,
                                Vec<Acc<T>>* sums) {
  using Unit = RnnUnit<T>;
  constexpr int vector = kLanes<Unit> * kUnitElements<T>, parts = 64 / (vector * static_cast<int>(sizeof(T)));
  const T* row[Columns];
#pragma GCC unroll 8
  for (int n = 0; n < Columns; ++n) row[n] = w + (n < valid ? n * ldw : 0);
  Vec<Acc<T>> sum[Rows][Columns] = {};
  const auto add = [&](int64_t i, int n, Vec<Unit> b) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
      sum[m][n] = add_units<T>(sum[m][n], load(reinterpret_cast<const Unit*>(a + m * lda + i)), b);
  };
  int64_t i = 0;
  for (; i + parts * vector <= k; i += parts * vector) {
#pragma GCC unroll 8
    for (int n = 0; n < Columns; ++n) {
#pragma GCC unroll 4
      for (int part = 0; part < parts; ++part) add(i + part * vector, n, load_units<T>(row[n] + i + part * vector));
    }
  }
  for (; i < k; i += vector) {
#pragma GCC unroll 8
    for (int n = 0; n < Columns; ++n) {
      T last[vector] = {};
      std::memcpy(last, row[n] + i, least(vector, k - i) * sizeof(T));
      add(i, n, load_units<T>(last));
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < Columns; ++n) {
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) sums[m * Columns + n] = n < valid ? sum[m][n] : Vec<Acc<T>>{};
  }
}

// The sum of each of as many vectors as there are lanes: the stages of a transpose, halving the vectors on the way.
template <class A, int Step = kLanes<A> / 2>
PTK_INLINE Vec<A> reduce_each(Vec<A>* vectors) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<A>>{};
#pragma GCC unroll 16
  for (int i = 0; i < Step; ++i) {
    swap_halves<A, Step>(vectors[i], vectors[i + Step], lanes);
    vectors[i] += vectors[i + Step];
  }
  if constexpr (Step > 1) {
    return reduce_each<A, Step / 2>(vectors);
  } else {
    return vectors[0];
  }
}

// Columns of a block, which panels are whole multiples of: no more rows of W at a time than what fetches from the outer
// caches follows well.
template <class T>
inline constexpr int kRowStreams = GemmTraits<T>::kNr < 8 ? GemmTraits<T>::kNr : 8;
template <class T>
inline constexpr int kRowBlock = kLanes<Acc<T>> > kRowStreams<T> ? kLanes<Acc<T>> : kRowStreams<T>;

// A row of A with a block of rows of W, of which `valid` are there.
template <class T, bool Whole>
PTK_INLINE void block_along_rows(int64_t k, const Element<T>* a, const T* w, int64_t ldw, int64_t valid, Acc<T>* c,
                                 bool add) {
  constexpr int lanes = kLanes<Acc<T>>, streams = kRowStreams<T>;
  Vec<Acc<T>> sums[kRowBlock<T>] = {};
#pragma GCC unroll 2
  for (int n = 0; n < kRowBlock<T>; n += streams)
    if (Whole || n < valid)
      sums_along_rows<T, 1, streams>(k, a, 0, w + n * ldw, ldw, Whole ? streams : valid - n, sums + n);
#pragma GCC unroll 2
  for (int n = 0; n < kRowBlock<T>; n += lanes) put_sum(c + n, reduce_each<Acc<T>>(sums + n), add);
}

// A row of A with every row of W.
template <class T>
static inline void one_along_rows(int64_t columns, int64_t valid, int64_t k, const Element<T>* a, const T* w,
                                  int64_t ldw, Acc<T>* c, bool add, bool backwards) {
  const int64_t blocks = columns / kRowBlock<T>;
  for (int64_t index = 0; index < blocks; ++index) {
    const int64_t n = (backwards ? blocks - 1 - index : index) * kRowBlock<T>;
    if (n + kRowBlock<T> <= valid) {
      block_along_rows<T, true>(k, a, w + n * ldw, ldw, 0, c + n, add);
    } else {
      block_along_rows<T, false>(k, a, w + n * ldw, ldw, valid - n, c + n, add);
    }
  }
}

}  // namespace detail

// C = or += A B for whole panels. `backwards`: last panel first, so that a product repeated in turns of direction finds
// in cache what it read last.
template <class T>
static inline void rnn_product(int64_t m, int64_t n, int64_t k, const Element<T>* a, int64_t lda, const ElementB<T>* b,
                               int64_t panel_stride, Acc<T>* c, int64_t ldc, bool add, bool backwards = false) {
  constexpr int nr = GemmTraits<T>::kNr;
  const int64_t panels = n / nr;
  const auto part = [&](int64_t first, int64_t count) {
    const ElementB<T>* from = b + first * panel_stride;
    Acc<T>* to = c + first * nr;
    if constexpr (kRnnVectors<T>) {
      if (m == 1 && count == 4) return detail::thin_panels<T, 1, 4>(k, a, lda, from, panel_stride, to, ldc, add);
      if (m == 2 && count == 2) return detail::thin_panels<T, 2, 2>(k, a, lda, from, panel_stride, to, ldc, add);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k0 = 0; k0 < k; k0 += kRnnDepth<T>) {
        const int64_t depth = least(kRnnDepth<T>, k - k0);
        const ElementB<T>* panel = from + i * panel_stride + k0 * nr;
        if (add || k0 > 0) {
          gemm<T>(m, nr, depth, a + k0, lda, panel, panel_stride, AddSums<Acc<T>>{to + i * nr, ldc});
        } else {
          gemm<T>(m, nr, depth, a + k0, lda, panel, panel_stride, StoreSums<Acc<T>>{to + i * nr, ldc});
        }
      }
    }
  };
  const int64_t group = m == 1 ? 4 : m == 2 ? 2 : 1, groups = (panels + group - 1) / group;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t first = (backwards ? groups - 1 - i : i) * group;
    part(first, least(group, panels - first));
  }
}

// C = or += A W^T for W [valid, depth] and zeros behind it up to `columns`, a multiple of the lanes; rows <=
// kStreamedRows, which A has room for.
template <class T>
static inline void rnn_streamed_product(int64_t rows, int64_t columns, int64_t valid, int64_t k, const Element<T>* a,
                                        int64_t lda, const T* w, int64_t ldw, Acc<T>* c, int64_t ldc, bool add) {
  if constexpr (kRnnVectors<T>) {
    constexpr int lanes = kLanes<Acc<T>>;
    for (int64_t n = 0; n < columns; n += lanes) {
      const T* from = w + n * ldw;
      const int64_t own = least(lanes, valid - n);
      if (rows == 1) {
        detail::streamed_vector<T, 1>(k, a, lda, from, ldw, own, rows, c + n, ldc, add);
      } else if (rows <= 4) {
        detail::streamed_vector<T, 4>(k, a, lda, from, ldw, own, rows, c + n, ldc, add);
      } else {
        detail::streamed_vector<T, kStreamedRows<T>>(k, a, lda, from, ldw, own, rows, c + n, ldc, add);
      }
    }
  }
}

// C = or += A W^T along the rows of W [valid, depth], with zeros behind it up to `columns`, a multiple of a panel.
template <class T>
static inline void rnn_row_product(int64_t rows, int64_t columns, int64_t valid, int64_t k, const Element<T>* a,
                                   int64_t lda, const T* w, int64_t ldw, Acc<T>* c, int64_t ldc, bool add,
                                   bool backwards = false) {
  // The tile's sums and one row of it, in registers.
  constexpr int tile_rows = PTK_ISA_LEVEL >= 2 ? 4 : 2, tile_columns = 4, lanes = kLanes<Acc<T>>;
  const int64_t tiled = rows - rows % tile_rows;
  for (int64_t n = 0; tiled > 0 && n < columns; n += tile_columns) {
    for (int64_t m = 0; m < tiled; m += tile_rows) {
      Vec<Acc<T>> sums[tile_rows * tile_columns] = {};
      if (n < valid)
        detail::sums_along_rows<T, tile_rows, tile_columns>(k, a + m * lda, lda, w + n * ldw, ldw, valid - n, sums);
      Acc<T> found[tile_rows * tile_columns];
      for (int i = 0; i < tile_rows * tile_columns; i += lanes) store(found + i, detail::reduce_each<Acc<T>>(sums + i));
      for (int i = 0; i < tile_rows * tile_columns; ++i) {
        Acc<T>& to = c[(m + i / tile_columns) * ldc + n + i % tile_columns];
        to = add ? to + found[i] : found[i];
      }
    }
  }
  for (int64_t m = tiled; m < rows; ++m)
    detail::one_along_rows<T>(columns, valid, k, a + m * lda, w, ldw, c + m * ldc, add, backwards);
}

}  // namespace ptk::PTK_ISA
