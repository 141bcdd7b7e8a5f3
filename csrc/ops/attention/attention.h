// Fused attention: what the kernels are given. Torch-free.
//
//   scores[i, j] = scale * <query[i], key[j]> + mask[i, j]      out = softmax(scores) value      lse =
//   logsumexp(scores)
//
// Query head h attends to key and value head h / (heads_q / heads_kv).
#pragma once

#include "csrc/core/dtype.h"
#include "csrc/cpu/isa.h"

#include <cstdint>

namespace ptk {

enum class MaskKind : uint8_t {
  none,
  boolean,     // one byte per element, nonzero = attend
  same_dtype,  // added to the scores, in the dtype of query
  f32,         // added to the scores, in float32 (where query is not float32)
};

// A tensor of shape [batch, heads, length, dim]. Strides are in elements; any may be 0, or out of order.
struct ConstView {
  const void* data = nullptr;
  int64_t strides[4] = {};
};

struct View {
  void* data = nullptr;
  int64_t strides[4] = {};
};

struct Problem {
  DType dtype = DType::f32;
  int64_t batch = 0;
  int64_t heads_q = 0;
  int64_t heads_kv = 0;
  int64_t len_q = 0;
  int64_t len_k = 0;
  int64_t dim_qk = 0;
  int64_t dim_v = 0;
  double scale = 1.0;
  bool is_causal = false;  // row i attends to keys j <= i only, whatever the two lengths
  MaskKind mask_kind = MaskKind::none;
  ConstView mask;  // expanded to [batch, heads_q, len_q, len_k]
};

// No size is zero in the problems that kernels get: the glue answers those itself.
// A row with no key to attend to has out = 0 and lse = -inf, and takes no part in any gradient.
struct ForwardParams {
  Problem problem;
  ConstView query, key, value;
  View out;             // [batch, heads_q, len_q, dim_v], uninitialised, stride 1 in dim
  void* lse = nullptr;  // [batch, heads_q, len_q] contiguous, float32 (float64 for float64)
};

struct BackwardParams {
  Problem problem;
  ConstView grad_out;
  const void* grad_lse = nullptr;  // laid out like lse; null when lse was not differentiated
  ConstView query, key, value, out;
  const void* lse = nullptr;              // as the forward gave it
  View grad_query, grad_key, grad_value;  // uninitialised, stride 1 in dim; data is null where not asked for
};

struct AttentionKernels {
  // False when memory ran out.
  bool (*forward)(const ForwardParams&);
  bool (*backward)(const BackwardParams&);
  // Name of the kernel that forward would run on operands whose rows are contiguous.
  const char* (*describe)(const Problem&);
};

PTK_DECLARE_KERNELS(AttentionKernels, attention_kernels)

// Name of the kernel that the active level runs for a problem.
PTK_EXPORT const char* attention_kernel_name(const Problem& problem);

}  // namespace ptk
