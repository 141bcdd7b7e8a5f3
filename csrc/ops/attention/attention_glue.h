// Torch glue of attention, the same for every backend: validate, allocate, answer empty problems, call the kernels.
//
// A Backend has `kDevice` (its name in messages), `owns(tensor)`, and `forward` and `backward`, which run the kernels
// on the device of query.
#pragma once

#include "csrc/core/checks.h"
#include "csrc/core/stable_compat.h"
#include "csrc/ops/attention/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace ptk {

inline constexpr int64_t kMaxHeadDim = 512;

using Shape3 = std::array<int64_t, 3>;
using Shape4 = std::array<int64_t, 4>;

template <typename Backend>
void check_device(const char* name, const Tensor& tensor, const Tensor& query) {
  PTK_CHECK(Backend::owns(tensor) && tensor.get_device_index() == query.get_device_index(), "attention: ", name,
            ": got a tensor on another device, expected it on the ", Backend::kDevice, " device of query");
}

void check_shape(const char* name, const Tensor& tensor, const auto& expected) {
  PTK_CHECK(std::ranges::equal(tensor.sizes(), expected), "attention: ", name, ": got shape ",
            shape_text(tensor.sizes()), ", expected ", shape_text(expected));
}

inline void check_dtype(const char* name, const Tensor& tensor, DType expected) {
  const std::optional<DType> dtype = float_dtype(tensor);
  PTK_CHECK(dtype == expected, "attention: ", name, ": got ", dtype ? dtype_name(*dtype) : "another dtype",
            ", expected ", dtype_name(expected));
}

inline ConstView view(const Tensor& tensor) {
  ConstView v;
  v.data = tensor.const_data_ptr();
  std::ranges::copy(tensor.strides(), v.strides);
  return v;
}

inline View mutable_view(const Tensor& tensor) {
  View v;
  v.data = tensor.mutable_data_ptr();
  std::ranges::copy(tensor.strides(), v.strides);
  return v;
}

