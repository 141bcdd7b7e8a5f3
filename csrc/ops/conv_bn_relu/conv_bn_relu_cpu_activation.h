// Activations and their derivatives, a vector at a time.
//
// Exponentials are taken of numbers <= 0 only, so none overflows; what exp2 flushes to 0 is below the rounding of the
// result. Absolute errors are a few ULP of max(1, |u|).
#pragma once

#include "csrc/cpu/gemm/gemm.h"
#include "csrc/cpu/math.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu.h"

namespace ptk::PTK_ISA {

// The lesser, a NaN where a is one.
template <class A>
PTK_INLINE Vec<A> least_of(Vec<A> a, Vec<A> b) {
  return b < a ? b : a;
}
template <class A>
PTK_INLINE Vec<A> absolute(Vec<A> x) {
  return max(x, -x);
}
// e^x for x <= 0.
template <class A>
PTK_INLINE Vec<A> exp_negative(Vec<A> x) {
  return exp2(x * static_cast<A>(kLog2E));
}

// tanh(log(1 + e^u)), a rational function of e^u or e^-u.
template <class A>
PTK_INLINE Vec<A> tanh_softplus(Vec<A> u) {
  const Vec<A> e = exp_negative<A>(-absolute<A>(u));
  const Vec<A> for_negative = e * (e + A(2)), for_positive = A(1) + e * A(2);
  return u < A(0) ? for_negative / (for_negative + A(2)) : for_positive / (for_positive + e * e * A(2));
}

// P(X <= u) for a standard normal X. float32: erfc(x) = exp(-x^2) t p(t), t = 1 / (1 + x / 2), p fitted for least
// relative error, 3e-7 with rounding.
PTK_INLINE Vec<float> normal_cdf(Vec<float> u) {
  const Vec<float> x = absolute<float>(u) * 0.70710678f;
  const Vec<float> t = 1.0f / (1.0f + x * 0.5f);
  constexpr float kCoefficients[] = {0.04235210f,  -0.23085541f, 0.48617461f, -0.44697306f, 0.12708674f, -0.05723146f,
                                     0.093000352f, 0.17537686f,  0.24688059f, 0.28209385f,  0.28209481f};
  Vec<float> p = broadcast(kCoefficients[0]);
#pragma GCC unroll 10
  for (int i = 1; i < 11; ++i) p = p * t + kCoefficients[i];
  const Vec<float> tail = exp_negative<float>(-(x * x)) * t * p * 0.5f;
  return u < 0.0f ? tail : 1.0f - tail;
}
PTK_INLINE Vec<double> normal_cdf(Vec<double> u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * u[i]);
  return u;
}
template <class A>
PTK_INLINE Vec<A> normal_density(Vec<A> u) {
  return exp_negative<A>(u * u * A(-0.5)) * static_cast<A>(0.39894228040143267794);
}

// Out of line: one copy for every pass that rarely needs it.
template <class A>
static __attribute__((noinline)) Vec<A> activate_any(Activation kind, Vec<A> u, A slope) {
  const Vec<A> zero{};
  switch (kind) {
  case Activation::none:
    return u;
  case Activation::relu:
    return max(zero, u);
  case Activation::leaky_relu:
    return u > zero ? u : u * slope;
  case Activation::relu6:
    return least_of<A>(max(zero, u), broadcast(A(6)));
  case Activation::elu:
    return u > zero ? u : exp_negative<A>(least_of<A>(u, zero)) - A(1);
  case Activation::silu:
    return u * sigmoid<A>(u);
  case Activation::gelu:
    return u * normal_cdf(u);
  case Activation::mish:
    return u * tanh_softplus<A>(u);
  case Activation::hardswish:
    return u * least_of<A>(max(zero, u + A(3)), broadcast(A(6))) / A(6);
  case Activation::sigmoid:
    return sigmoid<A>(u);
  case Activation::tanh:
    return tanh<A>(u);
  }
  __builtin_unreachable();
}

template <class A>
PTK_INLINE Vec<A> activate(Activation kind, Vec<A> u, A slope) {
  if (kind == Activation::relu) return max(Vec<A>{}, u);
  if (kind == Activation::none) return u;
  if (kind == Activation::relu6) return least_of<A>(max(Vec<A>{}, u), broadcast(A(6)));
  return activate_any<A>(kind, u, slope);
}

template <class A>
static __attribute__((noinline)) Vec<A> derivative_any(Activation kind, Vec<A> u, A slope) {
  const Vec<A> zero{}, one = broadcast(A(1));
  switch (kind) {
  case Activation::none:
    return one;
  case Activation::relu:
    return u > zero ? one : zero;
  case Activation::leaky_relu:
    return u > zero ? one : broadcast(slope);
  case Activation::relu6:
    return u > zero ? (u < A(6) ? one : zero) : zero;
  case Activation::elu:
    return u > zero ? one : exp_negative<A>(least_of<A>(u, zero));
  case Activation::silu: {
    const Vec<A> s = sigmoid<A>(u);
    return s * (A(1) + u * (A(1) - s));
  }
  case Activation::gelu:
    return normal_cdf(u) + u * normal_density<A>(u);
  case Activation::mish: {
    const Vec<A> t = tanh_softplus<A>(u);
    return t + u * sigmoid<A>(u) * (A(1) - t * t);
  }
  case Activation::hardswish:
    return u > A(-3) ? (u < A(3) ? u / A(3) + A(0.5) : one) : zero;
  case Activation::sigmoid: {
    const Vec<A> s = sigmoid<A>(u);
    return s * (A(1) - s);
  }
  case Activation::tanh: {
    const Vec<A> t = tanh<A>(u);
    return A(1) - t * t;
  }
  }
  __builtin_unreachable();
}

// du of dout.
template <class A>
PTK_INLINE Vec<A> activation_gradient(Activation kind, Vec<A> u, Vec<A> grad, A slope) {
  if (kind == Activation::relu) return u > Vec<A>{} ? grad : Vec<A>{};
  if (kind == Activation::none) return grad;
  if (kind == Activation::relu6) {
    const Vec<A> zero{};
    return u > zero ? (u < A(6) ? grad : zero) : zero;
  }
  return grad * derivative_any<A>(kind, u, slope);
}

}  // namespace ptk::PTK_ISA
