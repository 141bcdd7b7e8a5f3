// The one matrix-product engine of all CPU kernels.
//
//   C[m, n] = sum over blocks i, over k:  A_i[m, k] * B_i[k, n],     handed to an epilogue a vector at a time
//
// `gemm` walks an m x n tile of C panel by panel: a panel of B stays in L1 while every strip of A's rows meets it. The
// caller chooses m, n, k so that the operands stay in L2, and gives the fused work as an epilogue:
//
//   epilogue(int64_t row, int64_t column, Vec<Sum> sums, int64_t valid)     `valid` lanes count, the others are padding
//
// On AMX an epilogue that only stores or adds may offer `tile_target(row, column) -> {data, ld}` and say by kAddsTiles
// which of the two: whole tiles are then written there, and where it adds begin with what is there.
#pragma once

#include "kernel_amx.h"
#include "pack.h"

namespace ptk::PTK_ISA {

inline constexpr int64_t kMaxGemmBlocks = 64;

namespace detail {

template <class T, int M, class Epilogue>
PTK_INLINE void vector_kernel(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                              int64_t column, int64_t columns, Epilogue& epilogue) {
  constexpr Multiply multiply = GemmTraits<T>::kMultiply;
  if constexpr (multiply == Multiply::fma) {
    fma_kernel<T, M>(blocks, count, k, lda, row, column, columns, epilogue);
  }
#if PTK_ISA_LEVEL == 4
  if constexpr (multiply == Multiply::dot_bf16) {
    dot_bf16_kernel<T, M>(blocks, count, k, lda, row, column, columns, epilogue);
  }
#endif
#if PTK_ISA_LEVEL < 3
  if constexpr (multiply == Multiply::madd_s16) {
    madd_kernel<T, M>(blocks, count, k, lda, row, column, columns, epilogue);
  }
#if PTK_ISA_LEVEL > 0
  if constexpr (multiply == Multiply::dot_u4) {
    dot_u4_kernel<T, M>(blocks, count, k, lda, row, column, columns, epilogue);
  }
#endif
#elif PTK_ISA_LEVEL < 5
  if constexpr (multiply == Multiply::dot_s8 || multiply == Multiply::dot_u8) {
    dot_8bit_kernel<T, M>(blocks, count, k, lda, row, column, columns, epilogue);
  }
#endif
}

// The last rows. With few registers (kMr <= 6) every remainder has its kernel, and what is left after the full strips
// is dealt out evenly over two: a strip of one or two rows would wait for its own sums. With more, binary steps: four
// kernels cover every remainder.
template <class T>
inline constexpr bool kEvenTail = GemmTraits<T>::kMultiply == Multiply::fma && GemmTraits<T>::kMr <= 6;
template <class T>
inline constexpr int kLargestTail = GemmTraits<T>::kMr > 8   ? 8
                                    : GemmTraits<T>::kMr > 4 ? 4
                                                             : 1;
// Rows of the next strip where `left` are left; an estimate where after_full_strips() cuts the last ones otherwise.
template <class T>
PTK_INLINE constexpr int64_t strip_rows(int64_t left) {
  constexpr int64_t mr = GemmTraits<T>::kMr;
  if (left >= 2 * mr || left == mr) return mr;
  if constexpr (kEvenTail<T>) return left < mr ? left : (left + 1) / 2;
  if (left > mr) return mr;
  int64_t rows = kLargestTail<T>;
  while (rows > left) rows /= 2;
  return rows;
}

// Rows behind the last strip of kMr. Where they would end in a strip of two, which waits for its own sums, one strip of
// 14 less leaves strips of eight and four instead: 14 + 2 = 8 + 8.
template <class T>
PTK_INLINE constexpr int64_t after_full_strips(int64_t rows) {
  constexpr int64_t mr = GemmTraits<T>::kMr;
  const int64_t left = rows % mr;
  return mr == 14 && (left & 2) && rows > mr ? left + mr : left;
}

template <class T, int M, class Epilogue>
static inline void exact_rows(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                              int64_t rows, int64_t column, int64_t columns, Epilogue& epilogue) {
  if constexpr (M > 0) {
    if (rows == M) return vector_kernel<T, M>(blocks, count, k, lda, row, column, columns, epilogue);
    exact_rows<T, M - 1>(blocks, count, k, lda, row, rows, column, columns, epilogue);
  }
}

template <class T, int M, class Epilogue>
static inline void tail_rows(const GemmBlock<T>* blocks, int64_t count, int64_t k, int64_t lda, int64_t row,
                             int64_t rows, int64_t column, int64_t columns, Epilogue& epilogue) {
  if constexpr (M > 0) {
    if (rows >= M) {
      vector_kernel<T, M>(blocks, count, k, lda, row, column, columns, epilogue);
      row += M;
      rows -= M;
    }
    if (rows > 0) tail_rows<T, M / 2>(blocks, count, k, lda, row, rows, column, columns, epilogue);
  }
}

template <class T>
inline constexpr bool kUsesTiles = GemmTraits<T>::kKStep * sizeof(Element<T>) == 64;

// Types that are widened at packing share the kernels of the type they are widened to, and u4 those of unsigned bytes
// where it has none of its own.
template <class T, Multiply kMultiply = GemmTraits<T>::kMultiply>
using KernelType =
    std::conditional_t<kMultiply == Multiply::fma, Element<T>,
                       std::conditional_t<kMultiply == Multiply::madd_s16, int8_t,
                                          std::conditional_t<kMultiply == Multiply::dot_u8, uint8_t, T>>>;

// Rows [row, end) against one panel of B.
template <class T, class Epilogue>
PTK_INLINE void gemm_strips(int64_t row, int64_t end, const GemmBlock<T>* panel, int64_t count, int64_t k, int64_t lda,
                            int64_t column, int64_t columns, Epilogue& epilogue) {
  constexpr int mr = GemmTraits<T>::kMr;
#if PTK_ISA_LEVEL >= 5
  if constexpr (kUsesTiles<T>) {
    for (; row < end; row += mr)
      tile_kernel<T>(panel, count, k, lda, row, end - row < mr ? end - row : mr, column, columns, epilogue);
    return;
  }
#endif
  if constexpr (!kUsesTiles<T>) {
    if constexpr (kEvenTail<T>) {
      while (row < end) {
        const int64_t rows = strip_rows<T>(end - row);
        exact_rows<T, mr>(panel, count, k, lda, row, rows, column, columns, epilogue);
        row += rows;
      }
    } else {
      constexpr int tail = kLargestTail<T>;
      for (const int64_t full = end - after_full_strips<T>(end - row); row < full; row += mr)
        vector_kernel<T, mr>(panel, count, k, lda, row, column, columns, epilogue);
      for (; row + tail <= end; row += tail)
        vector_kernel<T, tail>(panel, count, k, lda, row, column, columns, epilogue);
      if (row < end) tail_rows<T, tail / 2>(panel, count, k, lda, row, end - row, column, columns, epilogue);
    }
  }
}

// A's rows come in runs of `length`; row 0 of run r lies starts[r] elements behind blocks[i].a. Without `starts` they
// are one run.
struct Runs {
  int64_t count, length;
  const int64_t* starts;
};

template <class T, class Epilogue>
static void gemm_panels(Runs runs, int64_t n, int64_t k, const GemmBlock<T>* blocks, int64_t count, int64_t lda,
                        int64_t panel_stride, Epilogue epilogue) {
  constexpr int nr = GemmTraits<T>::kNr;
  GemmBlock<T> panel[kMaxGemmBlocks];
  k = padded_k<T>(k);
  for (int64_t n0 = 0; n0 < n; n0 += nr) {
    const int64_t offset = n0 / nr * panel_stride, columns = least(nr, n - n0);
    for (int64_t run = 0; run < runs.count; ++run) {
      const int64_t row = run * runs.length, start = runs.starts ? runs.starts[run] - row * lda : 0;
      for (int64_t i = 0; i < count; ++i) panel[i] = {blocks[i].a + start, blocks[i].b + offset};
      gemm_strips<T>(row, row + runs.length, panel, count, k, lda, n0, columns, epilogue);
    }
  }
}

}  // namespace detail

// C[0:m, 0:n] over `count` <= kMaxGemmBlocks blocks of depth k; panel p of block i lies at blocks[i].b + p *
// panel_stride. For tiled types the caller holds a TileScope.
template <class T, class Epilogue>
PTK_INLINE void gemm(int64_t m, int64_t n, int64_t k, const GemmBlock<T>* blocks, int64_t count, int64_t lda,
                     int64_t panel_stride, const Epilogue& epilogue) {
  detail::gemm_panels<detail::KernelType<T>>({1, m, nullptr}, n, k, blocks, count, lda, panel_stride, epilogue);
}

// A of runs: `runs` times `length` rows, one after the other in C; run r of block i begins at blocks[i].a + starts[r].
template <class T, class Epilogue>
PTK_INLINE void gemm_runs(int64_t runs, int64_t length, const int64_t* starts, int64_t n, int64_t k,
                          const GemmBlock<T>* blocks, int64_t count, int64_t lda, int64_t panel_stride,
                          const Epilogue& epilogue) {
  detail::gemm_panels<detail::KernelType<T>>({runs, length, starts}, n, k, blocks, count, lda, panel_stride, epilogue);
}

// One block.
template <class T, class Epilogue>
PTK_INLINE void gemm(int64_t m, int64_t n, int64_t k, const Element<T>* a, int64_t lda, const ElementB<T>* b,
                     int64_t panel_stride, const Epilogue& epilogue) {
  const GemmBlock<T> block{a, b};
  gemm<T>(m, n, k, &block, 1, lda, panel_stride, epilogue);
}

// ---- epilogues
// ----------------------------------------------------------------------------------------------------

template <class S>
struct TileTarget {
  S* data;
  int64_t ld;
};

// C = sums
template <class S>
struct StoreSums {
  static constexpr bool kAddsTiles = false;
  S* c;
  int64_t ld;
  TileTarget<S> tile_target(int64_t row, int64_t column) const { return {c + row * ld + column, ld}; }
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<S> sums, int64_t valid) const {
    store_partial(c + row * ld + column, sums, valid);
  }
};

// C += sums
template <class S>
struct AddSums {
  static constexpr bool kAddsTiles = true;
  S* c;
  int64_t ld;
  void prefetch(int64_t rows, int64_t row, int64_t column) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t half = 0; half < 2; ++half) __builtin_prefetch(c + (row + i) * ld + column + half * kLanes<S>, 1);
  }
  TileTarget<S> tile_target(int64_t row, int64_t column) const { return {c + row * ld + column, ld}; }
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<S> sums, int64_t valid) const {
    S* p = c + row * ld + column;
    store_partial(p, load_partial(p, valid) + sums, valid);
  }
};

}  // namespace ptk::PTK_ISA
