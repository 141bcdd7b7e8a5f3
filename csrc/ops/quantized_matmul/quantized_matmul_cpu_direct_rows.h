// What the direct kernels of a call share: the input as they read it, and rows of the weight.
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_forward.h"

namespace ptk::PTK_ISA {

// Codes of the input: as wide as the integer products take them.
using DirectCode = std::conditional_t<PTK_ISA_LEVEL >= 3, int8_t, int16_t>;
template <bool kIntegers>
using DirectSum = std::conditional_t<kIntegers, int32_t, float>;

// `rows` rows of `ld` elements.
template <bool kIntegers>
struct DirectInput {
  const QuantizedWeightView& w;
  int64_t ld, rows;
  float* x;                    // float input; where it is quantized, memory for one row
  DirectCode* codes;           // quantized input
  DirectSum<kIntegers>* sums;  // [span][row][lane]

  inline __attribute__((always_inline)) const DirectSum<kIntegers>* sum(int64_t span, int64_t m) const {
    return sums + (span * rows + m) * kLanes<float>;
  }
};

// R rows of the weight.
template <int R>
struct DirectRows {
  const uint8_t* codes[R];
  const float* scales[R];
  const float* zeros[R];
  int64_t ahead;  // from a row to the one that a later block has in its place

  // Rows are often as long as a page or longer, at whose end a hardware prefetcher stops. Into L2, which waits for more
  // lines at a time than L1 can: a third faster than prefetching into L1 on Zen 4, and than 4 KB ahead.
  inline __attribute__((always_inline)) void prefetch(int r, int64_t byte) const {
    __builtin_prefetch(codes[r] + ahead + byte, 0, 2);
  }
  static constexpr int64_t kAhead = 16 * 1024;

  DirectRows(const QuantizedWeightView& w, const RowBlock& block, int64_t i)
      : ahead(round_up(kAhead, R * most(1, w.row_bytes()))) {
    for (int r = 0; r < R; ++r) {
      const int64_t row = block.row(least(i + r, block.rows() - 1));
      codes[r] = w.codes + row * w.row_bytes();
      scales[r] = w.scales + row * w.groups();
      zeros[r] = w.zeros ? w.zeros + row * w.groups() : nullptr;
    }
  }
};

// An array that is cleared as a whole is one that the compiler keeps in memory.
template <int M, int R, class V>
PTK_INLINE void clear(V (&part)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) part[r][m] = V{};
  }
}

// Lane l of the result is groups[l * parts / lanes]: numbers of `parts` groups for the lanes that hold their columns.
PTK_INLINE Vec<float> spread_groups(const float* groups, int64_t parts) {
  if (parts == 1) return broadcast(groups[0]);
#if PTK_ISA_LEVEL >= 1
  const Vec<int32_t> index = iota<int32_t>() * static_cast<int32_t>(parts) / kLanes<float>;
  return __builtin_shuffle(load_partial(groups, parts), index);
#else
  Vec<float> v{};
  for (int i = 0; i < kLanes<float>; ++i) v[i] = groups[i * parts / kLanes<float>];
  return v;
#endif
}

// Vectors in pairs to half as many, in which every source has half as many lanes as before (`Chunk`).
template <int Chunk, int... I>
PTK_INLINE Vec<float> add_halves(Vec<float> a, Vec<float> b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I), half = Chunk / 2;
  return __builtin_shufflevector(a, b, (I % (n / 2) / half * Chunk + I % half + I / (n / 2) * n)...) +
         __builtin_shufflevector(a, b, (I % (n / 2) / half * Chunk + I % half + half + I / (n / 2) * n)...);
}

// Lane i of the result is the sum of the lanes of v[i].
template <int Chunk = kLanes<float>>
PTK_INLINE Vec<float> add_across(Vec<float> (&v)[kLanes<float>]) {
  if constexpr (Chunk > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < Chunk / 2; ++i)
      v[i] = add_halves<Chunk>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes<float>>{});
    return add_across<Chunk / 2>(v);
  }
  return v[0];
}

template <int Odd, class V, int... I>
PTK_INLINE V every_other(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + Odd)...);
}

// Moves element lane * Steps + step of every block to step * lanes + lane: as often as Steps has bits, the elements of
// even index go to the first half of the block, those of odd index to the second.
template <int Steps, class U>
static inline void arrange_lanes(U* row, int64_t k) {
  constexpr int lanes = kLanes<U>;
  constexpr auto all = std::make_integer_sequence<int, lanes>{};
  for (int64_t k0 = 0; k0 < k; k0 += lanes * Steps) {
    Vec<U> v[Steps], moved[Steps];
    for (int i = 0; i < Steps; ++i) v[i] = load(row + k0 + i * lanes);
    for (int bit = 1; bit < Steps; bit *= 2) {
      for (int i = 0; i < Steps / 2; ++i) {
        moved[i] = every_other<0>(v[2 * i], v[2 * i + 1], all);
        moved[i + Steps / 2] = every_other<1>(v[2 * i], v[2 * i + 1], all);
      }
      for (int i = 0; i < Steps; ++i) v[i] = moved[i];
    }
    for (int i = 0; i < Steps; ++i) store(row + k0 + i * lanes, v[i]);
  }
}

}  // namespace ptk::PTK_ISA
