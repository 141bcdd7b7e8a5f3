// Schemas of the quantized linear layer, and their CPU implementation: the kernel of the active ISA.
#include "csrc/ops/quantized_matmul/quantized_matmul.h"

#include "csrc/core/stable_compat.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace ptk {

CodeFormat parse_code_format(std::string_view name) {
  for (int i = 0; i < kCodeFormats; ++i) {
    if (name == code_format_name(static_cast<CodeFormat>(i))) {
      return static_cast<CodeFormat>(i);
    }
  }
  fail("quantized_linear: code_format: got '", name, "', expected s8, u4, u3, u2, nf4, fp4 or fp8");
}

namespace {

LinearActivation parse_activation(std::string_view name) {
  constexpr const char* names[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "swiglu"};
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) {
      return static_cast<LinearActivation>(i);
    }
  }
  fail("quantized_linear: activation: got '", name, "', expected none, relu, gelu, gelu_tanh, silu or swiglu");
}

void check_cpu(const char* name, const Tensor& tensor) {
  PTK_CHECK(tensor.is_cpu(), "quantized_linear: ", name, ": got a tensor on another device, expected the CPU");
}

DType check_float(const char* name, const Tensor& tensor) {
  check_cpu(name, tensor);
  const std::optional<DType> dtype = float_dtype(tensor);
  PTK_CHECK(dtype, "quantized_linear: ", name, ": got another dtype, expected float64, float32, bfloat16 or float16");
  return *dtype;
}

void check_dims(const char* name, const Tensor& tensor, int64_t expected) {
  PTK_CHECK(tensor.dim() == expected, "quantized_linear: ", name, ": got ", tensor.dim(), " dimensions, expected ",
            expected);
}

void check_shape(const char* name, const Tensor& tensor, const auto& expected) {
  PTK_CHECK(std::ranges::equal(tensor.sizes(), expected), "quantized_linear: ", name, ": got shape ",
            shape_text(tensor.sizes()), ", expected ", shape_text(expected));
}

// float64 goes with float64 alone.
void check_goes_with(const char* name, DType dtype, DType input) {
  PTK_CHECK((dtype == DType::f64) == (input == DType::f64), "quantized_linear: ", name, ": got ", dtype_name(dtype),
            ", expected ", input == DType::f64 ? "float64, like input" : "float32, bfloat16 or float16");
}

DType parse_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  constexpr std::array types = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const auto found = std::ranges::find(types, dtype);
  PTK_CHECK(found != types.end(), "quantized_linear: out_dtype: got another dtype, expected a floating one");
  return static_cast<DType>(found - types.begin());
}

ConstMatrix matrix(const Tensor& tensor, DType dtype) {
  return {tensor.const_data_ptr(), dtype, {tensor.stride(0), tensor.stride(1)}};
}

// The tensors that a weight view points into.
struct HeldWeight {
  Tensor codes, scales;
  std::optional<Tensor> zeros;
  QuantizedWeightView view;

  HeldWeight(const Tensor& codes_, const Tensor& scales_, const std::optional<Tensor>& zeros_, std::string_view format,
             int64_t group_size, int64_t in_features)
      : codes(codes_), scales(scales_), zeros(zeros_) {
    view.format = parse_code_format(format);
    check_cpu("codes", codes);
    check_dims("codes", codes, 2);
    const int32_t expected = view.format == CodeFormat::s8 ? aoti_torch_dtype_int8() : aoti_torch_dtype_uint8();
    PTK_CHECK(shim_dtype(codes) == expected, "quantized_linear: codes: got another dtype, expected ",
              view.format == CodeFormat::s8 ? "int8" : "uint8", " for ", format);
    PTK_CHECK(group_size == -1 || (group_size > 0 && group_size % 16 == 0), "quantized_linear: group_size: got ",
              group_size, ", expected -1 or a positive multiple of 16");
    PTK_CHECK(in_features >= 0, "quantized_linear: in_features: got ", in_features, ", expected at least 0");
    view.n = codes.size(0);
    view.k = in_features;
    const int64_t whole = std::max<int64_t>(in_features, 1);
    view.group = group_size == -1 ? whole : std::min(group_size, whole);
    check_shape("codes", codes, std::array{view.n, view.row_bytes()});
    hold("scales", scales);
    codes = torch::stable::contiguous(codes);
    view.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
    view.scales = static_cast<const float*>(scales.const_data_ptr());
    if (zeros) {
      hold("zeros", *zeros);
      view.zeros = static_cast<const float*>(zeros->const_data_ptr());
    }
  }

private:
  void hold(const char* name, Tensor& tensor) const {
    PTK_CHECK(check_float(name, tensor) == DType::f32, "quantized_linear: ", name,
              ": got another dtype, expected float32");
    check_shape(name, tensor, std::array{view.n, view.groups()});
    tensor = torch::stable::contiguous(tensor);
  }
};

