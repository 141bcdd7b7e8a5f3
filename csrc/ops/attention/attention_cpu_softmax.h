// The softmax of the forward kernels: exponentials of rows of scores, and the running softmax as an epilogue of the
// product that makes the scores.
#pragma once

#include "attention_cpu_scores.h"

namespace ptk::PTK_ISA {

// As exact as its result can show: P is what the probabilities are rounded to.
template <class P>
PTK_INLINE Vec<Acc<P>> softmax_exp2(Vec<Acc<P>> x) {
  if constexpr (sizeof(P) == 2) {
    return exp2<4>(x);
  } else {
    return exp2(x);
  }
}

// Lane by lane.
template <class A>
PTK_INLINE Vec<A> row_maxima(const A* s, int64_t n) {
  const A lowest = -static_cast<A>(__builtin_inf());
  Vec<A> m0 = broadcast(lowest), m1 = m0;
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>) {
    m0 = max(m0, load(s + j));
    m1 = max(m1, load(s + j + kLanes<A>));
  }
  // Rows are padded to whole vectors; what lies past n does not count.
  const Vec<A> lane = iota<A>();
  for (; j < n; j += kLanes<A>) m1 = max(m1, lane < static_cast<A>(n - j) ? load(s + j) : broadcast(lowest));
  return max(m0, m1);
}

template <class A>
PTK_INLINE A row_max(const A* s, int64_t n) {
  return reduce_max<A>(row_maxima(s, n));
}

namespace detail {

// p[j] = 2^exponent(s[j]) for j < n, zeros up to n_padded; returns the sums lane by lane. p may be s.
template <class A, class P, class Exponent>
PTK_INLINE Vec<A> exp2_sums(const A* s, P* p, int64_t n, int64_t n_padded, const Exponent& exponent) {
  Vec<A> sum0{}, sum1{};
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>) {
    Vec<A> p0 = softmax_exp2<P>(exponent(load(s + j)));
    Vec<A> p1 = softmax_exp2<P>(exponent(load(s + j + kLanes<A>)));
    sum0 += p0;
    sum1 += p1;
    store_pair_as(p + j, p0, p1);
  }
  // Rows are padded to whole vectors, so the rest is computed in full and the lanes past n are cleared. Every vector
  // goes to the sum that its place names, wherever n is: a row's sum is the same whether keys are hidden or not there.
  const Vec<A> lane = iota<A>();
  for (; j < n_padded; j += kLanes<A>) {
    Vec<A> v = softmax_exp2<P>(exponent(load(s + j)));
    v = lane < static_cast<A>(n - j) ? v : Vec<A>{};
    const Vec<A> added = sum0 + v;
    sum0 = sum1;
    sum1 = added;
    store_as(p + j, v);
  }
  return sum0 + sum1;
}

}  // namespace detail

// p[j] = 2^((s[j] - shift) * scale) for j < n, zeros up to n_padded; returns the sums lane by lane. p may be s.
template <class A, class P>
PTK_INLINE Vec<A> exp2_row_sums(const A* s, P* p, int64_t n, int64_t n_padded, A scale, A shift) {
  // One operation less. It multiplies all of a row by what the offset was rounded by, which 16 bits do not show, and
  // overflows with scores near the largest number.
  if (sizeof(P) == 2 && __builtin_fabs(shift * scale) < A(1e37)) {
    // Rounded by itself: which of the two products is contracted would be the compiler's choice.
    Vec<A> offset = broadcast(shift * scale);
    PTK_OPAQUE(offset);
    return detail::exp2_sums(s, p, n, n_padded,
                             [=](Vec<A> x) __attribute__((always_inline)) { return x * scale - offset; });
  }
  return detail::exp2_sums(s, p, n, n_padded,
                           [=](Vec<A> x) __attribute__((always_inline)) { return (x - shift) * scale; });
}

template <class A, class P>
PTK_INLINE A exp2_row(const A* s, P* p, int64_t n, int64_t n_padded, A scale, A shift) {
  return reduce_add<A>(exp2_row_sums(s, p, n, n_padded, scale, shift));
}

