// Vector elementary functions with stated error bounds (ULP against the exact value, over the whole stated domain).
#pragma once

#include "simd.h"

namespace ptk::PTK_ISA {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

namespace detail {

// (2^r - 1) / r for |r| <= 1/2.
template <int Degree>
PTK_INLINE Vec<float> exp2_slope(Vec<float> r) {
  static_assert(Degree == 4 || Degree == 6);
  Vec<float> p;
  if constexpr (Degree == 6) {
    p = r * 1.5353362e-4f + 1.33988739e-3f;
    p = p * r + 9.61843692e-3f;
    p = p * r + 5.55033237e-2f;
    p = p * r + 2.40226477e-1f;
    return p * r + 6.93147182e-1f;
  } else {
    p = r * 9.58285294e-3f + 5.59064262e-2f;
    p = p * r + 2.40240991e-1f;
    return p * r + 6.93124175e-1f;
  }
}

// (e^t - 1) / t for |t| <= ln(2) / 2.
PTK_INLINE Vec<double> exp_slope(Vec<double> t) {
  Vec<double> p = t * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * t + 1.0 / 39916800;
  p = p * t + 1.0 / 3628800;
  p = p * t + 1.0 / 362880;
  p = p * t + 1.0 / 40320;
  p = p * t + 1.0 / 5040;
  p = p * t + 1.0 / 720;
  p = p * t + 1.0 / 120;
  p = p * t + 1.0 / 24;
  p = p * t + 1.0 / 6;
  p = p * t + 0.5;
  return p * t + 1.0;
}

#if PTK_X86_AVX512
// (2^r - 1) / r for 0 <= r <= 1.
template <int Degree>
PTK_INLINE Vec<float> exp2_slope_of_fraction(Vec<float> r) {
  static_assert(Degree == 4 || Degree == 6);
  Vec<float> p;
  if constexpr (Degree == 6) {
    p = r * 2.161328159e-4f + 1.246781845e-3f;
    p = p * r + 9.675443994e-3f;
    p = p * r + 5.548529118e-2f;
    p = p * r + 2.402293012e-1f;
    return p * r + 6.931470449e-1f;
  } else {
    p = r * 1.342668425e-2f + 5.224247427e-2f;
    p = p * r + 2.412802047e-1f;
    return p * r + 6.930448449e-1f;
  }
}
#endif

}  // namespace detail

// 2^x for x <= 127 (1023 for double); 0 for x <= -150 (-1023), without AVX-512 for x <= -127, where results would be
// subnormal; NaN stays NaN.
//
// Write x = n + r with n an integer: 2^x = 2^n * p(r), p a minimax polynomial with p(0) = 1 exactly. AVX-512 has an
// instruction that takes the fraction of a number, 0 <= r < 1, and one that multiplies by 2 to the power of the whole
// part. Elsewhere n is the nearest integer, |r| <= 1/2: adding 1.5 * 2^23 + 127 rounds x to an integer *and* leaves
// n + 127 in the low mantissa bits, so that a shift by 23 yields the float 2^n (and 0 at n = -127).
//
// Degree 6: < 1.1 ULP. Degree 4: relative error 3e-6, enough where the result is rounded to 16 bits.
template <int Degree = 6>
PTK_INLINE Vec<float> exp2(Vec<float> x) {
#if PTK_X86_AVX512
  constexpr int kFraction = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec<float> r = (Vec<float>)_mm512_reduce_ps((__m512)x, kFraction);
  return (Vec<float>)_mm512_scalef_ps((__m512)(detail::exp2_slope_of_fraction<Degree>(r) * r + 1.0f), (__m512)x);
#else
  constexpr float kMagic = 0x1.8p23f + 127.0f;
  x = max(broadcast(-127.0f), x);
  Vec<float> shifted = x + kMagic;
  Vec<float> r = x - (shifted - kMagic);
  return (detail::exp2_slope<Degree>(r) * r + 1.0f) * bit_cast<Vec<float>>(bit_cast<Vec<int32_t>>(shifted) << 23);
#endif
}

// Taylor of exp(r ln 2) to degree 13: truncation below 2^-57, < 1.5 ULP with rounding.
template <int Degree = 13>
PTK_INLINE Vec<double> exp2(Vec<double> x) {
  constexpr double kMagic = 0x1.8p52 + 1023.0;
  x = max(broadcast(-1023.0), x);
  Vec<double> shifted = x + kMagic;
  Vec<double> t = (x - (shifted - kMagic)) * kLn2;
  return (detail::exp_slope(t) * t + 1.0) * bit_cast<Vec<double>>(bit_cast<Vec<int64_t>>(shifted) << 52);
}

namespace detail {

// e^x as scale * (1 + fraction) for |x| <= 87 (708 for double), where scale is a power of two. ln 2 in two parts, the
// first short enough that n times it is exact, keeps the reduced argument to full precision.
template <class A>
struct Exponential {
  Vec<A> scale, fraction;
};

PTK_INLINE Exponential<float> exponential(Vec<float> x) {
  constexpr float kMagic = 0x1.8p23f + 127.0f;
  Vec<float> shifted = x * static_cast<float>(kLog2E) + kMagic;
  Vec<float> n = shifted - kMagic;
  Vec<float> r = ((x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f) * static_cast<float>(kLog2E);
  return {bit_cast<Vec<float>>(bit_cast<Vec<int32_t>>(shifted) << 23), exp2_slope<6>(r) * r};
}

PTK_INLINE Exponential<double> exponential(Vec<double> x) {
  constexpr double kMagic = 0x1.8p52 + 1023.0;
  Vec<double> shifted = x * kLog2E + kMagic;
  Vec<double> n = shifted - kMagic;
  Vec<double> t = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;
  return {bit_cast<Vec<double>>(bit_cast<Vec<int64_t>>(shifted) << 52), exp_slope(t) * t};
}

// x limited to [-bound, bound]; NaN stays NaN.
template <class A>
PTK_INLINE Vec<A> clamp(Vec<A> x, A bound) {
  return -max(broadcast(-bound), -max(broadcast(-bound), x));
}

}  // namespace detail

// 1 / (1 + e^-x): < 3 ULP where |x| <= 87 (708); beyond, within 2e-38 (1e-307) of 0 or 1.
template <class A>
PTK_INLINE Vec<A> sigmoid(Vec<A> x) {
  constexpr A kBound = sizeof(A) == 4 ? A(87) : A(708);
  const auto e = detail::exponential(-detail::clamp(x, kBound));
  return A(1) / (A(1) + (e.scale * e.fraction + e.scale));
}

// (e^2x - 1) / (e^2x + 1): < 4 ULP everywhere, since e^2x - 1 is formed without cancellation. Beyond the bound the
// result is 1 to the last bit.
template <class A>
PTK_INLINE Vec<A> tanh(Vec<A> x) {
  constexpr A kBound = sizeof(A) == 4 ? A(9.5) : A(19.5);
  const Vec<A> y = detail::clamp(x, kBound);
  const auto e = detail::exponential(y + y);
  const Vec<A> minus_one = e.scale * e.fraction + (e.scale - A(1));
  return minus_one / (minus_one + A(2));
}

}  // namespace ptk::PTK_ISA
