// Rotary embedding on the CPU, with the RMS normalisation before it: every row is read once and written once.
//
//   equation   rotary_embedding.h. Backward, with g the gradient of out rotated back and r = rsqrt(mean(x^2) + eps):
//              dx = r (g w - x r^2 mean(g w x)),  dw = sum over rows of g x r
//
//   layout     a token at a time: its angles are widened once, spread over the places of a row (cos for both of a pair,
//              -sin and sin), and used by all heads of query and key, which lie side by side in a projection's output
//
//   threads    kParts runs of tokens, by the shape alone; gradients of the weights are summed per run, and the runs
//   added
//              in order, so results do not depend on the number of threads
#include "csrc/core/parallel.h"
#include "csrc/cpu/carver.h"
#include "csrc/cpu/gemm/layout.h"
#include "csrc/cpu/scratch.h"
#include "csrc/ops/rotary_embedding/rotary_embedding.h"

namespace ptk::PTK_ISA {
namespace {

#if PTK_ISA_LEVEL < 3
template <class T, int... I>
PTK_INLINE Vec<T> swap_pairs(Vec<T> v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ 1)...);
}

template <class T>
class RotaryRows {
  using A = Acc<T>;
  static constexpr int kLane = kLanes<A>;

public:
  RotaryRows(const RotaryProblem& problem, bool is_backward)
      : p_(problem), is_backward_(is_backward), padded_(round_up(problem.dim, kLane)) {}

  bool run() {
    const int64_t tokens = p_.batch * p_.length, parts = least(kParts, tokens);
    const bool has_sums = p_.operands[0].grad_weight || p_.operands[1].grad_weight;
    double* sums = nullptr;
    if (has_sums) {
      sums = static_cast<double*>(__builtin_calloc(parts * 2 * padded_, sizeof(double)));
      if (!sums) return false;
    }
    bool ok = true;
    const auto part = [&](int64_t i) {
      double* own = sums ? sums + i * 2 * padded_ : nullptr;
      if (!run_tokens(tokens * i / parts, tokens * (i + 1) / parts, own))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    };
    if (tokens * (p_.operands[0].heads + p_.operands[1].heads) * p_.dim < kParallelWork) {
      for (int64_t i = 0; i < parts; ++i) part(i);
    } else {
      parallel_items(parts, part);
    }
    for (int which = 0; ok && which < 2; ++which)
      if (p_.operands[which].grad_weight) add_parts(sums + which * padded_, parts, p_.operands[which].grad_weight);
    __builtin_free(sums);
    return ok;
  }

private:
  static constexpr int64_t kParts = 64, kParallelWork = 1 << 15;

  struct Scratch {
    A *cos, *sin;  // of the token, spread over the places of a row
    A *row, *grad, *sum;
    A* weight[2];
  };

  Scratch carve(Carver& c) const {
    Scratch s;
    s.cos = c.take<A>(padded_);
    s.sin = c.take<A>(padded_);
    s.row = c.take<A>(padded_);
    s.grad = c.take<A>(padded_);
    s.sum = c.take<A>(padded_);
    for (A*& weight : s.weight) weight = c.take<A>(padded_);
    return s;
  }