inline Shape4 query_shape(const Problem& p) {
  return {p.batch, p.heads_q, p.len_q, p.dim_qk};
}
inline Shape4 key_shape(const Problem& p) {
  return {p.batch, p.heads_kv, p.len_k, p.dim_qk};
}
inline Shape4 value_shape(const Problem& p) {
  return {p.batch, p.heads_kv, p.len_k, p.dim_v};
}
inline Shape4 out_shape(const Problem& p) {
  return {p.batch, p.heads_q, p.len_q, p.dim_v};
}
inline Shape3 lse_shape(const Problem& p) {
  return {p.batch, p.heads_q, p.len_q};
}
inline DType lse_dtype(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

// The mask has one element per block of `block` rows and as many keys.
inline void set_mask(Problem& p, const Tensor& mask, int64_t block) {
  const std::optional<DType> dtype = float_dtype(mask);
  PTK_CHECK(is_bool(mask) || dtype == p.dtype || dtype == DType::f32, "attention: attn_mask: got ",
            dtype ? dtype_name(*dtype) : "another dtype", ", expected bool, float32 or ", dtype_name(p.dtype));
  p.mask_kind = is_bool(mask) ? MaskKind::boolean : dtype == p.dtype ? MaskKind::same_dtype : MaskKind::f32;

  PTK_CHECK(block == 1 || (block > 1 && is_bool(mask)), "attention: mask_block_size: got ", block,
            is_bool(mask) ? ", expected 1 or more" : ", expected 1 where attn_mask is not boolean");
  // No more than the lengths, which is the same and cannot overflow.
  p.mask_block = std::min(block, std::max({p.len_q, p.len_k, int64_t{1}}));

  const auto blocks = [&](int64_t length) { return length / block + (length % block != 0); };
  const Shape4 full = {p.batch, p.heads_q, blocks(p.len_q), blocks(p.len_k)};
  const auto sizes = mask.sizes();
  const auto strides = mask.strides();
  const size_t rank = sizes.size();
  bool broadcastable = rank <= 4;
  for (size_t i = 0; broadcastable && i < rank; ++i) {
    const size_t axis = 4 - rank + i;
    broadcastable = sizes[i] == 1 || sizes[i] == full[axis];
    p.mask.strides[axis] = sizes[i] == 1 ? 0 : strides[i];
  }
  PTK_CHECK(broadcastable, "attention: attn_mask: got shape ", shape_text(sizes), ", expected one broadcastable to ",
            shape_text(full));
  p.mask.data = mask.const_data_ptr();
}

// What a call says beyond its operands.
struct Options {
  std::optional<Tensor> attn_mask;
  bool is_causal = false;
  std::optional<double> scale;
  std::optional<Tensor> alibi_slopes, sinks, dropout_seed;
  int64_t window_left = -1;
  int64_t window_right = -1;
  bool bottom_right = false;
  double softcap = 0;
  double dropout_p = 0;
  std::optional<Tensor> relative_bias = std::nullopt;
  int64_t mask_block = 1;
};

inline int64_t window_side(const char* name, int64_t value) {
  PTK_CHECK(value >= -1, "attention: window: got ", name, " ", value, ", expected -1 (unbounded) or more");
  return value < 0 ? kUnbounded : std::min(value, kUnbounded);
}

template <typename Backend>
HeadValues head_values(const char* name, const Tensor& tensor, const Tensor& query, const Problem& p) {
  check_device<Backend>(name, tensor, query);
  check_dtype(name, tensor, lse_dtype(p.dtype));
  const auto sizes = tensor.sizes();
  const bool per_batch = sizes.size() == 2;
  PTK_CHECK(per_batch ? sizes[0] == p.batch && sizes[1] == p.heads_q : sizes.size() == 1 && sizes[0] == p.heads_q,
            "attention: ", name, ": got shape ", shape_text(sizes), ", expected [", p.heads_q, "] or [", p.batch, ", ",
            p.heads_q, "]");
  return {tensor.const_data_ptr(), {per_batch ? tensor.stride(0) : 0, tensor.stride(per_batch ? 1 : 0)}};
}

// Made for so many queries and keys. The tensor becomes contiguous in its last dimension.
template <typename Backend>
void set_relative_bias(Problem& p, Tensor& tensor, const Tensor& query, int64_t queries, int64_t keys) {
  PTK_CHECK(
      requires { Backend::kHasRelativeBias; }, "attention: relative_bias: got a value, expected none on ",
      Backend::kDevice, ", which has no kernel for it");
  check_device<Backend>("relative_bias", tensor, query);
  check_dtype("relative_bias", tensor, lse_dtype(p.dtype));
  const auto sizes = tensor.sizes();
  const int64_t distances = std::max<int64_t>(queries + keys - 1, 0);
  const bool per_batch = sizes.size() == 3;
  const bool fits = (per_batch ? sizes[0] == p.batch : sizes.size() == 2) && tensor.size(-2) == p.heads_q &&
                    tensor.size(-1) == distances;
  PTK_CHECK(fits, "attention: relative_bias: got shape ", shape_text(sizes), ", expected [", p.heads_q, ", ", distances,
            "] or [", p.batch, ", ", p.heads_q, ", ", distances, "]");
  if (tensor.stride(-1) != 1) {
    tensor = torch::stable::contiguous(tensor);
  }
  p.distances = distances;
  p.distance_zero = queries - 1;
  p.relative_bias = {tensor.const_data_ptr(), {per_batch ? tensor.stride(0) : 0, tensor.stride(-2)}};
}

// A probability of 1 keeps nothing: the seed no longer matters, and out is sums of nothing.
inline void set_dropout(Problem& p, Options& options) {
  PTK_CHECK(0 <= options.dropout_p && options.dropout_p <= 1, "attention: dropout_p: got ", options.dropout_p,
            ", expected a probability from 0 to 1");
  p.keep_below = static_cast<uint32_t>(std::nearbyint((1 - options.dropout_p) * Problem::kKeepAll));
  if (p.keep_below == Problem::kKeepAll) {
    return;
  }
  PTK_CHECK(options.dropout_seed && options.dropout_seed->is_cpu() && is_int64(*options.dropout_seed),
            "attention: dropout_seed: got none, or another device or dtype, expected an int64 tensor on the cpu");
  const int64_t seeds = options.dropout_seed->numel();
  PTK_CHECK(options.dropout_seed->dim() <= 1 && seeds > 0 && p.batch % seeds == 0,
            "attention: dropout_seed: got shape ", shape_text(options.dropout_seed->sizes()),
            ", expected [] or [a divisor of the batch size]");
  options.dropout_seed = torch::stable::contiguous(*options.dropout_seed);
  p.seeds = static_cast<const int64_t*>(options.dropout_seed->const_data_ptr());
  p.batch_per_seed = p.batch / seeds;
}

// Everything of a problem but its sizes and its mask.
template <typename Backend>
void set_options(Problem& p, const Tensor& query, Options& options) {
  p.scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.dim_qk)));
  PTK_CHECK(std::isfinite(p.scale), "attention: scale: got ", p.scale, ", expected a finite number");
  PTK_CHECK(std::isfinite(options.softcap) && options.softcap >= 0, "attention: softcap: got ", options.softcap,
            ", expected a finite number, 0 or more");
  p.softcap = options.softcap;
  p.is_causal = options.is_causal;
  p.left = window_side("left", options.window_left);
  p.right = window_side("right", options.window_right);
  p.bottom_right = options.bottom_right;
  if (options.alibi_slopes) {
    p.alibi = head_values<Backend>("alibi_slopes", *options.alibi_slopes, query, p);
  }
  if (options.sinks) {
    p.sinks = head_values<Backend>("sinks", *options.sinks, query, p);
  }
  set_dropout(p, options);
}

