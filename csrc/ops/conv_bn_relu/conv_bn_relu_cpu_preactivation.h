// An activation before the convolution. Forward and weight gradient read an activated copy of the input, channels last,
// which a channels-first input needs anyway; the input gradient is multiplied by the derivative at the input itself,
// the only one of the two that is kept.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_activation.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_layout.h"

namespace ptk::PTK_ISA {

// rows[pixel][channel] = act(input), which is laid out as the problem says.
template <class T>
static void activated_rows(const ConvProblem& p, const T* input, T* rows) {
  using A = Acc<T>;
  const int64_t channels = p.in_channels, space = volume(p.in), pixels = p.batch * space;
  const bool transposes = p.layout == Layout::channels_first && channels > 1 && space > 1;
  const A slope = static_cast<A>(p.slope);
  parallel_items((pixels + kLayoutPixels - 1) / kLayoutPixels, [&](int64_t i) {
    const int64_t begin = i * kLayoutPixels, end = least(pixels, begin + kLayoutPixels);
    T* to = rows + begin * channels;
    if (transposes) rows_from_planes(input, channels, space, begin, end, 0, channels, to, channels);
    const T* from = transposes ? to : input + begin * channels;
    for (int64_t k = 0, size = (end - begin) * channels; k < size; k += kLanes<A>)
      store_as_partial(to + k, activate(p.pre_activation, load_as_partial(from + k, size - k), slope), size - k);
  });
}

// grad = grad * act'(input), element by element: both are laid out alike.
template <class T>
static void multiply_by_derivative(const ConvProblem& p, const T* input, T* grad) {
  using A = Acc<T>;
  constexpr int64_t kPart = 4096;
  const int64_t size = p.batch * p.in_channels * volume(p.in);
  const A slope = static_cast<A>(p.slope);
  parallel_items((size + kPart - 1) / kPart, [&](int64_t i) {
    const int64_t end = least(size, (i + 1) * kPart);
    for (int64_t k = i * kPart; k < end; k += kLanes<A>) {
      const Vec<A> x = load_as_partial(input + k, end - k), g = load_as_partial(grad + k, end - k);
      store_as_partial(grad + k, activation_gradient(p.pre_activation, x, g, slope), end - k);
    }
  });
}

}  // namespace ptk::PTK_ISA
