// Fused attention: what the kernels are given. Torch-free.
//
//   scores[i, j] = cap(scale * <query[i], key[j]>) - slope * |i + diagonal - j| + relative_bias[j - i] + mask[i, j]
//   lse[i]       = log(exp(sink) + sum over j of exp(scores[i, j]))
//   out[i]       = sum over j of exp(scores[i, j] - lse[i]) * value[j]
//
// Query head h attends to key and value head h / (heads_q / heads_kv). Row i sees the keys from i + diagonal - left to
// i + diagonal + right; diagonal is 0, or len_k - len_q where the two ends are aligned.
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

// One number per [batch, head] in the dtype of lse; strides in elements, 0 for a batch that shares them.
struct HeadValues {
  const void* data = nullptr;
  int64_t strides[2] = {};
};

inline constexpr int64_t kUnbounded = int64_t{1} << 40;

// What the CPU kernels may multiply float32 by: itself, or pieces of 16 bits.
enum class Float32Products : uint8_t { exact, three_bf16, one_bf16 };

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
  bool is_causal = false;  // as right = 0
  int64_t left = kUnbounded;
  int64_t right = kUnbounded;
  bool bottom_right = false;  // diagonal is len_k - len_q
  double softcap = 0;         // cap(x) = softcap * tanh(x / softcap); 0: cap(x) = x
  HeadValues alibi;           // slopes; data is null without
  HeadValues sinks;           // data is null without
  // Added to the scores by distance: `distances` contiguous numbers per [batch, head], that of j - i at place
  // j - i + distance_zero, which is one less than the largest len_q they are made for. Data is null without.
  HeadValues relative_bias;
  int64_t distances = 0, distance_zero = 0;
  MaskKind mask_kind = MaskKind::none;
  ConstView mask;  // expanded to [batch, heads_q, len_q, len_k]
  // A boolean mask may have one element for so many rows and as many keys: [batch, heads_q, blocks_q, blocks_k] then.
  int64_t mask_block = 1;

  // Dropout keeps a weight where 16 bits of philox(seed, {key, row / 8, head, batch}) are below keep_below. Batches
  // come in groups of batch_per_seed that share a seed and count from 0 within.
  uint32_t keep_below = kKeepAll;
  const int64_t* seeds = nullptr;
  int64_t batch_per_seed = 1;
  static constexpr uint32_t kKeepAll = 1 << 16;

  // Packed sequences: batch b is rows first_q[b] to first_q[b + 1] of operands that have no batch dimension (its
  // strides are 0), and len_q the longest of them; lse is [heads_q, total_q]. Null: every batch has len_q rows of its
  // own.
  const int64_t* first_q = nullptr;
  const int64_t* first_k = nullptr;
  int64_t total_q = 0;

  Float32Products float32_products = Float32Products::exact;  // of the forward
  bool batch_invariant = false;  // the forward gives a row the same bits whatever else is in the call
};

// No size is zero in the problems that kernels get, but len_k where there are sinks: the glue answers those itself.
// A row with no key to attend to has out = 0 and lse = -inf (the sink, where there is one), and takes no part in any
// gradient but the sink's.
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
  // The rest in the dtype of lse, strides 0 in dimensions that are summed over. Zeroed; null where not asked for.
  View grad_mask;
  View grad_alibi, grad_sinks;  // [batch, head]: the first two strides
  View grad_relative;           // [batch, head, distance]: the first three
};

struct AttentionKernels {
  // False when memory ran out.
  bool (*forward)(const ForwardParams&);
  bool (*backward)(const BackwardParams&);
  // Name of the kernel that forward would run on operands whose rows are contiguous.
  const char* (*describe)(const Problem&);
};

PTK_DECLARE_KERNELS(AttentionKernels, attention_kernels)

// What torch.set_float32_matmul_precision allows a kernel of the active level, which alone is asked.
Float32Products allowed_float32_products(DType dtype);

// Whether kernels on the CPU are to be batch invariant; process-wide, set by _batch_invariant().
bool is_batch_invariant();

// Name of the kernel that the active level runs for a problem.
PTK_EXPORT const char* attention_kernel_name(const Problem& problem);

}  // namespace ptk
