// What becomes of the sums of a convolution: bias, rounding to the dtype, normalisation, residual, activation.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_normalize.h"

namespace ptk::PTK_ISA {

// The value that storing as T would leave.
template <class T>
PTK_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return widen_bf16(narrow_bf16(v));
  } else if constexpr (std::is_same_v<T, f16>) {
    return widen_f16(narrow_f16(v));
  } else {
    return v;
  }
}

// What becomes of the sums of a convolution.
template <class T>
struct ConvResult {
  T* out = nullptr;
  Layout layout = Layout::channels_last;
  const T* residual = nullptr;  // laid out like out
  const Acc<T>*bias = nullptr, *mean = nullptr, *scale = nullptr, *shift = nullptr;
  Activation activation = Activation::none;
  Acc<T> slope = 0;
  Acc<T>* statistics = nullptr;  // {mean, m2} of every channel per block of kRows positions

  // What belongs to channels [c, c + lanes), loaded once for many positions.
  struct Vectors {
    Vec<Acc<T>> bias, mean, scale, shift;
  };
  inline __attribute__((always_inline)) Vectors at(int64_t c) const {
    Vectors v{};
    if (bias) v.bias = load(bias + c);
    if (mean) v.mean = load(mean + c), v.scale = load(scale + c), v.shift = load(shift + c);
    return v;
  }

  // The same of one channel, for many positions of it.
  inline __attribute__((always_inline)) Vectors of(int64_t c) const {
    Vectors v{};
    if (bias) v.bias = broadcast(bias[c]);
    if (mean) v.mean = broadcast(mean[c]), v.scale = broadcast(scale[c]), v.shift = broadcast(shift[c]);
    return v;
  }

  // What `valid` channels of one position become, as Normalize computes it in a pass of its own.
  inline __attribute__((always_inline)) Vec<Acc<T>> finished(Vec<Acc<T>> sums, const Vectors& v, const T* residual_at,
                                                             int64_t valid) const {
    if (bias) sums += v.bias;
    sums = rounded<T>(sums);
    if (mean) sums = multiply_add<Acc<T>>(sums - v.mean, v.scale, v.shift);
    if (residual_at) sums += load_as_partial(residual_at, valid);
    return activate(activation, sums, slope);
  }
  // Stored at the address of `out_at`.
  inline __attribute__((always_inline)) void finish(Vec<Acc<T>> sums, const Vectors& v, const T* residual_at, T* out_at,
                                                    int64_t valid) const {
    store_as_partial(out_at, finished(sums, v, residual_at, valid), valid);
  }
};

}  // namespace ptk::PTK_ISA
