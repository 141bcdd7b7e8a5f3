// Between torch's tensors and the problem that the kernels of conv_bn_relu get: checks, layouts, vectors per channel.
#pragma once

#include "csrc/core/checks.h"
#include "csrc/core/stable_compat.h"
#include "csrc/cpu/scratch.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace ptk {

// One number per channel in the kernels' precision, float32 or float64, padded for whole vectors. Empty stands for
// none.
class Channels {
public:
  Channels() = default;
  Channels(DType dtype, int64_t count)
      : wide_(dtype == DType::f64), count_(count), storage_((count + kChannelPadding) * (wide_ ? 8 : 4)) {}

  bool empty() const { return storage_.empty(); }
  int64_t size() const { return count_; }
  const void* data() const { return empty() ? nullptr : storage_.data(); }
  void* mutable_data() { return const_cast<void*>(data()); }
  // float or double, as the precision is.
  template <class A>
  const A* as() const {
    return static_cast<const A*>(data());
  }
  double operator[](int64_t i) const { return wide_ ? as<double>()[i] : static_cast<double>(as<float>()[i]); }
  void set(int64_t i, double value) {
    if (wide_) {
      static_cast<double*>(mutable_data())[i] = value;
    } else {
      static_cast<float*>(mutable_data())[i] = static_cast<float>(value);
    }
  }
  Channels times(const Channels& factor) const {
    Channels product = *this;
    for (int64_t i = 0; !factor.empty() && i < count_; ++i) {
      product.set(i, (*this)[i] * factor[i]);
    }
    return product;
  }
  // Of vectors that lie one after the other, `size` numbers each: their sum.
  Channels folded(int64_t size) const {
    Channels sum(wide_ ? DType::f64 : DType::f32, size);
    for (int64_t i = 0; i < size; ++i) {
      double total = 0;
      for (int64_t k = i; k < count_; k += size) {
        total += (*this)[k];
      }
      sum.set(i, total);
    }
    return sum;
  }
  // Into a dense tensor of any floating dtype.
  void write(const Tensor& tensor) const;

private:
  bool wide_ = false;
  int64_t count_ = 0;
  std::vector<char, BorrowingAllocator<char>> storage_;
};

inline double read_element(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
  case DType::f64:
    return static_cast<const double*>(data)[i];
  case DType::f32:
    return static_cast<double>(static_cast<const float*>(data)[i]);
  case DType::bf16:
    return static_cast<double>(
        std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16));
  case DType::f16: {
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31  ? (mantissa ? std::nan("") : HUGE_VAL)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(mantissa + 1024, exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
  }
  }
  return 0;
}

inline void Channels::write(const Tensor& tensor) const {
  const DType internal = wide_ ? DType::f64 : DType::f32;
  const Tensor values = empty_strided<1>(tensor, {count_}, {1}, internal);
  std::memcpy(values.mutable_data_ptr(), data(), count_ * element_size(internal));
  Tensor target = tensor;
  torch::stable::copy_(target, values);
}

// u = (z - mean) * scale + shift; each empty where it is not there.
struct Norm {
  Channels mean, invstd, scale, shift;
};

inline Activation parse_activation(const char* argument, const std::string& name) {
  constexpr const char* names[] = {"none", "relu", "leaky_relu", "relu6",   "elu", "silu",
                                   "gelu", "mish", "hardswish",  "sigmoid", "tanh"};
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) {
      return static_cast<Activation>(i);
    }
  }
  fail("conv_bn_relu: ", argument, ": got '", name,
       "', expected none, relu, leaky_relu, relu6, elu, silu, gelu, mish, "
       "hardswish, sigmoid or tanh");
}

using Sizes = std::vector<int64_t>;

// Strides of a dense tensor, channels last or first.
inline Sizes dense_strides(const Sizes& sizes, Layout layout) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  const auto take = [&](size_t dim) {
    strides[dim] = step;
    step *= std::max<int64_t>(sizes[dim], 1);
  };
  const bool channels_last = layout == Layout::channels_last;
  if (channels_last) {
    take(1);
  }
  for (size_t dim = sizes.size(); dim-- > 0;) {
    if (dim != 1 || !channels_last) {
      take(dim);
    }
  }
  return strides;
}

