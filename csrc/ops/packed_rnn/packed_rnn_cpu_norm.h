// Sums over the units of a row, which the slices share out.
//
// Each vector of units leaves two numbers in the row's parts. After a meeting, whoever needs the sum over a gate, or
// over several, adds the parts up: always in the order of units, so that no bit depends on the slices.
#pragma once

#include "csrc/ops/packed_rnn/packed_rnn_cpu_common.h"

namespace ptk::PTK_ISA {

template <class T>
class RowParts {
  using A = Acc<T>;
  static constexpr int64_t kLanesA = kLanes<A>;

public:
  struct Sums {
    A one, other;
  };
  struct Normal {
    A mean, scale;  // of x in (x - mean) scale
  };

  RowParts(const RnnProblem& p, int64_t gates)
      : hidden_(p.hidden), gates_(gates), eps_(static_cast<A>(p.eps)),
        stride_(round_up((p.hidden + kLanesA - 1) / kLanesA, kLanesA)) {}

  void carve(Carver& c, int64_t rows) {
    parts_ = c.take<A>(rows * 2 * gates_ * stride_);
    counts_ = c.take<A>(2 * stride_);
    rows_ = rows;
  }

  void begin() {
    std::memset(parts_, 0, rows_ * 2 * gates_ * stride_ * sizeof(A));
    for (int64_t i = 0; i < stride_; ++i) {
      const A count = static_cast<A>(most(0, least(kLanesA, hidden_ - i * kLanesA)));
      counts_[i] = count;
      counts_[stride_ + i] = count > 0 ? 1 / count : 0;
    }
  }

  void put(int64_t row, int64_t gate, int64_t unit, A one, A other) const {
    if (unit >= hidden_) return;
    A* at = part(row, gate) + unit / kLanesA;
    at[0] = one;
    at[gates_ * stride_] = other;
  }

  // The sum of a vector and that of its squared deviations, which do not cancel where the mean is far from 0.
  // In line: a vector that is wider than the machine's must not travel on the stack.
  inline __attribute__((always_inline)) void put_moments(int64_t row, int64_t gate, int64_t unit, Vec<A> x) const {
    const int64_t valid = hidden_ - unit;
    if (valid <= 0) return;
    const Vec<A> inside = iota<A>() < static_cast<A>(valid) ? broadcast(A(1)) : Vec<A>{};
    const A sum = reduce_add<A>(x * inside);
    const Vec<A> off = (x - sum * counts_[stride_ + unit / kLanesA]) * inside;
    put(row, gate, unit, sum, reduce_add<A>(off * off));
  }

  Sums sums(int64_t row, int64_t first, int64_t end) const {
    const A* from = part(row, first);
    Vec<A> one{}, other{};
    for (int64_t i = 0; i < (end - first) * stride_; i += kLanesA) {
      one += load(from + i);
      other += load(from + gates_ * stride_ + i);
    }
    return {reduce_add<A>(one), reduce_add<A>(other)};
  }

  Normal normal(int64_t row, int64_t first, int64_t end) const {
    const A* from = part(row, first);
    Vec<A> sum{}, squares{};
    for (int64_t i = 0; i < (end - first) * stride_; i += kLanesA) sum += load(from + i);
    const A count = static_cast<A>((end - first) * hidden_), mean = reduce_add<A>(sum) / count;
    for (int64_t gate = first; gate < end; ++gate, from += stride_) {
      for (int64_t i = 0; i < stride_; i += kLanesA) {
        const Vec<A> off = load(from + i) * load(counts_ + stride_ + i) - mean;
        squares += load(from + gates_ * stride_ + i) + load(counts_ + i) * off * off;
      }
    }
    return {mean, 1 / root(reduce_add<A>(squares) / count + eps_)};
  }

private:
  A* part(int64_t row, int64_t gate) const { return parts_ + (row * 2 * gates_ + gate) * stride_; }

  static float root(float x) { return __builtin_sqrtf(x); }
  static double root(double x) { return __builtin_sqrt(x); }

  const int64_t hidden_, gates_;
  const A eps_;
  const int64_t stride_;
  int64_t rows_ = 0;
  A *parts_ = nullptr, *counts_ = nullptr;
};

}  // namespace ptk::PTK_ISA
