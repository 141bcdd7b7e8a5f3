// Products with a quantized weight: what the kernels are given. Torch-free.
//
//   weight[n, k] = scales[n, k / group] * (value(codes[n, k]) - zeros[n, k / group])
//   out[m, n]    = activation(sum over k of input[m, k] * weight[n, k] + bias[n] + residual[m, n])
//
// Codes are row-major along k whatever the ISA; a row starts at a byte. README.md describes the formats.
#pragma once

#include "csrc/core/dtype.h"
#include "csrc/cpu/isa.h"

#include <cstdint>
#include <string_view>

namespace ptk {

enum class CodeFormat : uint8_t {
  s8,   // one signed byte: its value
  u4,   // two to a byte, even k in the low half: code - 8
  u2,   // four to a byte, lowest bits first: code - 2
  nf4,  // packed as u4: the 16 quantiles of a normal distribution
  fp4,  // packed as u4: e2m1
  fp8,  // one byte: e4m3 without infinities
  u3,   // eight to three bytes, lowest bits first: code - 4
};
inline constexpr int kCodeFormats = 7;

constexpr int code_bits(CodeFormat format) {
  constexpr int bits[] = {8, 4, 2, 4, 4, 8, 3};
  return bits[static_cast<int>(format)];
}

constexpr const char* code_format_name(CodeFormat format) {
  constexpr const char* names[] = {"s8", "u4", "u2", "nf4", "fp4", "fp8", "u3"};
  return names[static_cast<int>(format)];
}

enum class LinearActivation : uint8_t { none, relu, gelu, gelu_tanh, silu, swiglu };

// codes [n, row_bytes], scales and zeros [n, groups], contiguous.
struct QuantizedWeightView {
  CodeFormat format = CodeFormat::s8;
  int64_t n = 0, k = 0;
  int64_t group = 0;  // columns that share a scale; the last group may be short
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  const float* zeros = nullptr;  // of value(code); null where they are all 0

  constexpr int64_t groups() const { return (k + group - 1) / group; }
  constexpr int64_t row_bytes() const { return (k * code_bits(format) + 7) / 8; }
};

struct ConstMatrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t strides[2] = {};
};

// No size is zero in the problems that kernels get. float64 input goes with float64 out, bias and residual only.
struct QuantizedForward {
  QuantizedWeightView weight;
  int64_t m = 0;
  ConstMatrix input;                   // [m, k]
  bool quantize_input = false;         // to signed bytes, symmetric; s8 and u4 weights only
  const float* input_scale = nullptr;  // one for all rows; null: every row's largest magnitude / 127
  const void* bias = nullptr;          // [n]
  DType bias_dtype = DType::f32;
  ConstMatrix residual;  // [m, n]; data may be null
  LinearActivation activation = LinearActivation::none;
  void* out = nullptr;  // [m, n] contiguous, n / 2 columns with swiglu: silu(first half) * second half
  DType out_dtype = DType::f32;
};

// grad_input = grad_out weight
struct QuantizedBackward {
  QuantizedWeightView weight;
  int64_t m = 0;
  ConstMatrix grad_out;        // [m, n]
  void* grad_input = nullptr;  // [m, k] contiguous, in grad_out's dtype
};

// out[i, :] = weight[indices[i], :]
struct QuantizedRows {
  QuantizedWeightView weight;
  const int64_t* indices = nullptr;
  int64_t count = 0;
  void* out = nullptr;  // [count, k] contiguous
  DType dtype = DType::f32;
};

struct QuantizedMatmulKernels {
  // False when memory ran out.
  bool (*forward)(const QuantizedForward&);
  bool (*backward)(const QuantizedBackward&);
  void (*rows)(const QuantizedRows&);
  // Name of the kernel that forward would run.
  const char* (*describe)(const QuantizedForward&);
};

PTK_DECLARE_KERNELS(QuantizedMatmulKernels, quantized_matmul_kernels)

// Throws std::runtime_error on an unknown name.
PTK_EXPORT CodeFormat parse_code_format(std::string_view name);

PTK_EXPORT const char* quantized_matmul_kernel_name(const QuantizedForward& problem);

}  // namespace ptk