inline Tensor empty_in_layout(const Tensor& like, const Sizes& sizes, Layout layout, DType dtype) {
  const Sizes strides = dense_strides(sizes, layout);
  const auto make = [&]<size_t Rank>() {
    std::array<int64_t, Rank> size, stride;
    std::copy_n(sizes.begin(), Rank, size.begin());
    std::copy_n(strides.begin(), Rank, stride.begin());
    return empty_strided<Rank>(like, size, stride, dtype);
  };
  return sizes.size() == 3 ? make.operator()<3>() : sizes.size() == 4 ? make.operator()<4>() : make.operator()<5>();
}

// Whether elements lie as in a dense tensor of that layout; strides of dimensions of size 1 do not matter.
inline bool has_layout(const Tensor& tensor, Layout layout) {
  const Sizes sizes(tensor.sizes().begin(), tensor.sizes().end());
  const Sizes strides = dense_strides(sizes, layout);
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] > 1 && tensor.stride(static_cast<int64_t>(dim)) != strides[dim]) {
      return false;
    }
  }
  return true;
}

// Whether kernels may compute convolutions by Winograd's transforms; process-wide, set by _allow_winograd().
inline std::atomic<bool> allows_winograd{true};

// What makes a convolution another one than torch's convNd.
struct Variant {
  bool transposed = false;
  Sizes output_padding;
  int64_t num_groups = 0;  // whose statistics every image has of its own; -1: of every channel, 0: none
  std::string pre_activation = "none";
};

// The checked operands of a convolution, dense.
class ConvArguments {
public:
  ConvProblem problem;
  Tensor input, weight;
  bool normalizes_images = false;

  ConvArguments(const Tensor& given_input, const Tensor& given_weight, const Sizes& stride, const Sizes& padding,
                const Sizes& dilation, int64_t groups, const std::string& activation, double slope,
                const Variant& variant)
      : input(given_input), weight(given_weight) {
    check_tensors();
    const size_t spatial = static_cast<size_t>(input.dim()) - 2;
    ConvProblem& p = problem;
    p.dtype = *float_dtype(input);
    p.batch = input.size(0);
    p.in_channels = input.size(1);
    p.groups = groups;
    p.transposed = variant.transposed;
    PTK_CHECK(groups >= 1, "conv_bn_relu: groups: got ", groups, ", expected at least 1");
    p.out_channels = p.transposed ? weight.size(1) * groups : weight.size(0);
    const int64_t taken = p.transposed ? weight.size(0) : weight.size(1) * groups;
    PTK_CHECK(p.in_channels % groups == 0 && taken == p.in_channels, "conv_bn_relu: weight: got shape ",
              shape_text(weight.sizes()), " for ", p.in_channels, " input channels in ", groups, " groups");
    PTK_CHECK(p.in_channels > 0, "conv_bn_relu: input: got no channels, expected at least 1");
    PTK_CHECK(p.out_channels % groups == 0, "conv_bn_relu: groups: got ", groups, ", expected a divisor of ",
              p.out_channels, " output channels");
    const auto check_list = [&](const char* name, const Sizes& list, int64_t least) {
      PTK_CHECK(list.size() == spatial && std::ranges::all_of(list, [&](int64_t x) { return x >= least; }),
                "conv_bn_relu: ", name, ": got ", shape_text(list), ", expected ", static_cast<int64_t>(spatial),
                " numbers of at least ", least);
    };
    check_list("stride", stride, 1);
    check_list("padding", padding, 0);
    check_list("dilation", dilation, 1);
    if (p.transposed) {
      check_list("output_padding", variant.output_padding, 0);
    } else {
      PTK_CHECK(variant.output_padding.empty(), "conv_bn_relu: output_padding: got ",
                shape_text(variant.output_padding), ", expected none unless transposed");
    }
    for (size_t i = 0; i < spatial; ++i) {
      const size_t d = 3 - spatial + i;
      const int64_t dim = static_cast<int64_t>(i) + 2;
      p.in[d] = input.size(dim);
      p.kernel[d] = weight.size(dim);
      p.stride[d] = stride[i];
      p.padding[d] = padding[i];
      p.dilation[d] = dilation[i];
      PTK_CHECK(p.kernel[d] >= 1, "conv_bn_relu: weight: got shape ", shape_text(weight.sizes()),
                ", expected a kernel of at least 1");
      p.out[d] = p.transposed ? transposed_size(d, variant.output_padding[i]) : size(d);
    }
    p.activation = parse_activation("activation", activation);
    p.pre_activation = parse_activation("pre_activation", variant.pre_activation);
    p.slope = slope;
    const int64_t num_groups = variant.num_groups;
    PTK_CHECK(num_groups == -1 || num_groups == 0 || (num_groups > 0 && p.out_channels % num_groups == 0),
              "conv_bn_relu: num_groups: got ", num_groups, ", expected -1, 0 or a divisor of ", p.out_channels,
              " channels");
    p.norm_groups = num_groups == -1 ? p.out_channels : num_groups;
    normalizes_images = num_groups != 0;
    p.allows_winograd = allows_winograd;
    p.layout = !has_layout(input, Layout::channels_first) && spatial > 1 && has_layout(input, Layout::channels_last)
                   ? Layout::channels_last
                   : Layout::channels_first;
    input = in_layout(input, p.layout);
    weight = in_layout(weight, Layout::channels_first);
    result_.assign(input.sizes().begin(), input.sizes().end());
    result_[1] = p.out_channels;
    for (size_t i = 0; i < spatial; ++i) {
      result_[i + 2] = p.out[3 - spatial + i];
    }
  }