inline void check_heads_and_dims(const Problem& p) {
  PTK_CHECK(p.heads_kv == 0 ? p.heads_q == 0 : p.heads_q % p.heads_kv == 0, "attention: key: got ", p.heads_kv,
            " heads, expected a divisor of query's ", p.heads_q);
  PTK_CHECK(1 <= p.dim_qk && p.dim_qk <= kMaxHeadDim, "attention: query: got head dim ", p.dim_qk, ", expected 1 to ",
            kMaxHeadDim);
  PTK_CHECK(1 <= p.dim_v && p.dim_v <= kMaxHeadDim, "attention: value: got head dim ", p.dim_v, ", expected 1 to ",
            kMaxHeadDim);
}

template <typename Backend>
DType check_operands(const Tensor& query, const Tensor& key, const Tensor& value, int64_t rank, const char* form) {
  const auto check_operand = [&](const char* name, const Tensor& tensor) {
    check_device<Backend>(name, tensor, query);
    PTK_CHECK(tensor.dim() == rank, "attention: ", name, ": got ", tensor.dim(), " dimensions, expected ", rank, ": ",
              form);
  };
  check_operand("query", query);
  check_operand("key", key);
  check_operand("value", value);

  const std::optional<DType> dtype = float_dtype(query);
  PTK_CHECK(dtype, "attention: query: got another dtype, expected float64, float32, bfloat16 or float16");
  check_dtype("key", key, *dtype);
  check_dtype("value", value, *dtype);
  return *dtype;
}

template <typename Backend>
Problem make_problem(const Tensor& query, const Tensor& key, const Tensor& value, Options& options) {
  Problem p;
  p.dtype = check_operands<Backend>(query, key, value, 4, "[batch, heads, length, dim]");
  p.batch = query.size(0);
  p.heads_q = query.size(1);
  p.len_q = query.size(2);
  p.dim_qk = query.size(3);
  p.heads_kv = key.size(1);
  p.len_k = key.size(2);
  p.dim_v = value.size(3);
  check_shape("key", key, key_shape(p));
  check_shape("value", value, value_shape(p));
  check_heads_and_dims(p);
  set_options<Backend>(p, query, options);
  PTK_CHECK(options.mask_block == 1 || options.attn_mask, "attention: mask_block_size: got ", options.mask_block,
            ", expected 1 without attn_mask");
  if (options.attn_mask) {
    check_device<Backend>("attn_mask", *options.attn_mask, query);
    PTK_CHECK(
        options.mask_block == 1 || requires { Backend::kHasBlockMask; }, "attention: mask_block_size: got ",
        options.mask_block, ", expected 1 on ", Backend::kDevice, ", which has no kernel for masks of blocks");
    set_mask(p, *options.attn_mask, options.mask_block);
  }
  if (options.relative_bias) {
    set_relative_bias<Backend>(p, *options.relative_bias, query, p.len_q, p.len_k);
  }
  return p;
}