// Epilogue of S = Q K^T for a block of rows and a run of keys: P = exp2((S - shift) * scale), rounded as the product
// with V takes it, while a strip of S is in L1. S itself is never stored.
//
// A row's shift is a maximum of what it has seen, but not always the latest: it is raised, and what was computed with
// the old one is scaled, only where a score exceeds it by kSlack, probabilities by 2^kSlack. Few rows ever do after
// their first strip, so a strip costs one comparison instead of maxima across lanes, and rows of out are scaled when
// that happens instead of once per run of keys. The slack is small for the sake of rows that one key dominates: it
// comes out as 1, which 16 bits hold exactly. What is scaled inside a run is rounded once more, at 2^-kSlack of the
// row's largest.
template <class T, class G>
class SoftmaxStrips {
  using E = Element<G>;
  using A = Acc<T>;
  using P = std::conditional_t<std::is_same_v<G, T>, E, A>;
  static constexpr int kNr = GemmTraits<G>::kNr, kLane = kLanes<A>;
  static_assert(kNr == 2 * kLane);
  static constexpr A kSlack = 3, kLowest = -static_cast<A>(__builtin_inf());
  // x * scale - shift * scale is one operation less than (x - shift) * scale. It multiplies all of a row by what the
  // second product was rounded by, which 16 bits do not show, and overflows with scores near the largest number.
  static constexpr bool kFoldsShift = sizeof(P) == 2;
  static constexpr A kFar = static_cast<A>(1e37);

public:
  static constexpr bool kLarge = true, kStrip = true;

  // Of each row of the block.
  struct Rows {
    A* shift;     // -inf before the first score
    A* limit;     // a strip with a score above it needs raise()
    A* subtract;  // from the scaled score or, where the shift is not folded into it, from the score
    A* sum;       // of probabilities, lane by lane
    void clear(int64_t rows) const {
      for (int64_t i = 0; i < rows; ++i) {
        shift[i] = limit[i] = kLowest;
        subtract[i] = 0;
        store(sum + i * kLane, Vec<A>{});
      }
    }
    A total(int64_t row) const { return reduce_add<A>(load(sum + row * kLane)); }
  };

  const Problem& p;
  const Sequence& seq;
  int64_t head, q0, k0;
  A scale;         // of scores as they come from shape_rows or, without it, from the product
  A product_unit;  // what shape_rows multiplies products by
  Rows of_rows;
  E* prob;
  int64_t ld_prob;
  A* out;  // sums of earlier runs; null in the first
  int64_t ld_out;

  void strip(int rows, int64_t row, int64_t column, int64_t columns, A* scores) const {
    if (has_shaped_scores(p))
      shape_rows<T>(p, seq, head, scores, kNr, q0 + row, rows, k0 + column, columns, product_unit);
    hide(rows, row, column, columns, scores);
    Vec<A> excess[4] = {broadcast(kLowest), broadcast(kLowest), broadcast(kLowest), broadcast(kLowest)};
    const A* limit = of_rows.limit + row;
    auto compare = [&](int i, Vec<A>& most) __attribute__((always_inline)) {
      // The order of operands matters: NaN, of a row that is lost, must not hide another row's excess.
      most = max(max(load(scores + i * kNr), load(scores + i * kNr + kLane)) - limit[i], most);
    };
    int i = 0;
    for (; i + 4 <= rows; i += 4)
      for (int j = 0; j < 4; ++j) compare(i + j, excess[j]);
    for (; i < rows; ++i) compare(i, excess[0]);
    bool is_far = false;
    if (any(max(max(excess[0], excess[1]), max(excess[2], excess[3])) > A(0)))
      for (i = 0; i < rows; i += kLane) is_far |= raise(least(kLane, rows - i), row + i, column, scores + i * kNr);
    if (kFoldsShift && !is_far) {
      exponentiate(rows, row, column, scores, of_rows.subtract,
                   [this](Vec<A> x, A subtract) __attribute__((always_inline)) { return x * scale - subtract; });
    } else {
      exponentiate(rows, row, column, scores, kFoldsShift ? of_rows.shift : of_rows.subtract,
                   [this](Vec<A> x, A shift) __attribute__((always_inline)) {
                     if (kFoldsShift && shift == kLowest) shift = 0;
                     return (x - shift) * scale;
                   });
    }
  }

private:
  // Scores of keys that a row does not see, and of columns of padding, become -inf.
  void hide(int rows, int64_t row, int64_t column, int64_t columns, A* scores) const {
    const int64_t first = q0 + row, key = k0 + column;
    if (columns == kNr && seq.end_key(first) >= key + kNr && seq.first_key(first + rows - 1) <= key) return;
    for (int i = 0; i < rows; ++i, scores += kNr) {
      const auto begin = static_cast<A>(least(kNr, most(0, seq.first_key(first + i) - key)));
      const auto end = static_cast<A>(least(columns, most(0, seq.end_key(first + i) - key)));
      for (int j = 0; j < kNr; j += kLane) {
        const Vec<A> place = iota<A>() + static_cast<A>(j), hidden = broadcast(kLowest);
        const Vec<A> x = place < end ? load(scores + j) : hidden;
        store(scores + j, place < begin ? hidden : x);
      }
    }
  }