  // Of statistics that are taken of the data. As in torch, groups of an image may have a single value unless it is all
  // that there is.
  void check_values(int64_t num_groups) const {
    const int64_t space = volume(problem.out);
    const int64_t values = num_groups == -1  ? space
                           : num_groups == 0 ? problem.batch * space
                                             : problem.batch * (problem.out_channels / num_groups) * space;
    PTK_CHECK(values > 1, "conv_bn_relu: input: got one value per mean and variance, expected more");
  }
  int64_t result_size() const { return problem.batch * problem.out_channels * volume(problem.out); }

  void check_result(const char* name, const Tensor& tensor) const {
    check_like_input(name, tensor);
    PTK_CHECK(float_dtype(tensor) == problem.dtype, "conv_bn_relu: ", name, ": got another dtype, expected ",
              dtype_name(problem.dtype));
    PTK_CHECK(std::ranges::equal(tensor.sizes(), result_), "conv_bn_relu: ", name, ": got shape ",
              shape_text(tensor.sizes()), ", expected ", shape_text(result_));
  }

  // The tensor itself, or a copy that is dense in that layout.
  Tensor in_layout(const Tensor& tensor, Layout layout) const {
    if (has_layout(tensor, layout)) {
      return tensor;
    }
    Tensor dense = empty_in_layout(tensor, Sizes(tensor.sizes().begin(), tensor.sizes().end()), layout, problem.dtype);
    return torch::stable::copy_(dense, tensor);
  }

  Tensor empty_result(Layout layout) const { return empty_in_layout(input, result_, layout, problem.dtype); }
  Tensor empty_input() const { return empty_in_layout(input, shape_of(input), problem.layout, problem.dtype); }
  Tensor empty_weight() const {
    return empty_in_layout(input, shape_of(weight), Layout::channels_first, problem.dtype);
  }
  Tensor empty_vector(int64_t size) const { return empty_strided<1>(input, {size}, {1}, internal_dtype()); }
  Tensor empty_like_channels(const std::optional<Tensor>& like) const {
    PTK_CHECK(like, "conv_bn_relu: output_mask: got a gradient of None, expected False there");
    return empty_strided<1>(input, {problem.out_channels}, {1}, *float_dtype(*like));
  }

  // For mean and variance: of channels, or of the groups of every image.
  Tensor empty_statistics() const {
    const std::array<int64_t, 2> size = {problem.batch, problem.norm_groups};
    return normalizes_images ? empty_strided<2>(input, size, {size[1], 1}, internal_dtype())
                             : empty_vector(problem.out_channels);
  }