// How many rows of the input go to each of the weights stacked in one; a single weight gets all of them.
struct Experts {
  std::optional<Tensor> held;
  const int64_t* counts = nullptr;
  int64_t number = 1;

  Experts(const std::optional<Tensor>& given, int64_t weight_rows, int64_t input_rows) : all_(input_rows) {
    if (given) {
      check_cpu("counts", *given);
      check_dims("counts", *given, 1);
      PTK_CHECK(shim_dtype(*given) == aoti_torch_dtype_int64(),
                "quantized_linear: counts: got another dtype, expected int64");
      held = torch::stable::contiguous(*given);
      number = held->size(0);
      counts = static_cast<const int64_t*>(held->const_data_ptr());
    }
    PTK_CHECK(number > 0 && weight_rows % number == 0, "quantized_linear: counts: got ", number, " for ", weight_rows,
              " rows of codes, expected a divisor");
    int64_t sum = 0;
    for (int64_t e = 0; e < number; ++e) {
      PTK_CHECK(rows(e) >= 0, "quantized_linear: counts: got ", rows(e), ", expected at least 0");
      sum += rows(e);
    }
    PTK_CHECK(sum == input_rows, "quantized_linear: counts: got a sum of ", sum, ", expected ", input_rows,
              " like the rows of input");
  }
  int64_t rows(int64_t e) const { return counts ? counts[e] : all_; }

private:
  int64_t all_;
};

const void* advance(const void* data, DType dtype, int64_t elements) {
  return data ? static_cast<const char*>(data) + elements * static_cast<int64_t>(element_size(dtype)) : nullptr;
}

void advance_rows(ConstMatrix& matrix, int64_t rows) {
  matrix.data = advance(matrix.data, matrix.dtype, rows * matrix.strides[0]);
}

void advance_rows(QuantizedWeightView& weight, int64_t rows) {
  weight.codes += rows * weight.row_bytes();
  weight.scales += rows * weight.groups();
  weight.zeros = weight.zeros ? weight.zeros + rows * weight.groups() : nullptr;
}

Tensor quantized_linear(Tensor input, Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                        std::optional<Tensor> bias, std::optional<Tensor> residual, Text code_format,
                        int64_t group_size, bool quantize_input, std::optional<Tensor> input_scale, Text activation,
                        std::optional<torch::headeronly::ScalarType> out_dtype, std::optional<Tensor> counts) {
  const DType dtype = check_float("input", input);
  check_dims("input", input, 2);
  const HeldWeight weight(codes, scales, zeros, code_format, group_size, input.size(1));
  QuantizedForward p;
  p.weight = weight.view;
  const Experts experts(counts, p.weight.n, input.size(0));
  const int64_t all_rows = p.weight.n;
  p.weight.n /= experts.number;
  p.m = input.size(0);
  p.input = matrix(input, dtype);
  p.quantize_input = quantize_input;
  PTK_CHECK(!quantize_input || p.weight.format == CodeFormat::s8 || p.weight.format == CodeFormat::u4,
            "quantized_linear: quantize_input: got True with ", code_format, " codes, expected s8 or u4");
  if (input_scale) {
    PTK_CHECK(quantize_input, "quantized_linear: input_scale: got one without quantize_input");
    PTK_CHECK(check_float("input_scale", *input_scale) == DType::f32 && input_scale->numel() == 1,
              "quantized_linear: input_scale: got ", input_scale->numel(), " elements, expected one of float32");
    p.input_scale = static_cast<const float*>(input_scale->const_data_ptr());
  }
  p.activation = parse_activation(activation);
  const bool gated = p.activation == LinearActivation::swiglu;
  PTK_CHECK(!gated || p.weight.n % 2 == 0, "quantized_linear: activation: got swiglu with ", p.weight.n,
            " output features, expected an even number");
  if (bias) {
    p.bias_dtype = check_float("bias", *bias);
    check_goes_with("bias", p.bias_dtype, dtype);
    check_shape("bias", *bias, std::array{all_rows});
    bias = torch::stable::contiguous(*bias);
    p.bias = bias->const_data_ptr();
  }
  if (residual) {
    const DType residual_dtype = check_float("residual", *residual);
    check_goes_with("residual", residual_dtype, dtype);
    check_shape("residual", *residual, std::array{p.m, p.weight.n});
    p.residual = matrix(*residual, residual_dtype);
  }
  p.out_dtype = dtype;
  if (out_dtype) {
    p.out_dtype = parse_dtype(*out_dtype);
    check_goes_with("out_dtype", p.out_dtype, dtype);
  }
  const int64_t columns = gated ? p.weight.n / 2 : p.weight.n;
  Tensor out = empty_strided<2>(input, {p.m, columns}, {std::max<int64_t>(columns, 1), 1}, p.out_dtype);
  if (p.m == 0 || columns == 0) {
    return out;
  }
  p.out = out.mutable_data_ptr();
  const QuantizedMatmulKernels& kernels = PTK_DISPATCH(quantized_matmul_kernels);
  for (int64_t e = 0; e < experts.number; ++e) {
    p.m = experts.rows(e);
    PTK_CHECK(p.m == 0 || kernels.forward(p), "quantized_linear: out of memory");
    advance_rows(p.weight, p.weight.n);
    advance_rows(p.input, p.m);
    advance_rows(p.residual, p.m);
    p.bias = advance(p.bias, p.bias_dtype, p.weight.n);
    p.out = const_cast<void*>(advance(p.out, p.out_dtype, p.m * columns));
  }
  return out;
}

