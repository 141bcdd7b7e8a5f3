// Torch glue of attention over packed sequences, the same for every backend: see attention_glue.h.
#pragma once

#include "csrc/ops/attention/attention_glue.h"

namespace ptk {

// The first row of every sequence, and behind the last; and the longest of them.
struct Offsets {
  std::vector<int64_t> first;
  int64_t longest = 0;
};

inline Offsets read_offsets(const char* name, const Tensor& given, int64_t tokens) {
  PTK_CHECK(is_int64(given) || is_int32(given), "attention_varlen: ", name,
            ": got another dtype, expected int32 or int64");
  const Tensor cu_seqlens = on_cpu(given);
  PTK_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "attention_varlen: ", name, ": got shape ",
            shape_text(cu_seqlens.sizes()), ", expected [sequences + 1]");
  Offsets offsets;
  const int64_t stride = cu_seqlens.stride(0);
  for (int64_t i = 0; i < cu_seqlens.size(0); ++i) {
    const void* data = cu_seqlens.const_data_ptr();
    offsets.first.push_back(is_int64(cu_seqlens) ? static_cast<const int64_t*>(data)[i * stride]
                                                 : static_cast<const int32_t*>(data)[i * stride]);
  }
  PTK_CHECK(offsets.first.front() == 0 && offsets.first.back() == tokens, "attention_varlen: ", name, ": got ",
            offsets.first.front(), " to ", offsets.first.back(), ", expected 0 to ", tokens, ", the number of tokens");
  for (size_t i = 1; i < offsets.first.size(); ++i) {
    const int64_t length = offsets.first[i] - offsets.first[i - 1];
    PTK_CHECK(length >= 0, "attention_varlen: ", name, ": got ", offsets.first[i], " after ", offsets.first[i - 1],
              ", expected numbers that do not fall");
    offsets.longest = std::max(offsets.longest, length);
  }
  return offsets;
}

// Negative: no bound is given.
inline void check_longest(const char* name, int64_t given, int64_t longest) {
  PTK_CHECK(given < 0 || given >= longest, "attention_varlen: ", name, ": got ", given, ", expected at least ", longest,
            ", the longest sequence");
}

// A [tokens, heads, dim] tensor as what the kernels read: no batch, sequences told apart by their first rows.
template <typename AnyView>
AnyView packed_view(AnyView v) {
  const Shape4 strides = {0, v.strides[1], v.strides[0], v.strides[2]};
  std::ranges::copy(strides, v.strides);
  return v;
}

struct PackedProblem {
  Problem problem;
  Offsets q, k;
};

template <typename Backend>
void make_packed_problem(PackedProblem& packed, const Tensor& query, const Tensor& key, const Tensor& value,
                         const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                         int64_t max_seqlen_k, Options& options) {
  Problem& p = packed.problem;
  p.dtype = check_operands<Backend>(query, key, value, 3, "[tokens, heads, dim]");
  p.heads_q = query.size(1);
  p.heads_kv = key.size(1);
  p.dim_qk = query.size(2);
  p.dim_v = value.size(2);
  check_shape("key", key, Shape3{key.size(0), p.heads_kv, p.dim_qk});
  check_shape("value", value, Shape3{key.size(0), p.heads_kv, p.dim_v});
  check_heads_and_dims(p);
  packed.q = read_offsets("cu_seqlens_q", cu_seqlens_q, query.size(0));
  packed.k = read_offsets("cu_seqlens_k", cu_seqlens_k, key.size(0));
  PTK_CHECK(packed.q.first.size() == packed.k.first.size(), "attention_varlen: cu_seqlens_k: got ",
            packed.k.first.size() - 1, " sequences, expected ", packed.q.first.size() - 1, " like cu_seqlens_q");
  check_longest("max_seqlen_q", max_seqlen_q, packed.q.longest);
  check_longest("max_seqlen_k", max_seqlen_k, packed.k.longest);
  p.batch = static_cast<int64_t>(packed.q.first.size()) - 1;
  p.len_q = packed.q.longest;
  p.len_k = packed.k.longest;
  p.first_q = packed.q.first.data();
  p.first_k = packed.k.first.data();
  p.total_q = query.size(0);
  set_options<Backend>(p, query, options);
  if (options.relative_bias) {
    PTK_CHECK(max_seqlen_q >= 0 && max_seqlen_k >= 0,
              "attention_varlen: relative_bias: got a value without "
              "max_seqlen_q and max_seqlen_k, expected both: they say which number belongs to which distance");
    set_relative_bias<Backend>(p, *options.relative_bias, query, max_seqlen_q, max_seqlen_k);
  }
}

inline Tensor empty_packed(const Tensor& like, int64_t tokens, int64_t heads, int64_t dim, DType dtype) {
  const int64_t row = std::max<int64_t>(dim, 1);
  return empty_strided<3>(like, {tokens, heads, dim}, {row * std::max<int64_t>(heads, 1), row, 1}, dtype);
}

inline ConstView viewed(const Tensor& tensor) {
  ConstView v;
  v.data = tensor.const_data_ptr();
  std::ranges::copy(tensor.strides(), v.strides);
  return packed_view(v);
}