  Channels channels(const char* name, const std::optional<Tensor>& tensor) const {
    if (!tensor) {
      return {};
    }
    const std::optional<DType> dtype = check_vector(name, *tensor);
    PTK_CHECK(tensor->dim() == 1 && tensor->size(0) == problem.out_channels, "conv_bn_relu: ", name, ": got shape ",
              shape_text(tensor->sizes()), ", expected [", problem.out_channels, "]");
    Channels values(problem.dtype, problem.out_channels);
    const void* data = tensor->const_data_ptr();
    const int64_t stride = tensor->stride(0);
    if (*dtype == internal_dtype() && stride == 1) {
      std::memcpy(values.mutable_data(), data, problem.out_channels * element_size(*dtype));
      return values;
    }
    for (int64_t i = 0; i < problem.out_channels; ++i) {
      values.set(i, read_element(*dtype, data, i * stride));
    }
    return values;
  }

  // Of statistics that are given. Empty without any; also when training, where they come from the batch.
  Norm norm(const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_, const std::optional<Tensor>& mean,
            const std::optional<Tensor>& var, bool training, double eps) const {
    PTK_CHECK(eps >= 0 && std::isfinite(eps), "conv_bn_relu: eps: got ", eps, ", expected a number of at least 0");
    PTK_CHECK(mean.has_value() == var.has_value(),
              "conv_bn_relu: running_var: got one of running_mean and running_var");
    PTK_CHECK(mean || training || (!weight_ && !bias_),
              "conv_bn_relu: running_mean: got None, expected a tensor with bn_weight or bn_bias");
    const Channels scale = channels("bn_weight", weight_), shift = channels("bn_bias", bias_);
    const Channels centre = channels("running_mean", mean), variance = channels("running_var", var);
    if (training || !mean) {
      return {};
    }
    return with_vectors(scale, shift, centre, variance, eps);
  }
  // Of the statistics of every group of every image, spread over its channels.
  Norm sample_norm(const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_, const Tensor& mean,
                   const Tensor& var, double eps) const {
    return with_vectors(repeated("bn_weight", weight_), repeated("bn_bias", bias_), spread("mean", mean),
                        spread("var", var), eps);
  }
  // Of statistics that were taken of the data.
  Norm own_norm(const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_, const Tensor& mean,
                const Tensor& var, double eps) const {
    return problem.norm_groups ? sample_norm(weight_, bias_, mean, var, eps)
                               : norm(weight_, bias_, mean, var, false, eps);
  }

  // `norm` and the tensors must outlive the parameters.
  NormalizeParams normalize(const Tensor& conv, const std::optional<Tensor>& residual, const Norm& norm) const {
    NormalizeParams params;
    params.problem = problem;
    params.conv = conv.const_data_ptr();
    params.residual = residual ? residual->const_data_ptr() : nullptr;
    params.mean = norm.mean.data();
    params.scale = norm.scale.data();
    params.shift = norm.shift.data();
    return params;
  }

private:
  // scale and shift of gamma, beta (empty: 1, 0), mean and variance, which are of one length.
  Norm with_vectors(const Channels& gamma, const Channels& beta, const Channels& mean, const Channels& variance,
                    double eps) const {
    return problem.dtype == DType::f64 ? vectors_of<double>(gamma, beta, mean, variance, eps)
                                       : vectors_of<float>(gamma, beta, mean, variance, eps);
  }
  template <class A>
  Norm vectors_of(const Channels& gamma, const Channels& beta, const Channels& mean, const Channels& variance,
                  double eps) const {
    const int64_t count = mean.size();
    Norm n{mean, Channels(problem.dtype, count), Channels(problem.dtype, count), Channels(problem.dtype, count)};
    const A *factor = gamma.as<A>(), *offset = beta.as<A>(), *squares = variance.as<A>();
    A* invstd = static_cast<A*>(n.invstd.mutable_data());
    A *scale = static_cast<A*>(n.scale.mutable_data()), *shift = static_cast<A*>(n.shift.mutable_data());
    for (int64_t i = 0; i < count; ++i) {
      const double inverse = 1 / std::sqrt(static_cast<double>(squares[i]) + eps);
      invstd[i] = static_cast<A>(inverse);
      scale[i] = static_cast<A>(factor ? static_cast<double>(factor[i]) * inverse : inverse);
      shift[i] = offset ? offset[i] : 0;
    }
    return n;
  }

