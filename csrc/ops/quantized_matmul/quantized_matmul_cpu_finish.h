// From sums to results: scale of the input row, bias, residual, activation, conversion. Sums arrive transposed, a row
// of the weight at a time; a square of them is turned in registers on the way out.
#pragma once

#include "csrc/cpu/math.h"
#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_decode.h"

namespace ptk::PTK_ISA {

// ---- activations
// -----------------------------------------------------------------------------------------------

// 2^x, x held within what exp2 takes; NaN stays NaN.
PTK_INLINE Vec<float> exp2_clamped(Vec<float> x) {
  return exp2(x > 126.0f ? broadcast(126.0f) : x);
}

PTK_INLINE Vec<float> sigmoid(Vec<float> x) {
  return 1.0f / (1.0f + exp2_clamped(x * static_cast<float>(-kLog2E)));
}

// x times the normal distribution's integral, by erfc(z) = t p(t) exp(-z^2), t = 1 / (1 + 0.3275911 z): Abramowitz and
// Stegun, 7.1.26, absolute error below 1.5e-7.
PTK_INLINE Vec<float> gelu(Vec<float> x) {
  const Vec<float> z = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vec<float> t = 1.0f / (z * 0.3275911f + 1.0f);
  Vec<float> p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec<float> tail = p * t * exp2_clamped(z * z * static_cast<float>(-kLog2E)) * 0.5f;
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

PTK_INLINE Vec<float> gelu_tanh(Vec<float> x) {
  return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
}

// Results in float64 serve as a reference: accuracy before speed.
template <class Body>
PTK_INLINE Vec<double> by_lane(Vec<double> x, const Body& body) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = body(x[i]);
  return x;
}
PTK_INLINE Vec<double> sigmoid(Vec<double> x) {
  return by_lane(x, [](double v) { return 1.0 / (1.0 + __builtin_exp(-v)); });
}
PTK_INLINE Vec<double> gelu(Vec<double> x) {
  return by_lane(x, [](double v) { return 0.5 * v * __builtin_erfc(-v * 0.70710678118654752440); });
}
PTK_INLINE Vec<double> gelu_tanh(Vec<double> x) {
  return x * sigmoid(1.5957691216057307117 * (x + 0.044715 * x * x * x));
}

template <class V>
PTK_INLINE V activate(LinearActivation activation, V x) {
  switch (activation) {
  case LinearActivation::relu:
    return max(V{}, x);
  case LinearActivation::gelu:
    return gelu(x);
  case LinearActivation::gelu_tanh:
    return gelu_tanh(x);
  case LinearActivation::silu:
    return x * sigmoid(x);
  default:
    return x;
  }
}

// ---- vectors of a dtype known at run time
// --------------------------------------------------------------------------

template <class F>
PTK_INLINE Vec<F> load_any(const void* data, DType dtype, int64_t index, int64_t valid) {
  if constexpr (std::is_same_v<F, double>) {
    return load_partial(static_cast<const double*>(data) + index, valid);
  } else {
    switch (dtype) {
    case DType::bf16:
      return load_as_partial(static_cast<const bf16*>(data) + index, valid);
    case DType::f16:
      return load_as_partial(static_cast<const f16*>(data) + index, valid);
    default:
      return load_partial(static_cast<const float*>(data) + index, valid);
    }
  }
}

template <class F>
PTK_INLINE F load_any_scalar(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
  case DType::bf16:
    return to_float(static_cast<const bf16*>(data)[index]);
  case DType::f16:
    return to_float(static_cast<const f16*>(data)[index]);
  case DType::f32:
    return static_cast<const float*>(data)[index];
  default:
    return static_cast<F>(static_cast<const double*>(data)[index]);
  }
}

