// Packing: from strided user memory into the layouts of layout.h, converting and zero-padding on the way.
#pragma once

#include "layout.h"

namespace ptk::PTK_ISA {

// One value of storage type T as the element type that the micro-kernel multiplies.
template <class T, class To>
PTK_INLINE To convert_element(T x) {
  if constexpr (std::is_same_v<T, To>) {
    return x;
  } else if constexpr (sizeof(T) == 1) {
    return x;
  } else {
    return static_cast<To>(load_scalar(&x));
  }
}

template <class T>
PTK_INLINE void copy_row(const T* src, int64_t stride, int64_t n, T* dst) {
  if (stride == 1) {
    std::memcpy(dst, src, n * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = src[i * stride];
  }
}

// dst[i] = src[i * stride] for i < n, in the element type, zeros up to n_padded.
template <class T, class To>
static inline void pack_row(const T* src, int64_t stride, int64_t n, int64_t n_padded, To* dst) {
  if constexpr (std::is_same_v<T, To>) {
    copy_row(src, stride, n, dst);
  } else if constexpr (sizeof(T) == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = src[i * stride];
  } else if (stride == 1) {
    int64_t i = 0;
    for (; i + kLanes<To> <= n; i += kLanes<To>) store(dst + i, load_as(src + i));
    for (; i < n; ++i) dst[i] = load_scalar(src + i);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = load_scalar(src + i * stride);
  }
  if (n_padded > n) std::memset(dst + n, 0, (n_padded - n) * sizeof(To));
}

namespace detail {

// A given by its transpose (contiguous in m): squares of lanes x lanes, transposed in registers. Returns how much of k
// it has done for all rows, a multiple of the lanes; the last rows come one by one.
template <class T>
static inline int64_t pack_a_transposed(const T* src, int64_t stride_k, int64_t m, int64_t k, Element<T>* dst,
                                        int64_t ld) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  const int64_t k_full = k / lanes * lanes, m_full = m / lanes * lanes;
  for (int64_t k0 = 0; k0 < k_full; k0 += lanes) {
    for (int64_t m0 = 0; m0 < m_full; m0 += lanes) {
      Vec<A> rows[lanes];
      for (int i = 0; i < lanes; ++i) rows[i] = load_as(src + (k0 + i) * stride_k + m0);
      transpose<A>(rows);
      for (int i = 0; i < lanes; ++i) store_as(dst + (m0 + i) * ld + k0, rows[i]);
    }
  }
  for (int64_t i = m_full; i < m; ++i) pack_row(src + i, stride_k, k_full, k_full, dst + i * ld);
  return k_full;
}

}  // namespace detail

// A operand: m rows of k, row stride `ld` (in elements) in dst, padded as the micro-kernel wants it.
template <class T>
static inline void pack_a(const T* src, int64_t stride_m, int64_t stride_k, int64_t m, int64_t k, Element<T>* dst,
                          int64_t ld) {
  int64_t done = 0;
  if constexpr (sizeof(T) > 1) {
    if (stride_m == 1 && stride_k != 1) done = detail::pack_a_transposed(src, stride_k, m, k, dst, ld);
  }
  for (int64_t i = 0; i < m; ++i) {
    pack_row(src + i * stride_m + done * stride_k, stride_k, k - done, padded_k<T>(k) - done, dst + i * ld + done);
    if constexpr (kShiftedA<T>)
      for (int64_t kk = 0; kk < k; ++kk) dst[i * ld + kk] ^= -128;
  }
}

namespace detail {

// Between a row that is packed in pieces and the one whose piece is asked for.
inline constexpr int64_t kRowsAhead = 32;

// A unit is what one lane holds: kPack elements that meet in one multiply instruction.
template <class E>
using UnitOf = std::conditional_t<sizeof(E) == 8, double, float>;

// Panel from rows that are contiguous in k (B given by its transpose): a transposition of units.
template <class T, class E>
static inline void pack_panel_k_contiguous(const T* src, int64_t stride_n, int64_t k, int64_t k_padded, int64_t columns,
                                           E* dst) {
  using Unit = UnitOf<E>;
  constexpr int pack = sizeof(Unit) / sizeof(E), lanes = kLanes<Unit>, nr = 2 * lanes;
  constexpr int step = lanes * pack;
  const int64_t k_full = k / step * step;
  for (int64_t n0 = 0; n0 < nr; n0 += lanes) {
    const int64_t valid = columns - n0 < lanes ? columns - n0 : lanes;
    for (int64_t k0 = 0; k0 < k_full; k0 += step) {
      Vec<Unit> rows[lanes];
      for (int i = 0; i < lanes; ++i) {
        const T* row = src + (n0 + i) * stride_n + k0;
        // The next panel's: hardware does not follow pieces of rows into memory.
        __builtin_prefetch(row + nr * stride_n, 0, 2);
        if (i >= valid) {
          rows[i] = Vec<Unit>{};
        } else if constexpr (std::is_same_v<T, E>) {
          rows[i] = load(reinterpret_cast<const Unit*>(row));
        } else {
          rows[i] = load_as(row);
        }
      }
      transpose<Unit>(rows);
      for (int i = 0; i < lanes; ++i) store(reinterpret_cast<Unit*>(dst + (k0 + i * pack) * nr + n0 * pack), rows[i]);
    }
    for (int64_t kk = k_full; kk < k_padded; ++kk)
      for (int64_t n = n0; n < n0 + lanes; ++n)
        dst[(kk / pack * nr + n) * pack + kk % pack] =
            kk < k && n < columns ? convert_element<T, E>(src[n * stride_n + kk]) : E{};
  }
}

template <class T, class E>
static inline void pack_panel_any(const T* src, int64_t stride_k, int64_t stride_n, int64_t k, int64_t k_padded,
                                  int64_t columns, int pack, int nr, E* dst) {
  for (int64_t kk = 0; kk < k_padded; ++kk)
    for (int64_t n = 0; n < nr; ++n)
      dst[(kk / pack * nr + n) * pack + kk % pack] =
          kk < k && n < columns ? convert_element<T, E>(src[kk * stride_k + n * stride_n]) : E{};
}

}  // namespace detail

// One panel: up to kNr columns of B[k, n] with the given strides, zeros from k to k_padded (a multiple of kKStep).
template <class T, class Source = T>
static inline void pack_b_panel(const Source* src, int64_t stride_k, int64_t stride_n, int64_t k, int64_t columns,
                                ElementB<T>* dst, int64_t k_padded) {
  using Traits = GemmTraits<T>;
  using E = ElementB<T>;
  constexpr bool unit_is_word = sizeof(E) * Traits::kPack == sizeof(detail::UnitOf<E>);
  if constexpr (unit_is_word) {
    if (stride_k == 1 && k > 1) return detail::pack_panel_k_contiguous(src, stride_n, k, k_padded, columns, dst);
  }
  if (stride_n == 1 && columns == Traits::kNr) {
    if constexpr (Traits::kPack == 1) {
      for (int64_t kk = 0; kk < k; ++kk) {
        __builtin_prefetch(src + (kk + detail::kRowsAhead) * stride_k, 0, 2);
        pack_row(src + kk * stride_k, 1, Traits::kNr, Traits::kNr, dst + kk * Traits::kNr);
      }
      if (k_padded > k) std::memset(dst + k * Traits::kNr, 0, (k_padded - k) * Traits::kNr * sizeof(E));
      return;
    } else if constexpr (std::is_same_v<E, bf16>) {
      // Two rows interleave into one: the even row is the low half of every 32-bit lane, the odd row the high half.
      for (int64_t kk = 0; kk < k_padded; kk += 2) {
        for (int n = 0; n < Traits::kNr; n += kLanes<uint32_t>) {
          auto half = [&](int64_t row) {
            HalfBits bits{};
            __builtin_prefetch(src + (row + detail::kRowsAhead) * stride_k + n, 0, 2);
            if (row < k) bits = *reinterpret_cast<const HalfBitsUnaligned*>(src + row * stride_k + n);
            return __builtin_convertvector(bits, Vec<uint32_t>);
          };
          store(reinterpret_cast<uint32_t*>(dst + kk * Traits::kNr + n * 2), half(kk) | half(kk + 1) << 16);
        }
      }
      return;
    }
  }
  detail::pack_panel_any(src, stride_k, stride_n, k, k_padded, columns, Traits::kPack, Traits::kNr, dst);
}

// All of B[k, n], in dense panels of k_padded rows: panel p starts at dst + p * k_padded * kNr.
template <class T, class Source = T>
static inline void pack_b(const Source* src, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n, ElementB<T>* dst,
                          int64_t k_padded) {
  constexpr int nr = GemmTraits<T>::kNr;
  for (int64_t n0 = 0; n0 < n; n0 += nr)
    pack_b_panel<T, Source>(src + n0 * stride_n, stride_k, stride_n, k, n - n0 < nr ? n - n0 : nr, dst + n0 * k_padded,
                            k_padded);
}

}  // namespace ptk::PTK_ISA
