// What the CPU kernels of attention share: views of the operands, and which keys a row of queries sees.
#pragma once

#include "csrc/core/parallel.h"
#include "csrc/cpu/carver.h"
#include "csrc/cpu/gemm/pieces.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/scratch.h"
#include "csrc/ops/attention/attention.h"

namespace ptk::PTK_ISA {

// Rows of one head: element (row, dim) of a [batch, heads, length, dim] operand.
template <class T>
struct HeadView {
  T* data;
  int64_t stride_row, stride_dim;
  T* row(int64_t i) const { return data + i * stride_row; }
};

template <class T>
PTK_INLINE HeadView<const T> head_of(const ConstView& v, int64_t batch, int64_t head, int64_t first = 0) {
  return {static_cast<const T*>(v.data) + batch * v.strides[0] + head * v.strides[1] + first * v.strides[2],
          v.strides[2], v.strides[3]};
}
template <class T>
PTK_INLINE HeadView<T> head_of(const View& v, int64_t batch, int64_t head, int64_t first = 0) {
  return {static_cast<T*>(v.data) + batch * v.strides[0] + head * v.strides[1] + first * v.strides[2], v.strides[2],
          v.strides[3]};
}

// One batch of a problem: where its rows are, and the band of keys that each of them sees.
struct Sequence {
  int64_t batch, first_q, len_q, first_k, len_k;
  int64_t diagonal;
  int64_t low, high;  // row i sees keys i + low to i + high

  int64_t first_key(int64_t i) const { return least(most(0, i + low), len_k); }
  int64_t end_key(int64_t i) const { return most(0, least(len_k, i + high + 1)); }
  // Rows that see any of the keys k0 to k0 + keys - 1.
  int64_t first_row(int64_t k0) const { return least(most(0, k0 - high), len_q); }
  int64_t end_row(int64_t k0, int64_t keys) const { return most(0, least(len_q, k0 + keys - low)); }
};

PTK_INLINE Sequence sequence_of(const Problem& p, int64_t batch) {
  Sequence s{batch, 0, p.len_q, 0, p.len_k, 0, 0, 0};
  if (p.first_q) {
    s.first_q = p.first_q[batch];
    s.len_q = p.first_q[batch + 1] - s.first_q;
    s.first_k = p.first_k[batch];
    s.len_k = p.first_k[batch + 1] - s.first_k;
  }
  s.diagonal = p.bottom_right ? s.len_k - s.len_q : 0;
  s.low = s.diagonal - p.left;
  s.high = s.diagonal + (p.is_causal ? 0 : p.right);
  return s;
}

// Where a sequence's rows of one head are in lse and what is laid out like it.
PTK_INLINE int64_t lse_offset(const Problem& p, const Sequence& s, int64_t head) {
  return p.first_q ? head * p.total_q + s.first_q : (s.batch * p.heads_q + head) * p.len_q;
}

template <class A>
PTK_INLINE A head_value(const HeadValues& values, int64_t batch, int64_t head) {
  return static_cast<const A*>(values.data)[batch * values.strides[0] + head * values.strides[1]];
}

// Where the bias of row 0 and key 0 is; that of row i and key j lies j - i after it.
template <class A>
PTK_INLINE const A* relative_bias_of(const Problem& p, int64_t batch, int64_t head) {
  const int64_t* strides = p.relative_bias.strides;
  return static_cast<const A*>(p.relative_bias.data) + batch * strides[0] + head * strides[1] + p.distance_zero;
}

// Lane i of the result combines all lanes of rows[i], which are lost.
template <class A, int Step = kLanes<A> / 2, class Combine>
PTK_INLINE Vec<A> fold_lanes(Vec<A> (&rows)[kLanes<A>], const Combine& combine) {
  if constexpr (Step == 0) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Step; ++i) {
      detail::swap_halves<A, Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kLanes<A>>{});
      rows[i] = combine(rows[i], rows[i + Step]);
    }
    return fold_lanes<A, Step / 2>(rows, combine);
  }
}
template <class A>
PTK_INLINE Vec<A> sums_of_lanes(Vec<A> (&rows)[kLanes<A>]) {
  return fold_lanes<A>(rows, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return a + b; });
}
template <class A>
PTK_INLINE Vec<A> maxima_of_lanes(Vec<A> (&rows)[kLanes<A>]) {
  return fold_lanes<A>(rows, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return max(a, b); });
}

// Not the double log2: its symbol is newer than the oldest glibc that the library promises to load on.
PTK_INLINE float log2_of(float x) {
  return __builtin_log2f(x);
}
PTK_INLINE double log2_of(double x) {
  return static_cast<double>(__builtin_log2l(x));
}

// e^x; 0 for -inf.
template <class A>
PTK_INLINE A exp_of(A x) {
  return exp2(broadcast(x * static_cast<A>(kLog2E)))[0];
}

// One finished row: out = sums / (denominator * keep), lse = shift + log(denominator).
template <class T, class A>
PTK_INLINE void write_row(const A* sums, A shift, A denominator, int64_t dim, T* out, A* lse, A keep = 1) {
  if (denominator == 0) {
    std::memset(out, 0, dim * sizeof(T));
    *lse = -static_cast<A>(__builtin_inf());
    return;
  }
  const A divisor = denominator * keep;
  for (int64_t d = 0; d < dim; d += kLanes<A>) store_as_partial(out + d, load(sums + d) / divisor, dim - d);
  *lse = multiply_add<A>(broadcast(log2_of(denominator)), broadcast(static_cast<A>(kLn2)), broadcast(shift))[0];
}

// The sink takes part in a row's softmax with no value of its own.
template <class A>
PTK_INLINE void join_sink(A sink, A* sums, int64_t dim, A& shift, A& denominator) {
  const A top = shift > sink ? shift : sink;
  if (top == -static_cast<A>(__builtin_inf())) return;
  const A factor = exp_of(shift - top);
  for (int64_t d = 0; d < dim; d += kLanes<A>) store(sums + d, load(sums + d) * factor);
  denominator = multiply_add<A>(broadcast(denominator), broadcast(factor), broadcast(exp_of(sink - top)))[0];
  shift = top;
}

}  // namespace ptk::PTK_ISA
