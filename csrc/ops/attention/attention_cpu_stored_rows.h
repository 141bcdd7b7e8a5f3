// Few rows of queries against keys and values where they are stored, never packed: limited by how fast those are read.
//
//   rows     a stored row is read, and widened, once for up to four rows of queries
//   scores   sums over dim stay in registers; a vector's worth of them is transposed and added at once
//   values   blocks of kBlock rows stay in L1 while a slice of the output row after the other is summed in registers
//   memory   rows are addressed through a list of pointers, so that pages and strides cost nothing in the loops, and
//   are
//            prefetched a fixed number of rows ahead, which the hardware does not do across pages
#pragma once

#include "attention_cpu_common.h"

namespace ptk::PTK_ISA {

// Two vectors of consecutive stored values: the first and the last or, where that saves instructions, those in even and
// those in odd places.
template <class C>
struct PairOf {
  using A = Acc<C>;
  static constexpr int kStep = 2 * kLanes<A>;
  static constexpr bool kInOrder = true;
  PTK_INLINE void load_pair(const C* p, Vec<A>& low, Vec<A>& high) {
    low = load_as(p);
    high = load_as(p + kLanes<A>);
  }
};

template <>
struct PairOf<bf16> {
  using A = float;
  static constexpr int kStep = 2 * kLanes<A>;
  static constexpr bool kInOrder = false;
  PTK_INLINE void load_pair(const bf16* p, Vec<A>& low, Vec<A>& high) {
    const Vec<uint32_t> both = load(reinterpret_cast<const uint32_t*>(p));
    low = bit_cast<Vec<float>>(both << 16);
    high = bit_cast<Vec<float>>(both & 0xffff0000u);
  }
  // Between a pair and two vectors in the order of memory.
  template <int... I>
  PTK_INLINE void to_pair(Vec<A>& x, Vec<A>& y, std::integer_sequence<int, I...>) {
    const Vec<A> low = __builtin_shufflevector(x, y, 2 * I...);
    y = __builtin_shufflevector(x, y, 2 * I + 1 ...);
    x = low;
  }
  template <int... I>
  PTK_INLINE void from_pair(Vec<A>& x, Vec<A>& y, std::integer_sequence<int, I...>) {
    constexpr int lanes = kLanes<A>;
    const Vec<A> first = __builtin_shufflevector(x, y, (I / 2 + I % 2 * lanes)...);
    y = __builtin_shufflevector(x, y, (lanes / 2 + I / 2 + I % 2 * lanes)...);
    x = first;
  }
};

template <class C>
struct StoredRows {
  using A = Acc<C>;
  using Pair = PairOf<C>;
  static constexpr int kStep = Pair::kStep, kLane = kLanes<A>;
  static constexpr std::make_integer_sequence<int, kLane> kIndices{};
  // Rows of values that stay in L1 while all of dim_v is summed, and rows between a prefetch and the use.
  static constexpr int64_t kBlock = 32;

  int64_t dim_qk, dim_v;
  int64_t ld_scores, ld_out;

  int64_t ld_q() const { return round_up(dim_qk, kStep); }
  int64_t ld_v() const { return round_up(dim_v, kStep); }

  // Between the order of memory and the order of pairs, whose rows are whole steps: zeros behind n.
  static void to_pairs(const A* from, int64_t n, A* to) {
    for (int64_t d = 0; d < n; d += kStep) {
      Vec<A> x = load_partial(from + d, n - d),
             y = n - d > kLane ? load_partial(from + d + kLane, n - d - kLane) : Vec<A>{};
      if constexpr (!Pair::kInOrder) Pair::to_pair(x, y, kIndices);
      store(to + d, x);
      store(to + d + kLane, y);
    }
  }
  static void from_pairs(const A* from, int64_t n, A* to) {
    for (int64_t d = 0; d < n; d += kStep) {
      Vec<A> x = load(from + d), y = load(from + d + kLane);
      if constexpr (!Pair::kInOrder) Pair::from_pair(x, y, kIndices);
      store(to + d, x);
      store(to + d + kLane, y);
    }
  }

  // What is prefetched behind the n rows that the lists hold: the lists have room for kBlock more.
  static void look_ahead(const C** keys, const C** values, int64_t n) {
    for (int64_t j = 0; j < kBlock; ++j) {
      keys[n + j] = values[least(j, n - 1)];
      values[n + j] = values[n - 1];
    }
  }

  // scores[r][j] = <query r, key j>; queries in the order of pairs.
  void score(const A* q, int64_t rows, const C* const* keys, int64_t n, A* scores) const {
    for_rows(rows,
             [&](auto count, int64_t r) { score_keys<count()>(q + r * ld_q(), keys, n, scores + r * ld_scores); });
  }

  // out[r] = sum over j of p[r][j] values[j], in the order of pairs.
  void weigh(const A* p, int64_t rows, const C* const* values, int64_t n, A* out) const {
    for_rows(rows,
             [&](auto count, int64_t r) { weigh_values<count()>(p + r * ld_scores, values, n, out + r * ld_out); });
  }

private:
  // Calls body(R, r) for runs of R = 4, 2, 1 rows that begin at row r.
  template <class Body>
  static inline __attribute__((always_inline)) void for_rows(int64_t rows, const Body& body) {
    int64_t r = 0;
    if constexpr (kLane >= 4)
      for (; r + 4 <= rows; r += 4) body(std::integral_constant<int, 4>{}, r);
    for (; r + 2 <= rows; r += 2) body(std::integral_constant<int, 2>{}, r);
    if (r < rows) body(std::integral_constant<int, 1>{}, r);
  }