  // One vector of channels for every image.
  Channels repeated(const char* name, const std::optional<Tensor>& tensor) const {
    const Channels one = channels(name, tensor);
    if (one.empty()) {
      return {};
    }
    Channels all(problem.dtype, problem.batch * one.size());
    for (int64_t i = 0; i < all.size(); ++i) {
      all.set(i, one[i % one.size()]);
    }
    return all;
  }
  Channels spread(const char* name, const Tensor& tensor) const {
    const std::optional<DType> dtype = check_vector(name, tensor);
    const int64_t groups = problem.norm_groups, width = problem.out_channels / groups;
    PTK_CHECK(tensor.dim() == 2 && tensor.size(0) == problem.batch && tensor.size(1) == groups, "conv_bn_relu: ", name,
              ": got shape ", shape_text(tensor.sizes()), ", expected [", problem.batch, ", ", groups, "]");
    Channels all(problem.dtype, problem.batch * problem.out_channels);
    const void* data = tensor.const_data_ptr();
    for (int64_t i = 0; i < all.size(); ++i) {
      const int64_t group = i / width;
      all.set(i, read_element(*dtype, data, group / groups * tensor.stride(0) + group % groups * tensor.stride(1)));
    }
    return all;
  }

  std::optional<DType> check_vector(const char* name, const Tensor& tensor) const {
    check_like_input(name, tensor);
    const std::optional<DType> dtype = float_dtype(tensor);
    PTK_CHECK(dtype == problem.dtype || dtype == internal_dtype(), "conv_bn_relu: ", name,
              ": got another dtype, expected ", dtype_name(problem.dtype), " or ", dtype_name(internal_dtype()));
    return dtype;
  }

  int64_t size(size_t d) const {
    const ConvProblem& p = problem;
    const int64_t room = p.in[d] + 2 * p.padding[d] - p.dilation[d] * (p.kernel[d] - 1) - 1;
    PTK_CHECK(room >= 0, "conv_bn_relu: input: got shape ", shape_text(input.sizes()),
              ", smaller with its padding than the kernel");
    return room / p.stride[d] + 1;
  }
  int64_t transposed_size(size_t d, int64_t output_padding) const {
    const ConvProblem& p = problem;
    PTK_CHECK(output_padding < std::max(p.stride[d], p.dilation[d]), "conv_bn_relu: output_padding: got ",
              output_padding, ", expected less than stride ", p.stride[d], " or dilation ", p.dilation[d]);
    PTK_CHECK(p.in[d] >= 1, "conv_bn_relu: input: got shape ", shape_text(input.sizes()),
              ", expected at least one position");
    const int64_t reached = (p.in[d] - 1) * p.stride[d] + p.dilation[d] * (p.kernel[d] - 1) + 1;
    const int64_t left = reached - 2 * p.padding[d] + output_padding;
    PTK_CHECK(left >= 1, "conv_bn_relu: padding: got ", p.padding[d], ", which leaves nothing of a result of ",
              reached);
    return left;
  }

  DType internal_dtype() const { return problem.dtype == DType::f64 ? DType::f64 : DType::f32; }
  static Sizes shape_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

  void check_like_input(const char* name, const Tensor& tensor) const {
    PTK_CHECK(tensor.is_cpu(), "conv_bn_relu: ", name, ": got a tensor on another device, expected it on the cpu");
  }

  void check_tensors() const {
    check_like_input("input", input);
    check_like_input("weight", weight);
    PTK_CHECK(3 <= input.dim() && input.dim() <= 5, "conv_bn_relu: input: got ", input.dim(),
              " dimensions, expected 3 to 5: [batch, channels, space...]");
    PTK_CHECK(weight.dim() == input.dim(), "conv_bn_relu: weight: got ", weight.dim(), " dimensions, expected ",
              input.dim(), " like input");
    const std::optional<DType> dtype = float_dtype(input);
    PTK_CHECK(dtype, "conv_bn_relu: input: got another dtype, expected float64, float32, bfloat16 or float16");
    PTK_CHECK(float_dtype(weight) == dtype, "conv_bn_relu: weight: got another dtype, expected ", dtype_name(*dtype),
              " like input");
  }

  Sizes result_;
};

}  // namespace ptk