// No rows, or rows without a key or a sink.
inline bool is_empty(const Problem& p) {
  return p.batch == 0 || p.heads_q == 0 || p.len_q == 0 || (p.len_k == 0 && !p.sinks.data);
}

// Shape [batch, heads, length, dim] over memory [batch, length, heads, dim]: the layout in which out.transpose(1,
// 2).reshape(batch, length, heads * dim), the usual next step, copies nothing.
inline Tensor empty_heads_inside(const Tensor& like, const Shape4& shape, DType dtype) {
  const auto [batch, heads, length, dim] = shape;
  const int64_t row = std::max<int64_t>(dim, 1);
  const int64_t token = row * std::max<int64_t>(heads, 1);
  return empty_strided<4>(like, shape, {token * std::max<int64_t>(length, 1), row, token, 1}, dtype);
}

inline Tensor empty_lse(const Tensor& like, const Problem& p) {
  const int64_t head = std::max<int64_t>(p.len_q, 1);
  return empty_strided<3>(like, lse_shape(p), {head * std::max<int64_t>(p.heads_q, 1), head, 1}, lse_dtype(p.dtype));
}

template <typename Backend>
std::tuple<Tensor, Tensor>
attention_forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, bool is_causal,
                  std::optional<double> scale, std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                  std::optional<Tensor> dropout_seed, int64_t window_left, int64_t window_right, bool bottom_right,
                  double softcap, double dropout_p, std::optional<Tensor> relative_bias, int64_t mask_block) {
  Options options{attn_mask,    is_causal,    scale,   alibi_slopes, sinks,         dropout_seed, window_left,
                  window_right, bottom_right, softcap, dropout_p,    relative_bias, mask_block};
  const Problem p = make_problem<Backend>(query, key, value, options);
  Tensor out = empty_heads_inside(query, out_shape(p), p.dtype);
  Tensor lse = empty_lse(query, p);
  if (is_empty(p)) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  ForwardParams params;
  params.problem = p;
  params.query = view(query);
  params.key = view(key);
  params.value = view(value);
  params.out = mutable_view(out);
  params.lse = lse.mutable_data_ptr();
  Backend::forward(params, query);
  return {out, lse};
}

// In the order of output_mask: query, key, value, attn_mask, alibi_slopes, sinks, relative_bias.
using Gradients = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
                             std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

inline std::vector<bool> which_gradients(std::vector<bool> output_mask) {
  PTK_CHECK(3 <= output_mask.size() && output_mask.size() <= 7, "attention: output_mask: got ", output_mask.size(),
            " entries, expected 3 to 7");
  output_mask.resize(7);
  return output_mask;
}

// Where the gradient of something added to the scores goes: contiguous, of the shape of `of`, in the dtype of lse.
inline std::optional<Tensor> zeros_like_addend(bool wanted, const char* name, const std::optional<Tensor>& of,
                                               const Problem& p) {
  if (!wanted) {
    return std::nullopt;
  }
  PTK_CHECK(of && !is_bool(*of), "attention: output_mask: got true for ", name, ", which has no gradient");
  const auto dtype =
      lse_dtype(p.dtype) == DType::f64 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  return torch::stable::new_zeros(*of, of->sizes(), dtype);
}