  bool run_tokens(int64_t begin, int64_t end, double* sums) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    std::memset(carver.next, 0, count.bytes());
    const Scratch s = carve(carver);
    for (int which = 0; which < 2; ++which)
      if (p_.operands[which].weight) load_row(static_cast<const T*>(p_.operands[which].weight), 1, s.weight[which]);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t batch = token / p_.length, i = token % p_.length;
      load_angles(s, p_.positions ? p_.positions[batch * p_.position_strides[0] + i * p_.position_strides[1]] : i);
      for (int which = 0; which < 2; ++which) {
        const RotaryOperand& operand = p_.operands[which];
        const A* weight = operand.weight ? s.weight[which] : nullptr;
        if (is_backward_) {
          backward_token(s, operand, batch, i, weight, sums ? sums + which * padded_ : nullptr);
        } else {
          forward_token(s, operand, batch, i, weight);
        }
      }
    }
    return true;
  }

  // A column of a table to both places of its pair.
  template <class S>
  void spread(const S* table, const int64_t* strides, int64_t position, A first, A second, A* to) const {
    const int64_t half = p_.rotary_dim / 2, step = p_.interleaved ? 2 : 1, partner = p_.interleaved ? 1 : half;
    const S* from = table + position * strides[0];
    for (int64_t i = 0; i < half; ++i) {
      const A value = static_cast<A>(load_scalar(from + i * strides[1]));
      to[i * step] = value * first;
      to[i * step + partner] = value * second;
    }
  }

  void load_angles(const Scratch& s, int64_t position) const {
    const A back = is_backward_ ? -1 : 1;
    const auto load_both = [&](auto t) {
      using S = decltype(t);
      spread(static_cast<const S*>(p_.cos), p_.cos_strides, position, A(1), A(1), s.cos);
      spread(static_cast<const S*>(p_.sin), p_.sin_strides, position, -back, back, s.sin);
    };
    switch (p_.table_dtype) {
    case DType::f64:
      return load_both(double());
    case DType::f32:
      return load_both(float());
    case DType::bf16:
      return load_both(bf16());
    case DType::f16:
      return load_both(f16());
    }
  }

  static const T* row_of(const ConstView& v, int64_t batch, int64_t head, int64_t i) {
    return static_cast<const T*>(v.data) + batch * v.strides[0] + head * v.strides[1] + i * v.strides[2];
  }
  static T* row_of(const View& v, int64_t batch, int64_t head, int64_t i) {
    return static_cast<T*>(v.data) + batch * v.strides[0] + head * v.strides[1] + i * v.strides[2];
  }

  // Zeros up to a whole vector.
  void load_row(const T* from, int64_t stride, A* to) const {
    if (stride == 1) {
      for (int64_t d = 0; d < p_.dim; d += kLane) store(to + d, load_as_partial(from + d, p_.dim - d));
    } else {
      for (int64_t d = 0; d < p_.dim; ++d) to[d] = load_scalar(from + d * stride);
      for (int64_t d = p_.dim; d < padded_; ++d) to[d] = 0;
    }
  }

  // In place.
  void rotate(const Scratch& s, A* row) const {
    const int64_t n = p_.rotary_dim, half = n / 2;
    // Products are rounded before they are added, as in the composition and in attention's cache: the same bits.
    const auto turn = [&](int64_t d, int64_t valid, Vec<A> x, Vec<A> partner) __attribute__((always_inline)) {
      Vec<A> straight = x * load_partial(s.cos + d, valid), across = partner * load_partial(s.sin + d, valid);
      PTK_OPAQUE(straight);
      PTK_OPAQUE(across);
      store_partial(row + d, straight + across, valid);
    };
    if (p_.interleaved) {
      for (int64_t d = 0; d < n; d += kLane) {
        const Vec<A> x = load(row + d);
        turn(d, n - d, x, swap_pairs<A>(x, std::make_integer_sequence<int, kLane>{}));
      }
    } else {
      for (int64_t d = 0; d < half; d += kLane) {
        const Vec<A> a = load_partial(row + d, half - d), b = load_partial(row + d + half, half - d);
        turn(d, half - d, a, b);
        turn(d + half, half - d, b, a);
      }
    }
  }

  A inverse_norm(const A* row) const {
    Vec<A> sum{};
    for (int64_t d = 0; d < p_.dim; d += kLane) sum += load(row + d) * load(row + d);
    const A mean = reduce_add<A>(sum) / static_cast<A>(p_.dim) + static_cast<A>(p_.eps);
    return 1 / root(mean);
  }
  static float root(float x) { return __builtin_sqrtf(x); }
  static double root(double x) { return __builtin_sqrt(x); }

  void write_row(const A* row, T* to) const {
    for (int64_t d = 0; d < p_.dim; d += kLane) store_as_partial(to + d, load(row + d), p_.dim - d);
  }

  void forward_token(const Scratch& s, const RotaryOperand& o, int64_t batch, int64_t i, const A* weight) const {
    for (int64_t head = 0; head < o.heads; ++head) {
      load_row(row_of(o.input, batch, head, i), o.input.strides[3], s.row);
      if (weight) {
        const A r = inverse_norm(s.row);
        for (int64_t d = 0; d < p_.dim; d += kLane) store(s.row + d, load(s.row + d) * r * load(weight + d));
      }
      rotate(s, s.row);
      write_row(s.row, row_of(o.out, batch, head, i));
    }
  }

  void backward_token(const Scratch& s, const RotaryOperand& o, int64_t batch, int64_t i, const A* weight,
                      double* sums) const {
    if (!o.out.data && !o.grad_weight) return;
    for (int64_t d = 0; d < padded_; ++d) s.sum[d] = 0;
    for (int64_t head = 0; head < o.heads; ++head) {
      load_row(row_of(o.grad_out, batch, head, i), o.grad_out.strides[3], s.grad);
      rotate(s, s.grad);
      if (weight) {
        load_row(row_of(o.input, batch, head, i), o.input.strides[3], s.row);
        normalize_back(s, weight);
      }
      if (o.out.data) write_row(s.grad, row_of(o.out, batch, head, i));
    }
    if (o.grad_weight)
      for (int64_t d = 0; d < p_.dim; ++d) sums[d] += s.sum[d];
  }

  // The gradient of n becomes that of x; adds to the sums of the weight's.
  void normalize_back(const Scratch& s, const A* weight) const {
    const A r = inverse_norm(s.row);
    Vec<A> dot{};
    for (int64_t d = 0; d < p_.dim; d += kLane) {
      const Vec<A> x = load(s.row + d), g = load(s.grad + d), gw = g * load(weight + d);
      store(s.sum + d, load(s.sum + d) + g * x * r);
      store(s.grad + d, gw);
      dot += gw * x;
    }
    const A factor = reduce_add<A>(dot) / static_cast<A>(p_.dim) * r * r;
    for (int64_t d = 0; d < p_.dim; d += kLane) store(s.grad + d, (load(s.grad + d) - load(s.row + d) * factor) * r);
  }

  void add_parts(const double* sums, int64_t parts, void* grad_weight) const {
    T* to = static_cast<T*>(grad_weight);
    for (int64_t d = 0; d < p_.dim; ++d) {
      double sum = 0;
      for (int64_t i = 0; i < parts; ++i) sum += sums[i * 2 * padded_ + d];
      to[d] = round_to<T>(static_cast<A>(sum));
    }
  }

  const RotaryProblem& p_;
  const bool is_backward_;
  const int64_t padded_;
};

bool run(const RotaryProblem& p, bool is_backward) {
  switch (p.dtype) {
  case DType::f64:
    return RotaryRows<double>(p, is_backward).run();
  case DType::f32:
    return RotaryRows<float>(p, is_backward).run();
  case DType::bf16:
    return RotaryRows<bf16>(p, is_backward).run();
  case DType::f16:
    return RotaryRows<f16>(p, is_backward).run();
  }
  __builtin_unreachable();
}

bool forward(const RotaryProblem& p) {
  return run(p, false);
}
bool backward(const RotaryProblem& p) {
  return run(p, true);
}
#endif

}  // namespace

// Nothing here differs above avx512.
const RotaryKernels& rotary_kernels() {
#if PTK_ISA_LEVEL < 3
  static constexpr RotaryKernels kernels = {forward, backward};
  return kernels;
#else
  return avx512::rotary_kernels();
#endif
}

}  // namespace ptk::PTK_ISA
