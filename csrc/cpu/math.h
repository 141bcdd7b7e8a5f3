// Vector elementary functions with stated error bounds (ULP against the exact
// value, over the whole stated domain).
#pragma once

#include "simd.h"

namespace ptk::PTK_ISA {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

// 2^x for x <= 127 (1023 for double); exactly 0 for x <= -127 (-1023), where
// results would be subnormal; NaN stays NaN.
//
// Write x = n + r with n the nearest integer: 2^x = 2^n * p(r), |r| <= 1/2, p a
// minimax polynomial with p(0) = 1 exactly. Adding 1.5 * 2^23 + 127 rounds x to
// an integer *and* leaves n + 127 in the low mantissa bits, so that a shift by
// 23 yields the float 2^n (and 0 at n = -127).
//
// Degree 6: < 1.1 ULP. Degree 4: relative error 2.9e-6, enough where the result
// is rounded to 16 bits.
template <int Degree = 6>
PTK_INLINE Vec<float> exp2(Vec<float> x) {
  static_assert(Degree == 4 || Degree == 6);
  constexpr float kMagic = 0x1.8p23f + 127.0f;
  x = max(broadcast(-127.0f), x);
  Vec<float> shifted = x + kMagic;
  Vec<float> r = x - (shifted - kMagic);
  Vec<float> p;
  if constexpr (Degree == 6) {
    p = r * 1.5353362e-4f + 1.33988739e-3f;
    p = p * r + 9.61843692e-3f;
    p = p * r + 5.55033237e-2f;
    p = p * r + 2.40226477e-1f;
    p = p * r + 6.93147182e-1f;
  } else {
    p = r * 9.58285294e-3f + 5.59064262e-2f;
    p = p * r + 2.40240991e-1f;
    p = p * r + 6.93124175e-1f;
  }
  p = p * r + 1.0f;
  return p * bit_cast<Vec<float>>(bit_cast<Vec<int32_t>>(shifted) << 23);
}

// Taylor of exp(r ln 2) to degree 13: truncation below 2^-57, < 1.5 ULP with
// rounding.
template <int Degree = 13>
PTK_INLINE Vec<double> exp2(Vec<double> x) {
  constexpr double kMagic = 0x1.8p52 + 1023.0;
  x = max(broadcast(-1023.0), x);
  Vec<double> shifted = x + kMagic;
  Vec<double> t = (x - (shifted - kMagic)) * kLn2;
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
  p = p * t + 1.0;
  p = p * t + 1.0;
  return p * bit_cast<Vec<double>>(bit_cast<Vec<int64_t>>(shifted) << 52);
}

}  // namespace ptk::PTK_ISA