// A view of such a gradient, aligned to the last of `axes` dimensions, with stride 0 where it is summed over.
inline View summing_view(const std::optional<Tensor>& tensor, int64_t axes) {
  View v;
  if (tensor) {
    v.data = tensor->mutable_data_ptr();
    for (int64_t i = 0; i < tensor->dim(); ++i) {
      v.strides[axes - tensor->dim() + i] = tensor->size(i) == 1 ? 0 : tensor->stride(i);
    }
  }
  return v;
}

template <typename Backend>
Gradients
attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor out,
                   Tensor lse, std::optional<Tensor> attn_mask, bool is_causal, std::optional<double> scale,
                   std::vector<bool> output_mask, std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                   std::optional<Tensor> dropout_seed, int64_t window_left, int64_t window_right, bool bottom_right,
                   double softcap, double dropout_p, std::optional<Tensor> relative_bias, int64_t mask_block) {
  Options options{attn_mask,    is_causal,    scale,   alibi_slopes, sinks,         dropout_seed, window_left,
                  window_right, bottom_right, softcap, dropout_p,    relative_bias, mask_block};
  const Problem p = make_problem<Backend>(query, key, value, options);
  const auto check_given = [&](const char* name, const Tensor& tensor, const auto& shape, DType dtype) {
    check_device<Backend>(name, tensor, query);
    check_dtype(name, tensor, dtype);
    check_shape(name, tensor, shape);
  };
  check_given("grad_out", grad_out, out_shape(p), p.dtype);
  check_given("out", out, out_shape(p), p.dtype);
  check_given("lse", lse, lse_shape(p), lse_dtype(p.dtype));
  if (grad_lse) {
    check_given("grad_lse", *grad_lse, lse_shape(p), lse_dtype(p.dtype));
    grad_lse = torch::stable::contiguous(*grad_lse);
  }
  lse = torch::stable::contiguous(lse);
  output_mask = which_gradients(output_mask);

  const auto gradient = [&](bool wanted, const Shape4& shape) {
    return wanted ? std::optional(empty_heads_inside(query, shape, p.dtype)) : std::nullopt;
  };
  std::optional<Tensor> grad_query = gradient(output_mask[0], query_shape(p));
  std::optional<Tensor> grad_key = gradient(output_mask[1], key_shape(p));
  std::optional<Tensor> grad_value = gradient(output_mask[2], value_shape(p));
  const std::optional<Tensor> grad_mask = zeros_like_addend(output_mask[3], "attn_mask", attn_mask, p);
  const std::optional<Tensor> grad_alibi = zeros_like_addend(output_mask[4], "alibi_slopes", alibi_slopes, p);
  const std::optional<Tensor> grad_sinks = zeros_like_addend(output_mask[5], "sinks", sinks, p);
  const std::optional<Tensor> grad_relative = zeros_like_addend(output_mask[6], "relative_bias", relative_bias, p);
  const Gradients gradients{grad_query, grad_key, grad_value, grad_mask, grad_alibi, grad_sinks, grad_relative};
  if (is_empty(p)) {
    for (auto* grad : {&grad_query, &grad_key, &grad_value}) {
      if (*grad) {
        torch::stable::zero_(**grad);
      }
    }
    return gradients;
  }
  if (std::ranges::none_of(output_mask, [](bool wanted) { return wanted; })) {
    return gradients;
  }
  const auto optional_view = [](const std::optional<Tensor>& tensor) {
    return tensor ? mutable_view(*tensor) : View{};
  };
  BackwardParams params;
  params.problem = p;
  params.grad_out = view(grad_out);
  params.grad_lse = grad_lse ? grad_lse->const_data_ptr() : nullptr;
  params.query = view(query);
  params.key = view(key);
  params.value = view(value);
  params.out = view(out);
  params.lse = lse.const_data_ptr();
  params.grad_query = optional_view(grad_query);
  params.grad_key = optional_view(grad_key);
  params.grad_value = optional_view(grad_value);
  params.grad_mask = summing_view(grad_mask, 4);
  params.grad_alibi = summing_view(grad_alibi, 2);
  params.grad_sinks = summing_view(grad_sinks, 2);
  params.grad_relative = summing_view(grad_relative, 3);
  Backend::backward(params, query);
  return gradients;
}

}  // namespace ptk