inline View mutable_viewed(const std::optional<Tensor>& tensor) {
  View v;
  if (tensor) {
    v.data = tensor->mutable_data_ptr();
    std::ranges::copy(tensor->strides(), v.strides);
  }
  return packed_view(v);
}

template <typename Backend>
std::tuple<Tensor, Tensor>
varlen_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q,
               int64_t max_seqlen_k, bool is_causal, std::optional<double> scale, std::optional<Tensor> alibi_slopes,
               std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed, int64_t window_left,
               int64_t window_right, bool bottom_right, double softcap, double dropout_p,
               std::optional<Tensor> relative_bias) {
  Options options{std::nullopt, is_causal,    scale,        alibi_slopes, sinks,     dropout_seed,
                  window_left,  window_right, bottom_right, softcap,      dropout_p, relative_bias};
  PackedProblem packed;
  make_packed_problem<Backend>(packed, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               options);
  const Problem& p = packed.problem;
  Tensor out = empty_packed(query, p.total_q, p.heads_q, p.dim_v, p.dtype);
  Tensor lse =
      empty_strided<2>(query, {p.heads_q, p.total_q}, {std::max<int64_t>(p.total_q, 1), 1}, lse_dtype(p.dtype));
  if (is_empty(p)) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  ForwardParams params;
  params.problem = p;
  params.query = viewed(query);
  params.key = viewed(key);
  params.value = viewed(value);
  params.out = mutable_viewed(out);
  params.lse = lse.mutable_data_ptr();
  Backend::forward(params, query);
  return {out, lse};
}

// In the order of output_mask: query, key, value, alibi_slopes, sinks, relative_bias.
using PackedGradients = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
                                   std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

template <typename Backend>
PackedGradients varlen_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
                                Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q,
                                int64_t max_seqlen_k, std::vector<bool> output_mask, bool is_causal,
                                std::optional<double> scale, std::optional<Tensor> alibi_slopes,
                                std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed, int64_t window_left,
                                int64_t window_right, bool bottom_right, double softcap, double dropout_p,
                                std::optional<Tensor> relative_bias) {
  Options options{std::nullopt, is_causal,    scale,        alibi_slopes, sinks,     dropout_seed,
                  window_left,  window_right, bottom_right, softcap,      dropout_p, relative_bias};
  PackedProblem packed;
  make_packed_problem<Backend>(packed, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               options);
  const Problem& p = packed.problem;
  const Shape3 out_shape = {p.total_q, p.heads_q, p.dim_v};
  const std::array<int64_t, 2> lse_shape = {p.heads_q, p.total_q};
  const auto check_given = [&](const char* name, const Tensor& tensor, const auto& shape, DType dtype) {
    check_device<Backend>(name, tensor, query);
    check_dtype(name, tensor, dtype);
    check_shape(name, tensor, shape);
  };
  check_given("grad_out", grad_out, out_shape, p.dtype);
  check_given("out", out, out_shape, p.dtype);
  check_given("lse", lse, lse_shape, lse_dtype(p.dtype));
  if (grad_lse) {
    check_given("grad_lse", *grad_lse, lse_shape, lse_dtype(p.dtype));
    grad_lse = torch::stable::contiguous(*grad_lse);
  }
  lse = torch::stable::contiguous(lse);
  PTK_CHECK(output_mask.size() == 6, "attention_varlen: output_mask: got ", output_mask.size(), " entries, expected 6");

  const auto gradient = [&](bool wanted, const Tensor& of) {
    return wanted ? std::optional(empty_packed(of, of.size(0), of.size(1), of.size(2), p.dtype)) : std::nullopt;
  };
  std::optional<Tensor> grad_query = gradient(output_mask[0], query);
  std::optional<Tensor> grad_key = gradient(output_mask[1], key);
  std::optional<Tensor> grad_value = gradient(output_mask[2], value);
  const std::optional<Tensor> grad_alibi = zeros_like_addend(output_mask[3], "alibi_slopes", alibi_slopes, p);
  const std::optional<Tensor> grad_sinks = zeros_like_addend(output_mask[4], "sinks", sinks, p);
  const std::optional<Tensor> grad_relative = zeros_like_addend(output_mask[5], "relative_bias", relative_bias, p);
  const PackedGradients gradients{grad_query, grad_key, grad_value, grad_alibi, grad_sinks, grad_relative};
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
  BackwardParams params;
  params.problem = p;
  params.grad_out = viewed(grad_out);
  params.grad_lse = grad_lse ? grad_lse->const_data_ptr() : nullptr;
  params.query = viewed(query);
  params.key = viewed(key);
  params.value = viewed(value);
  params.out = viewed(out);
  params.lse = lse.const_data_ptr();
  params.grad_query = mutable_viewed(grad_query);
  params.grad_key = mutable_viewed(grad_key);
  params.grad_value = mutable_viewed(grad_value);
  params.grad_alibi = summing_view(grad_alibi, 2);
  params.grad_sinks = summing_view(grad_sinks, 2);
  params.grad_relative = summing_view(grad_relative, 3);
  Backend::backward(params, query);
  return gradients;
}

}  // namespace ptk
