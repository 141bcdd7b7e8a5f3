// Normalisation of queries and keys, and their rotation by position: what the kernels are given. Torch-free.
//
//   n     = x * rsqrt(mean(x^2) + eps) * weight                    (n = x without a weight)
//   out   = (n[a] cos - n[b] sin, n[b] cos + n[a] sin)             for the pairs (a, b) of the first rotary_dim values
//   out   = n                                                      for the others
//
// Pair i is (2 i, 2 i + 1) where interleaved, (i, i + rotary_dim / 2) otherwise; its angle is in column i of cos and
// sin.
#pragma once

#include "csrc/ops/attention/attention.h"

namespace ptk {

// Rows of one operand, [batch, heads, length, dim].
struct RotaryOperand {
  int64_t heads = 0;
  ConstView input;
  const void* weight = nullptr;  // [dim] contiguous, in the dtype of the operands; null for no normalisation
  ConstView grad_out;            // backward
  View out;                      // out, or the gradient of input; null where not asked for, stride 1 in dim
  void* grad_weight = nullptr;   // [dim] contiguous; null where not asked for
};

struct RotaryProblem {
  DType dtype = DType::f32;
  int64_t batch = 0, length = 0, dim = 0, rotary_dim = 0;
  const void* cos = nullptr;  // [positions, rotary_dim / 2]
  const void* sin = nullptr;
  int64_t cos_strides[2] = {}, sin_strides[2] = {};
  DType table_dtype = DType::f32;
  const int64_t* positions = nullptr;  // [batch, length], checked; null: row i stands at position i
  int64_t position_strides[2] = {};
  bool interleaved = false;
  double eps = 0;
  RotaryOperand operands[2];  // query and key
};

struct RotaryKernels {
  // False when memory ran out.
  bool (*forward)(const RotaryProblem&);
  bool (*backward)(const RotaryProblem&);
};

PTK_DECLARE_KERNELS(RotaryKernels, rotary_kernels)

}  // namespace ptk
