// Convolution, normalisation, residual and activation as one operator: what the kernels are given. Torch-free.
//
//   z = conv(pre(input), weight)      u = (z - mean) * scale + shift + residual      out = act(u)
//
// where conv may be transposed and pre is an activation of its own. One, two and three spatial dimensions are one
// problem: missing ones have size, kernel and stride 1.
#pragma once

#include "csrc/core/dtype.h"
#include "csrc/cpu/isa.h"

#include <cstdint>

namespace ptk {

enum class Activation : uint8_t { none, relu, leaky_relu, relu6, elu, silu, gelu, mish, hardswish, sigmoid, tanh };

// How the elements of a dense tensor [batch, channels, depth, height, width] lie in memory.
enum class Layout : uint8_t {
  channels_first,
  channels_last,
};

struct ConvProblem {
  DType dtype = DType::f32;
  Layout layout = Layout::channels_first;  // of input, residual and out, and of their gradients
  int64_t batch = 0, in_channels = 0, out_channels = 0, groups = 1;
  int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1};
  int64_t kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, padding[3] = {}, dilation[3] = {1, 1, 1};
  Activation activation = Activation::none, pre_activation = Activation::none;
  double slope = 0.01;  // of leaky_relu below zero
  bool allows_winograd = true;
  bool transposed = false;
  // Into so many groups the channels of every image are divided, each with statistics of its own; 0: statistics are
  // those of a channel.
  int64_t norm_groups = 0;
};

inline int64_t volume(const int64_t (&size)[3]) {
  return size[0] * size[1] * size[2];
}

inline bool is_depthwise(const ConvProblem& p) {
  return p.groups > 1 && p.groups == p.in_channels && p.groups == p.out_channels;
}

inline bool has_unit_stride(const ConvProblem& p) {
  return p.stride[0] == 1 && p.stride[1] == 1 && p.stride[2] == 1;
}

// Depthwise in a plane, large enough that copies of its lines cost less than a transposition.
inline bool is_depthwise_in_planes(const ConvProblem& p) {
  return is_depthwise(p) && p.in[0] == 1 && p.kernel[0] == 1 && p.padding[0] == 0 && has_unit_stride(p) &&
         volume(p.out) >= 196;
}

// A product of a matrix for each image.
inline bool is_pointwise_in_planes(const ConvProblem& p) {
  return p.groups == 1 && volume(p.kernel) == 1 && has_unit_stride(p) && volume(p.in) == volume(p.out);
}

// How the convolution's result lies where it is kept for a normalisation of the batch or for the backward pass. The
// kernels of channels-first tensors know few shapes there; all others meet rows of channels.
// ptkernels/ops/conv_bn_relu/register.py knows the same rule.
inline Layout conv_layout(const ConvProblem& p) {
  const bool is_plain = !p.transposed && p.norm_groups == 0 && p.pre_activation == Activation::none;
  const bool planes = is_plain && p.layout == Layout::channels_first && volume(p.out) > 1 &&
                      (is_pointwise_in_planes(p) || is_depthwise_in_planes(p));
  return planes ? Layout::channels_first : Layout::channels_last;
}

// The convolution whose input gradient a transposed one is, or the other way round: input and result change places. It
// has the same weight, in the same order.
inline ConvProblem adjoint(const ConvProblem& p) {
  ConvProblem other = p;
  other.transposed = !p.transposed;
  other.in_channels = p.out_channels;
  other.out_channels = p.in_channels;
  for (int d = 0; d < 3; ++d) {
    other.in[d] = p.out[d];
    other.out[d] = p.in[d];
  }
  return other;
}

// Tensors are dense. `weight` is [out_channels, in_channels / groups, kernel...] in that order, of a transposed
// convolution [in_channels, out_channels / groups, kernel...]. Vectors per channel are float32, float64 for float64,
// and end in kChannelPadding elements that may be read; with norm_groups, those of the normalisation are one such
// vector per image, one after the other. Results are uninitialised.
inline constexpr int64_t kChannelPadding = 16;

// out = act((conv(input, weight) + bias - mean) * scale + shift + residual), the convolution rounded to the dtype; null
// means that a term is not there.
struct ConvParams {
  ConvProblem problem;
  const void *input = nullptr, *weight = nullptr, *residual = nullptr;
  const void *bias = nullptr, *mean = nullptr, *scale = nullptr, *shift = nullptr;
  // Null, or packed_layout(problem).bytes bytes for the weights, written first unless is_packed.
  void* packed = nullptr;
  bool is_packed = false;
  void* out = nullptr;
  Layout out_layout = Layout::channels_first;  // of out and residual
  // Where not null: mean and biased variance of every channel of out over batch and space, or of every group of every
  // image. `out` is then channels last.
  void *batch_mean = nullptr, *batch_variance = nullptr;
};

// out = act((conv - mean) * scale + shift + residual), `conv` in conv_layout(problem).
struct NormalizeParams {
  ConvProblem problem;
  const void *conv = nullptr, *residual = nullptr;
  const void *mean = nullptr, *scale = nullptr, *shift = nullptr;
  void* out = nullptr;
};

// The derivative of that, for a gradient of `out`. With du = grad_out * act'(u) and xhat = (conv - mean) * invstd,
//
//   grad_residual = du    sum_du = sum du    sum_du_xhat = sum du * xhat
//   grad_conv = scale * du                                                            statistics fixed
//   grad_conv = scale * (du - sum_du / count - xhat * sum_du_xhat / count)            statistics of the batch
//
// Of an image with norm_groups the sums are its own, and grad_conv subtracts the means over a group of scale * du and
// of scale * du * xhat.
struct NormalizeBackwardParams {
  NormalizeParams forward;       // without out
  const void* invstd = nullptr;  // null where mean is
  const void* grad_out = nullptr;
  bool batch_statistics = false;
  void *sum_du = nullptr, *sum_du_xhat = nullptr;
  void* sum_grad_conv = nullptr;  // over batch and space; null where not asked for
  void* grad_conv = nullptr;      // laid out like conv; null where not asked for
  void* grad_residual = nullptr;  // null where not asked for
};

// grad_conv is in conv_layout(problem).
struct ConvBackwardParams {
  ConvProblem problem;
  const void *grad_conv = nullptr, *input = nullptr, *weight = nullptr;
  void *grad_input = nullptr, *grad_weight = nullptr;  // null where not asked for
};

// How the kernel of convolve() packs weights of a shape and dtype: equal ones are interchangeable.
struct PackedConvLayout {
  int64_t bytes, kind;
};

struct ConvKernels {
  PackedConvLayout (*packed_layout)(const ConvProblem&);
  // False when memory ran out.
  bool (*convolve)(const ConvParams&);
  bool (*normalize)(const NormalizeParams&);
  bool (*normalize_backward)(const NormalizeBackwardParams&);
  bool (*convolve_backward)(const ConvBackwardParams&);
  // Name of the kernel that convolves.
  const char* (*describe)(const ConvProblem&);
};

PTK_DECLARE_KERNELS(ConvKernels, conv_kernels)

PTK_EXPORT const char* conv_kernel_name(const ConvProblem& problem);

}  // namespace ptk
