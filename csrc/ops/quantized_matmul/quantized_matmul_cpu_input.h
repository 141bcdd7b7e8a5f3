// The input, quantized to signed bytes row by row.
//
//   scale = max |x| / 127      code = round_half_even(x * (127 / max |x|)), within [-127, 127]
//
// all in float32, whatever the dtype of the input, so that every implementation finds the same codes. A row of zeros,
// or of numbers below 2^-100, has scale 0 and codes 0; a row with an infinity or a NaN has scale NaN and codes 0. With
// a given scale s: code = round_half_even(x * (1 / s)), a NaN as above, an infinity as the largest code.
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_finish.h"

namespace ptk::PTK_ISA {

PTK_INLINE Vec<int32_t> round_to_codes(Vec<float> x) {
  constexpr float kMagic = 0x1.8p23f;  // adding it rounds to nearest even and leaves the integer in the low bits
  PTK_OPAQUE(x);  // the product is rounded before the sum: contracted, halves would round otherwise
  x = x > 127.0f ? broadcast(127.0f) : x;
  x = x < -127.0f ? broadcast(-127.0f) : x;
  Vec<float> shifted = x + kMagic;
  PTK_OPAQUE(shifted);
  return bit_cast<Vec<int32_t>>(shifted) - bit_cast<int32_t>(kMagic);
}

// One row of k values, `stride` apart, to k codes of type C; returns the scale.
template <class C>
static inline float quantize_row(const ConstMatrix& input, int64_t row, int64_t k, const float* given, float* values,
                                 C* codes) {
  using Codes = typename VectorOf<C, kLanes<float> * sizeof(C)>::unaligned;
  const int64_t origin = row * input.strides[0], stride = input.strides[1];
  Vec<float> top{}, finite{};
  for (int64_t i = 0; i < k; i += kLanes<float>) {
    const int64_t valid = least(kLanes<float>, k - i);
    Vec<float> x{};
    if (stride == 1 && input.dtype != DType::f64) {
      x = load_any<float>(input.data, input.dtype, origin + i, valid);
    } else {
      for (int64_t l = 0; l < valid; ++l)
        x[l] = load_any_scalar<float>(input.data, input.dtype, origin + (i + l) * stride);
    }
    store(values + i, x);
    const Vec<float> magnitude = x < 0.0f ? -x : x;
    top = max(magnitude, top);
    finite += given ? (x != x ? x : Vec<float>{}) : x - x;
  }
  const float largest = reduce_max<float>(top), check = reduce_add<float>(finite);
  const bool valid = check == 0.0f;
  const float scale = given ? *given : largest < 0x1p-100f ? 0.0f : largest / 127.0f;
  const float factor = !valid || scale == 0.0f ? 0.0f : given ? 1.0f / scale : 127.0f / largest;
  for (int64_t i = 0; i < k; i += kLanes<float>) {
    const Vec<float> x = load(values + i);
    const Vec<int32_t> code = round_to_codes(factor == 0.0f ? Vec<float>{} : x * factor);
    if (i + kLanes<float> <= k) {
      *reinterpret_cast<Codes*>(codes + i) = __builtin_convertvector(code, Codes);
    } else {
      for (int64_t l = 0; l < k - i; ++l) codes[i + l] = static_cast<C>(code[l]);
    }
  }
  return valid ? scale : __builtin_nanf("");
}

}  // namespace ptk::PTK_ISA