template <class F>
PTK_INLINE void store_any(void* data, DType dtype, int64_t index, Vec<F> v, int64_t valid) {
  if constexpr (std::is_same_v<F, double>) {
    store_partial(static_cast<double*>(data) + index, v, valid);
  } else {
    switch (dtype) {
    case DType::bf16:
      return store_as_partial(static_cast<bf16*>(data) + index, v, valid);
    case DType::f16:
      return store_as_partial(static_cast<f16*>(data) + index, v, valid);
    default:
      return store_partial(static_cast<float*>(data) + index, v, valid);
    }
  }
}

// ---- blocks of the weight's rows
// ------------------------------------------------------------------------------------

// Consecutive rows, or with swiglu as many rows of the first half of the weight and, behind them, their partners.
struct RowBlock {
  int64_t first, count;  // of out's columns
  int64_t partner = 0;   // distance of a partner; 0 without swiglu
  int64_t rows() const { return partner ? 2 * count : count; }
  int64_t row(int64_t i) const { return i < count ? first + i : first + partner + i - count; }
};

struct RowBlocks {
  int64_t columns, partner, size;

  // `limit`: rows of the weight to a block.
  RowBlocks(const QuantizedForward& p, int64_t limit)
      : columns(p.activation == LinearActivation::swiglu ? p.weight.n / 2 : p.weight.n),
        partner(p.activation == LinearActivation::swiglu ? columns : 0), size(partner ? limit / 2 : limit) {}
  int64_t count() const { return (columns + size - 1) / size; }
  RowBlock operator[](int64_t i) const { return {i * size, least(size, columns - i * size), partner}; }
};

// sums[i * ld + j] belongs to row block.row(i) of the weight and row m0 + j of the input. Rows of sums are readable up
// to a multiple of a vector in both directions. input_scales (one for a row of the input) may be null.
template <class F>
class Finish {
  static constexpr int kLane = kLanes<F>;

public:
  Finish(const QuantizedForward& p, const RowBlock& block, const F* sums, int64_t ld, const float* input_scales)
      : p_(p), block_(block), sums_(sums), ld_(ld), input_scales_(input_scales) {}

  void run(int64_t m0, int64_t count) const {
    for (int64_t j = 0; j < count; j += kLane)
      for (int64_t i = 0; i < block_.count; i += kLane) square(m0, j, least(kLane, count - j), i);
  }

private:
  void square(int64_t m0, int64_t j, int64_t rows, int64_t i) const {
    const int64_t valid = least(kLane, block_.count - i), width = block_.partner ? block_.partner : p_.weight.n;
    Vec<F> value[kLane], partner[kLane];
    turn(i, j, value);
    if (block_.partner) turn(block_.count + i, j, partner);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = m0 + j + r, column = block_.first + i;
      Vec<F> v = complete(value[r], m, column, valid);
      if (block_.partner) {
        v = activate(LinearActivation::silu, v) * complete(partner[r], m, column + block_.partner, valid);
      } else {
        v = activate(p_.activation, v);
      }
      store_any<F>(p_.out, p_.out_dtype, m * width + column, v, valid);
    }
  }

  void turn(int64_t i, int64_t j, Vec<F> (&square)[kLane]) const {
    for (int r = 0; r < kLane; ++r) square[r] = load(sums_ + (i + r) * ld_ + j);
    transpose<F>(square);
  }

  Vec<F> complete(Vec<F> v, int64_t m, int64_t column, int64_t valid) const {
    if (input_scales_) v *= static_cast<F>(input_scales_[m]);
    if (p_.bias) v += load_any<F>(p_.bias, p_.bias_dtype, column, valid);
    if (const ConstMatrix& r = p_.residual; r.data) {
      const int64_t index = m * r.strides[0] + column * r.strides[1];
      if (r.strides[1] == 1) {
        v += load_any<F>(r.data, r.dtype, index, valid);
      } else {
        for (int64_t l = 0; l < valid; ++l) v[l] += load_any_scalar<F>(r.data, r.dtype, index + l * r.strides[1]);
      }
    }
    return v;
  }

  const QuantizedForward& p_;
  const RowBlock& block_;
  const F* sums_;
  int64_t ld_;
  const float* input_scales_;
};

}  // namespace ptk::PTK_ISA
