// Products of the recurrences, C = or += A B, where every weight is met by a few rows only.
//
//   many rows   the engine, panel by panel, depth in steps whose part of a panel stays in L1
//   one or two  several panels at once: the sums of one panel are fewer than a multiply-add takes cycles
//   streamed    B as the user has it, [columns, depth]: squares are transposed in registers on their way to the sums.
//               For calls that meet a weight only once, where packing it would cost more than the product.
//
// A sum runs over its terms in the same order in all of them: the engine's, from 0 in every step of depth.
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

}  // namespace ptk::PTK_ISA
