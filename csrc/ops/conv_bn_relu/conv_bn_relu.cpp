// Schemas of conv_bn_relu and their CPU implementation: validate, allocate, answer empty problems, call the kernels of
// the active ISA.
#include "csrc/ops/conv_bn_relu/conv_bn_relu_glue.h"

#include "csrc/cpu/packed_weights.h"

#include <torch/csrc/stable/library.h>

namespace ptk {
namespace {

const ConvKernels& kernels() {
  return PTK_DISPATCH(conv_kernels);
}

void check_memory(bool ok) {
  PTK_CHECK(ok, "conv_bn_relu: out of memory");
}

// The convolution of an inference, its weights packed once for as long as they stay the same.
void convolve(const ConvArguments& call, ConvParams& params) {
  const ConvProblem& p = call.problem;
  const PackedConvLayout layout = kernels().packed_layout(p);
  if (layout.bytes == 0) return check_memory(kernels().convolve(params));
  const size_t weight_bytes = call.weight.numel() * element_size(p.dtype);
  const PackedWeights packed({'c', static_cast<int64_t>(p.dtype), p.in_channels, p.out_channels, p.groups, p.kernel[0],
                              p.kernel[1], p.kernel[2], layout.kind, layout.bytes},
                             {{call.weight.const_data_ptr(), weight_bytes}}, layout.bytes);
  params.packed = packed.data();
  params.is_packed = packed.ready();
  check_memory(kernels().convolve(params));
  packed.publish();
}

using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensors4 forward(Tensor input, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> bn_weight,
                 std::optional<Tensor> bn_bias, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                 std::optional<Tensor> residual, bool training, double eps, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, Text activation,
                 double negative_slope, bool save_conv, bool transposed,
                 std::optional<std::vector<int64_t>> output_padding, int64_t num_groups, Text pre_activation) {
  const ConvArguments call(input, weight, stride, padding, dilation, groups, activation, negative_slope,
                           {transposed, output_padding.value_or(Sizes{}), num_groups, pre_activation});
  const ConvProblem& p = call.problem;
  // Whether the statistics are those of the data.
  const bool measures = training || call.normalizes_images;
  PTK_CHECK(!running_mean || !call.normalizes_images,
            "conv_bn_relu: running_mean: got a tensor, expected None with statistics of every image");
  const Norm norm = call.norm(bn_weight, bn_bias, running_mean, running_var, measures, eps);
  const Channels bias_channels = call.channels("bias", bias);
  Tensor out = call.empty_result(p.layout);
  const bool keeps_conv = measures || save_conv;
  Tensor conv = keeps_conv ? call.empty_result(conv_layout(p)) : call.empty_vector(0);
  Tensor mean = measures ? call.empty_statistics() : call.empty_vector(0);
  Tensor var = measures ? call.empty_statistics() : call.empty_vector(0);
  const Tensor nothing = call.empty_vector(0);
  if (residual) {
    call.check_result("residual", *residual);
    residual = call.in_layout(*residual, p.layout);
  }
  if (out.numel() == 0) {
    PTK_CHECK(!training || call.normalizes_images || p.out_channels == 0,
              "conv_bn_relu: input: got no value per channel, expected more than 1");
    return {out, save_conv ? conv : nothing, mean, var};
  }

  ConvParams params;
  params.problem = p;
  params.input = call.input.const_data_ptr();
  params.weight = call.weight.const_data_ptr();
  if (!keeps_conv) {
    params.bias = bias_channels.data();
    params.mean = norm.mean.data();
    params.scale = norm.scale.data();
    params.shift = norm.shift.data();
    params.residual = residual ? residual->const_data_ptr() : nullptr;
    params.out = out.mutable_data_ptr();
    params.out_layout = p.layout;
    convolve(call, params);
    return {out, conv, mean, var};
  }
  params.problem.activation = Activation::none;
  params.bias = bias_channels.data();
  params.out = conv.mutable_data_ptr();
  params.out_layout = conv_layout(p);
  if (measures) {
    call.check_values(num_groups);
    params.batch_mean = mean.mutable_data_ptr();
    params.batch_variance = var.mutable_data_ptr();
  }
  check_memory(kernels().convolve(params));

  const Norm used = measures ? call.own_norm(bn_weight, bn_bias, mean, var, eps) : norm;
  NormalizeParams normalize = call.normalize(conv, residual, used);
  normalize.out = out.mutable_data_ptr();
  check_memory(kernels().normalize(normalize));
  return {out, save_conv ? conv : nothing, mean, var};
}

// The convolution again, where the forward has not kept it.
Tensor convolved(const ConvArguments& call, const Channels& bias) {
  Tensor conv = call.empty_result(conv_layout(call.problem));
  ConvParams params;
  params.problem = call.problem;
  params.problem.activation = Activation::none;
  params.input = call.input.const_data_ptr();
  params.weight = call.weight.const_data_ptr();
  params.bias = bias.data();
  params.out = conv.mutable_data_ptr();
  params.out_layout = conv_layout(call.problem);
  check_memory(kernels().convolve(params));
  return conv;
}

void multiply_backward(const ConvArguments& call, const Tensor& grad_conv, const std::optional<Tensor>& grad_input,
                       const std::optional<Tensor>& grad_weight) {
  ConvBackwardParams products;
  products.problem = call.problem;
  products.grad_conv = grad_conv.const_data_ptr();
  products.input = call.input.const_data_ptr();
  products.weight = call.weight.const_data_ptr();
  products.grad_input = grad_input && grad_input->numel() > 0 ? grad_input->mutable_data_ptr() : nullptr;
  products.grad_weight = grad_weight && grad_weight->numel() > 0 ? grad_weight->mutable_data_ptr() : nullptr;
  check_memory(kernels().convolve_backward(products));
}

using Gradients = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
                             std::optional<Tensor>, std::optional<Tensor>>;

Gradients backward(Tensor grad_out, Tensor input, Tensor weight, std::optional<Tensor> bias,
                   std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, std::optional<Tensor> mean,
                   std::optional<Tensor> var, std::optional<Tensor> residual, std::optional<Tensor> conv, bool training,
                   double eps, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   int64_t groups, Text activation, double negative_slope, std::vector<bool> output_mask,
                   bool transposed, std::optional<std::vector<int64_t>> output_padding, int64_t num_groups,
                   Text pre_activation) {
  const ConvArguments call(input, weight, stride, padding, dilation, groups, activation, negative_slope,
                           {transposed, output_padding.value_or(Sizes{}), num_groups, pre_activation});
  const ConvProblem& p = call.problem;
  PTK_CHECK(output_mask.size() == 6, "conv_bn_relu: output_mask: got ", output_mask.size(), " entries, expected 6");
  const bool measured = training || call.normalizes_images;
  PTK_CHECK(!measured || (mean && var), "conv_bn_relu: mean: got None, expected a tensor with statistics of the data");
  const Norm norm = measured ? call.own_norm(bn_weight, bn_bias, *mean, *var, eps)
                             : call.norm(bn_weight, bn_bias, mean, var, false, eps);
  const Channels bias_channels = call.channels("bias", bias);
  call.check_result("grad_out", grad_out);
  if (residual) {
    call.check_result("residual", *residual);
    residual = call.in_layout(*residual, p.layout);
  }
  if (conv) {
    call.check_result("conv", *conv);
    conv = call.in_layout(*conv, conv_layout(p));
  }
  grad_out = call.in_layout(grad_out, p.layout);

  const auto wanted = [&](size_t i, const auto& make) { return output_mask[i] ? std::optional(make()) : std::nullopt; };
  std::optional<Tensor> grad_input = wanted(0, [&] { return call.empty_input(); });
  std::optional<Tensor> grad_weight = wanted(1, [&] { return call.empty_weight(); });
  std::optional<Tensor> grad_bias = wanted(2, [&] { return call.empty_like_channels(bias); });
  std::optional<Tensor> grad_bn_weight = wanted(3, [&] { return call.empty_like_channels(bn_weight); });
  std::optional<Tensor> grad_bn_bias = wanted(4, [&] { return call.empty_like_channels(bn_bias); });
  std::optional<Tensor> grad_residual = wanted(5, [&] { return call.empty_result(p.layout); });
  const Gradients gradients{grad_input, grad_weight, grad_bias, grad_bn_weight, grad_bn_bias, grad_residual};
  if (call.result_size() == 0) {
    for (auto* gradient : {&grad_input, &grad_weight, &grad_bias, &grad_bn_weight, &grad_bn_bias, &grad_residual}) {
      if (*gradient) {
        torch::stable::zero_(**gradient);
      }
    }
    return gradients;
  }
  // A gradient that passes through unchanged: whatever `conv` was.
  const bool is_bare =
      p.activation == Activation::none && !measured && norm.mean.empty() && !residual && !grad_residual;
  if (!conv && !is_bare) {
    conv = convolved(call, bias_channels);
  }

  // Whatever a bias adds to channels that have statistics of their own, these take away again.
  const bool bias_is_removed = measured && (!call.normalizes_images || p.norm_groups == p.out_channels);
  const bool sums_grad_conv = grad_bias && measured && !bias_is_removed;
  const bool needs_grad_conv = grad_input || grad_weight || sums_grad_conv;
  const bool is_grad_out = is_bare && conv_layout(p) == p.layout;
  std::optional<Tensor> grad_conv;
  if (needs_grad_conv) {
    grad_conv = is_grad_out ? grad_out : call.empty_result(conv_layout(p));
    if (!conv && !is_grad_out) {
      torch::stable::zero_(*grad_conv);  // any numbers will do for what is read before it is written
    }
  }
  const int64_t sums = (call.normalizes_images ? p.batch : 1) * p.out_channels;
  Channels sum_du(p.dtype, sums), sum_du_xhat(p.dtype, sums), sum_grad_conv(p.dtype, p.out_channels);
  NormalizeBackwardParams params;
  params.forward = call.normalize(conv ? *conv : grad_conv ? *grad_conv : grad_out, residual, norm);
  params.invstd = norm.invstd.data();
  params.grad_out = grad_out.const_data_ptr();
  params.batch_statistics = measured;
  params.sum_du = sum_du.mutable_data();
  params.sum_du_xhat = sum_du_xhat.mutable_data();
  params.sum_grad_conv = sums_grad_conv ? sum_grad_conv.mutable_data() : nullptr;
  params.grad_conv = grad_conv && !is_grad_out ? grad_conv->mutable_data_ptr() : nullptr;
  params.grad_residual = grad_residual ? grad_residual->mutable_data_ptr() : nullptr;
  if (!is_grad_out || grad_bias) {
    check_memory(kernels().normalize_backward(params));
  }

  if (grad_input || grad_weight) {
    multiply_backward(call, *grad_conv, grad_input, grad_weight);
  }
  if (grad_bias) {
    if (bias_is_removed) {
      torch::stable::zero_(*grad_bias);
    } else {
      (sums_grad_conv ? sum_grad_conv : sum_du.times(norm.scale)).write(*grad_bias);
    }
  }
  if (grad_bn_weight) {
    sum_du_xhat.folded(p.out_channels).write(*grad_bn_weight);
  }
  if (grad_bn_bias) {
    sum_du.folded(p.out_channels).write(*grad_bn_bias);
  }
  return gradients;
}

void allow_winograd(bool allowed) {
  allows_winograd = allowed;
}

}  // namespace

const char* conv_kernel_name(const ConvProblem& problem) {
  ConvProblem asked = problem;
  asked.allows_winograd = allows_winograd;
  return kernels().describe(asked);
}

}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("conv_bn_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
              "Tensor? running_mean, Tensor? running_var, Tensor? residual, bool training, float eps, int[] stride, "
              "int[] padding, int[] dilation, int groups, str activation=\"relu\", float negative_slope=0.01, "
              "bool save_conv=False, bool transposed=False, int[]? output_padding=None, int num_groups=0, "
              "str pre_activation=\"none\") -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("_conv_bn_relu_backward(Tensor grad_out, Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, "
              "Tensor? bn_bias, Tensor? mean, Tensor? var, Tensor? residual, Tensor? conv, bool training, float eps, "
              "int[] stride, int[] padding, int[] dilation, int groups, str activation=\"relu\", "
              "float negative_slope=0.01, bool[6] output_mask=[True, True, True, True, True, True], "
              "bool transposed=False, int[]? output_padding=None, int num_groups=0, str pre_activation=\"none\") -> "
              "(Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  library.def("_allow_winograd(bool allowed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CompositeExplicitAutograd, library) {
  library.impl("_allow_winograd", TORCH_BOX(&ptk::allow_winograd));
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("conv_bn_relu", TORCH_BOX(&ptk::forward));
  library.impl("_conv_bn_relu_backward", TORCH_BOX(&ptk::backward));
}