Tensor quantized_linear_backward(Tensor grad_out, Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                                 Text code_format, int64_t group_size, int64_t in_features,
                                 std::optional<Tensor> counts) {
  const DType dtype = check_float("grad_out", grad_out);
  check_dims("grad_out", grad_out, 2);
  const HeldWeight weight(codes, scales, zeros, code_format, group_size, in_features);
  QuantizedBackward p;
  p.weight = weight.view;
  p.m = grad_out.size(0);
  const Experts experts(counts, p.weight.n, p.m);
  p.weight.n /= experts.number;
  check_shape("grad_out", grad_out, std::array{p.m, p.weight.n});
  p.grad_out = matrix(grad_out, dtype);
  Tensor grad_input = empty_strided<2>(grad_out, {p.m, in_features}, {std::max<int64_t>(in_features, 1), 1}, dtype);
  if (p.m == 0 || in_features == 0) {
    return grad_input;
  }
  if (p.weight.n == 0) {
    torch::stable::zero_(grad_input);
    return grad_input;
  }
  p.grad_input = grad_input.mutable_data_ptr();
  const QuantizedMatmulKernels& kernels = PTK_DISPATCH(quantized_matmul_kernels);
  for (int64_t e = 0; e < experts.number; ++e) {
    p.m = experts.rows(e);
    PTK_CHECK(p.m == 0 || kernels.backward(p), "quantized_linear: out of memory");
    advance_rows(p.weight, p.weight.n);
    advance_rows(p.grad_out, p.m);
    p.grad_input = const_cast<void*>(advance(p.grad_input, dtype, p.m * in_features));
  }
  return grad_input;
}

Tensor quantized_embedding(Tensor indices, Tensor codes, Tensor scales, std::optional<Tensor> zeros, Text code_format,
                           int64_t group_size, int64_t in_features, torch::headeronly::ScalarType out_dtype) {
  const HeldWeight weight(codes, scales, zeros, code_format, group_size, in_features);
  check_cpu("indices", indices);
  check_dims("indices", indices, 1);
  PTK_CHECK(shim_dtype(indices) == aoti_torch_dtype_int64(),
            "quantized_embedding: indices: got another dtype, expected int64");
  indices = torch::stable::contiguous(indices);
  QuantizedRows p;
  p.weight = weight.view;
  p.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  p.count = indices.size(0);
  for (int64_t i = 0; i < p.count; ++i) {
    PTK_CHECK(p.indices[i] >= 0 && p.indices[i] < p.weight.n, "quantized_embedding: input: got index ", p.indices[i],
              ", expected 0 to ", p.weight.n - 1);
  }
  p.dtype = parse_dtype(out_dtype);
  Tensor out = empty_strided<2>(codes, {p.count, in_features}, {std::max<int64_t>(in_features, 1), 1}, p.dtype);
  if (p.count > 0 && in_features > 0) {
    p.out = out.mutable_data_ptr();
    PTK_DISPATCH(quantized_matmul_kernels).rows(p);
  }
  return out;
}

}  // namespace

const char* quantized_matmul_kernel_name(const QuantizedForward& problem) {
  return PTK_DISPATCH(quantized_matmul_kernels).describe(problem);
}

}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def(
      "quantized_linear(Tensor input, Tensor codes, Tensor scales, Tensor? zeros=None, Tensor? bias=None, "
      "Tensor? residual=None, str code_format='s8', int group_size=-1, bool quantize_input=False, "
      "Tensor? input_scale=None, str activation='none', ScalarType? out_dtype=None, Tensor? counts=None) -> Tensor");
  library.def("_quantized_linear_backward(Tensor grad_out, Tensor codes, Tensor scales, Tensor? zeros, "
              "str code_format, int group_size, int in_features, Tensor? counts=None) -> Tensor");
  library.def("quantized_embedding(Tensor indices, Tensor codes, Tensor scales, Tensor? zeros, str code_format, "
              "int group_size, int in_features, ScalarType out_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("quantized_linear", TORCH_BOX(&ptk::quantized_linear));
  library.impl("_quantized_linear_backward", TORCH_BOX(&ptk::quantized_linear_backward));
  library.impl("quantized_embedding", TORCH_BOX(&ptk::quantized_embedding));
}