  static inline __attribute__((always_inline)) void load_tail(const C* p, int64_t n, Vec<A>& low, Vec<A>& high) {
    C buffer[kStep] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    Pair::load_pair(buffer, low, high);
  }

  // A row at a time and in the order of memory: that is what the hardware's own prefetching recognises and runs ahead
  // of.
  // Into L2, which waits for more lines at a time than L1 can.
  static inline __attribute__((always_inline)) void prefetch_row(const C* row, int64_t n) {
    for (int64_t d = 0; d < n; d += 64 / static_cast<int64_t>(sizeof(C))) __builtin_prefetch(row + d, 0, 2);
  }

  // scores[r][j] of R queries: the sums of kLane (query, key) pairs at a time, G keys in each pass over dim.
  template <int R>
  void score_keys(const A* q, const C* const* keys, int64_t n, A* scores) const {
    constexpr int J = kLane / R, G = J > 1 ? 2 : 1;
    for (int64_t j = 0; j < n; j += J) {
      Vec<A> sum[kLane] = {};
#pragma GCC unroll 8
      for (int g = 0; g < J; g += G) {
        if (j + g >= n) continue;
        const C* k[G];
#pragma GCC unroll 2
        for (int i = 0; i < G; ++i) {
          k[i] = keys[least(j + g + i, n - 1)];
          prefetch_row(keys[least(j + g + i + kBlock, n + kBlock - 1)], dim_qk);
        }
        multiply_keys<R, G, J>(q, k, sum + g);
      }
      A by_pair[kLane];
      store(by_pair, sums_of_lanes<A>(sum));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) std::memcpy(scores + r * ld_scores + j, by_pair + r * J, J * sizeof(A));
    }
  }

  // sum[r * J + i] += products of query r and key i.
  template <int R, int G, int J>
  inline __attribute__((always_inline)) void multiply_keys(const A* q, const C* const (&k)[G], Vec<A>* sum) const {
    const int64_t full = dim_qk / kStep * kStep, tail = dim_qk - full;
    Vec<A> low[G], high[G];
    auto add = [&](int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> q0 = load(q + r * ld_q() + d), q1 = load(q + r * ld_q() + d + kLane);
#pragma GCC unroll 2
        for (int i = 0; i < G; ++i) {
          sum[r * J + i] += q0 * low[i];
          sum[r * J + i] += q1 * high[i];
        }
      }
    };
    for (int64_t d = 0; d < full; d += kStep) {
#pragma GCC unroll 2
      for (int i = 0; i < G; ++i) Pair::load_pair(k[i] + d, low[i], high[i]);
      add(d);
    }
    if (tail) {
#pragma GCC unroll 2
      for (int i = 0; i < G; ++i) load_tail(k[i] + full, tail, low[i], high[i]);
      add(full);
    }
  }

  template <int R>
  void weigh_values(const A* p, const C* const* values, int64_t n, A* out) const {
    for (int r = 0; r < R; ++r) std::memset(out + r * ld_out, 0, ld_v() * sizeof(A));
    constexpr int wide = 4 / R;
    const int64_t full = dim_v / kStep * kStep;
    const int64_t slices = (full / kStep + wide - 1) / wide, ahead = slices ? (kBlock + slices - 1) / slices : kBlock;
    for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
      const int64_t count = least(kBlock, n - j0);
      int64_t d = 0, next = 0;
      // The rows of the next block, a share of them before each slice of this one.
      auto prefetch = [&]() __attribute__((always_inline)) {
        for (const int64_t end = least(next + ahead, count); next < end; ++next)
          prefetch_row(values[j0 + kBlock + next], dim_v);
      };
      if constexpr (wide > 1)
        for (; d + wide * kStep <= full; d += wide * kStep) {
          prefetch();
          weigh_slice<R, wide>(p + j0, values + j0, count, d, out);
        }
      for (; d < full; d += kStep) {
        prefetch();
        weigh_slice<R, 1>(p + j0, values + j0, count, d, out);
      }
      if (d < dim_v) weigh_tail<R>(p + j0, values + j0, count, d, out);
    }
  }

  // S pairs of vectors of the sums in registers.
  template <int R, int S>
  inline __attribute__((always_inline)) void weigh_slice(const A* p, const C* const* values, int64_t count, int64_t d,
                                                         A* out) const {
    Vec<A> sum[R][2 * S];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2 * S; ++i) sum[r][i] = load(out + r * ld_out + d + i * kLane);
    for (int64_t j = 0; j < count; ++j) {
      const C* v = values[j] + d;
      Vec<A> x[2 * S];
#pragma GCC unroll 4
      for (int i = 0; i < S; ++i) Pair::load_pair(v + i * kStep, x[2 * i], x[2 * i + 1]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> weight = broadcast(p[r * ld_scores + j]);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * S; ++i) sum[r][i] += weight * x[i];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2 * S; ++i) store(out + r * ld_out + d + i * kLane, sum[r][i]);
  }

  template <int R>
  void weigh_tail(const A* p, const C* const* values, int64_t count, int64_t d, A* out) const {
    Vec<A> sum[R][2];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) sum[r][i] = load(out + r * ld_out + d + i * kLane);
    for (int64_t j = 0; j < count; ++j) {
      Vec<A> x[2];
      load_tail(values[j] + d, dim_v - d, x[0], x[1]);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) sum[r][i] += broadcast(p[r * ld_scores + j]) * x[i];
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) store(out + r * ld_out + d + i * kLane, sum[r][i]);
  }
};

}  // namespace ptk::PTK_ISA