  // Raises shifts of up to a vector's lanes of rows, where these scores call for it. Returns whether one is too far
  // from 0 to be folded; the strips of such a row all come here.
  bool raise(int64_t count, int64_t row, int64_t column, const A* scores) const {
    Vec<A> part[kLane];
    for (int i = 0; i < kLane; ++i)
      part[i] = i < count ? max(load(scores + i * kNr), load(scores + i * kNr + kLane)) : broadcast(kLowest);
    const Vec<A> before = load_partial(of_rows.shift + row, count), top = maxima_of_lanes<A>(part);
    const Vec<A> shift = top > before + kSlack / scale ? top : before;
    A factor[kLane];
    store(factor, exp2((before - shift) * scale));
    for (int i = 0; i < count; ++i)
      if (before[i] != kLowest && before[i] != shift[i]) scale_row(row + i, column, factor[i]);
    Vec<A> limit = shift + kSlack / scale, subtract = kFoldsShift ? shift * scale : shift;
    const auto is_far = kFoldsShift && max(subtract, -subtract) >= kFar;
    subtract = is_far || shift == kLowest ? Vec<A>{} : subtract;
    limit = is_far ? broadcast(kLowest) : limit;
    store_partial(of_rows.shift + row, shift, count);
    store_partial(of_rows.limit + row, limit, count);
    store_partial(of_rows.subtract + row, subtract, count);
    return any(is_far && shift != kLowest);
  }

  // All that has been computed for a row: sums, this run's probabilities, what earlier runs have added to out.
  void scale_row(int64_t row, int64_t column, A factor) const {
    auto multiply = [factor](auto* data, int64_t n) {
      for (int64_t i = 0; i < n; i += kLane) store_as(data + i, load_as(data + i) * factor);
    };
    multiply(of_rows.sum + row * kLane, kLane);
    if (out) multiply(out + row * ld_out, ld_out);
    E* of_run = prob + row * ld_prob;
    if constexpr (kPlanes<G> > 1) {
      A x[kLane];
      for (E* lo = of_run + ld_prob / 2; column > 0; column -= kLane, of_run += kLane, lo += kLane) {
        store(x, (load_as(of_run) + load_as(lo)) * factor);
        split_row(x, 1, kLane, kLane, of_run, lo);
      }
    } else {
      multiply(of_run, column);
    }
  }

  template <class Exponent>
  inline __attribute__((always_inline)) void exponentiate(int rows, int64_t row, int64_t column, A* scores,
                                                          const A* subtracted, const Exponent& exponent) const {
    A* sum = of_rows.sum + row * kLane;
    E* to = prob + row * ld_prob + column;
    for (int i = 0; i < rows; ++i, scores += kNr, sum += kLane, to += ld_prob) {
      const Vec<A> p0 = softmax_exp2<P>(exponent(load(scores), subtracted[row + i]));
      const Vec<A> p1 = softmax_exp2<P>(exponent(load(scores + kLane), subtracted[row + i]));
      store(sum, load(sum) + (p0 + p1));
      if constexpr (std::is_same_v<G, T>) {
        store_pair_as(to, p0, p1);
      } else {
        store(scores, p0);
        store(scores + kLane, p1);
        split_row(scores, 1, kNr, kNr, to, kPlanes<G> > 1 ? to + ld_prob / 2 : nullptr);
      }
    }
  }
};

}  // namespace ptk::PTK_ISA
