// Schema of attention and its CPU glue: validate, allocate, answer empty problems, call the kernel of the active ISA.
#include "csrc/ops/attention/attention.h"

#include "csrc/core/checks.h"
#include "csrc/core/stable_compat.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace ptk {
namespace {

constexpr int64_t kMaxHeadDim = 512;

using Shape3 = std::array<int64_t, 3>;
using Shape4 = std::array<int64_t, 4>;

void check_cpu(const char* name, const Tensor& tensor) {
  PTK_CHECK(tensor.is_cpu(), "attention: ", name, ": got a tensor on another device, expected it on the cpu like query");
}

void check_shape(const char* name, const Tensor& tensor, const auto& expected) {
  PTK_CHECK(std::ranges::equal(tensor.sizes(), expected), "attention: ", name, ": got shape ",
            shape_text(tensor.sizes()), ", expected ", shape_text(expected));
}

void check_dtype(const char* name, const Tensor& tensor, DType expected) {
  const std::optional<DType> dtype = float_dtype(tensor);
  PTK_CHECK(dtype == expected, "attention: ", name, ": got ", dtype ? dtype_name(*dtype) : "another dtype",
            ", expected ", dtype_name(expected));
}

ConstView view(const Tensor& tensor) {
  ConstView v;
  v.data = tensor.const_data_ptr();
  std::ranges::copy(tensor.strides(), v.strides);
  return v;
}

View mutable_view(const Tensor& tensor) {
  View v;
  v.data = tensor.mutable_data_ptr();
  std::ranges::copy(tensor.strides(), v.strides);
  return v;
}

Shape4 query_shape(const Problem& p) {
  return {p.batch, p.heads_q, p.len_q, p.dim_qk};
}
Shape4 key_shape(const Problem& p) {
  return {p.batch, p.heads_kv, p.len_k, p.dim_qk};
}
Shape4 value_shape(const Problem& p) {
  return {p.batch, p.heads_kv, p.len_k, p.dim_v};
}
Shape4 out_shape(const Problem& p) {
  return {p.batch, p.heads_q, p.len_q, p.dim_v};
}
Shape3 lse_shape(const Problem& p) {
  return {p.batch, p.heads_q, p.len_q};
}
DType lse_dtype(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

void set_mask(Problem& p, const Tensor& mask) {
  check_cpu("attn_mask", mask);
  const std::optional<DType> dtype = float_dtype(mask);
  PTK_CHECK(is_bool(mask) || dtype == p.dtype || dtype == DType::f32,
            "attention: attn_mask: got ", dtype ? dtype_name(*dtype) : "another dtype", ", expected bool, float32 or ",
            dtype_name(p.dtype));
  p.mask_kind = is_bool(mask) ? MaskKind::boolean : dtype == p.dtype ? MaskKind::same_dtype : MaskKind::f32;

  const Shape4 full = {p.batch, p.heads_q, p.len_q, p.len_k};
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

Problem make_problem(const Tensor& query, const Tensor& key, const Tensor& value,
                     const std::optional<Tensor>& attn_mask, bool is_causal, std::optional<double> scale) {
  const auto check_operand = [](const char* name, const Tensor& tensor) {
    check_cpu(name, tensor);
    PTK_CHECK(tensor.dim() == 4, "attention: ", name, ": got ", tensor.dim(),
              " dimensions, expected 4: [batch, heads, length, dim]");
  };
  check_operand("query", query);
  check_operand("key", key);
  check_operand("value", value);

  const std::optional<DType> dtype = float_dtype(query);
  PTK_CHECK(dtype, "attention: query: got another dtype, expected float64, float32, bfloat16 or float16");
  check_dtype("key", key, *dtype);
  check_dtype("value", value, *dtype);

  Problem p;
  p.dtype = *dtype;
  p.batch = query.size(0);
  p.heads_q = query.size(1);
  p.len_q = query.size(2);
  p.dim_qk = query.size(3);
  p.heads_kv = key.size(1);
  p.len_k = key.size(2);
  p.dim_v = value.size(3);
  check_shape("key", key, key_shape(p));
  check_shape("value", value, value_shape(p));
  PTK_CHECK(p.heads_kv == 0 ? p.heads_q == 0 : p.heads_q % p.heads_kv == 0, "attention: key: got ", p.heads_kv,
            " heads, expected a divisor of query's ", p.heads_q);
  PTK_CHECK(1 <= p.dim_qk && p.dim_qk <= kMaxHeadDim, "attention: query: got head dim ", p.dim_qk, ", expected 1 to ",
            kMaxHeadDim);
  PTK_CHECK(1 <= p.dim_v && p.dim_v <= kMaxHeadDim, "attention: value: got head dim ", p.dim_v, ", expected 1 to ",
            kMaxHeadDim);

  p.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(p.dim_qk)));
  PTK_CHECK(std::isfinite(p.scale), "attention: scale: got ", p.scale, ", expected a finite number");
  p.is_causal = is_causal;
  if (attn_mask) {
    set_mask(p, *attn_mask);
  }
  return p;
}

bool is_empty(const Problem& p) {
  return p.batch == 0 || p.heads_q == 0 || p.len_q == 0 || p.len_k == 0;
}

// Shape [batch, heads, length, dim] over memory [batch, length, heads, dim]: the layout in which
// out.transpose(1, 2).reshape(batch, length, heads * dim), the usual next step, copies nothing.
Tensor empty_heads_inside(const Tensor& like, const Shape4& shape, DType dtype) {
  const auto [batch, heads, length, dim] = shape;
  const int64_t row = std::max<int64_t>(dim, 1);
  const int64_t token = row * std::max<int64_t>(heads, 1);
  return empty_strided<4>(like, shape, {token * std::max<int64_t>(length, 1), row, token, 1}, dtype);
}

Tensor empty_lse(const Tensor& like, const Problem& p) {
  const int64_t head = std::max<int64_t>(p.len_q, 1);
  return empty_strided<3>(like, lse_shape(p), {head * std::max<int64_t>(p.heads_q, 1), head, 1}, lse_dtype(p.dtype));
}

// Only for tensors allocated here: dense, and all-zero bytes are 0 in every dtype.
void fill_zero(const Tensor& tensor) {
  if (tensor.numel() > 0) {
    std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
  }
}

std::tuple<Tensor, Tensor> attention_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask,
                                         bool is_causal, std::optional<double> scale) {
  const Problem p = make_problem(query, key, value, attn_mask, is_causal, scale);
  Tensor out = empty_heads_inside(query, out_shape(p), p.dtype);
  Tensor lse = empty_lse(query, p);
  if (is_empty(p)) {
    fill_zero(out);
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
  PTK_CHECK(PTK_DISPATCH(attention_kernels).forward(params), "attention: out of memory");
  return {out, lse};
}

using OptionalTensors3 = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

OptionalTensors3 attention_backward_cpu(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key,
                                        Tensor value, Tensor out, Tensor lse, std::optional<Tensor> attn_mask,
                                        bool is_causal, std::optional<double> scale, std::vector<bool> output_mask) {
  const Problem p = make_problem(query, key, value, attn_mask, is_causal, scale);
  const auto check_given = [&](const char* name, const Tensor& tensor, const auto& shape, DType dtype) {
    check_cpu(name, tensor);
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
  PTK_CHECK(output_mask.size() == 3, "attention: output_mask: got ", output_mask.size(), " entries, expected 3");

  const auto gradient = [&](bool wanted, const Shape4& shape) {
    return wanted ? std::optional(empty_heads_inside(query, shape, p.dtype)) : std::nullopt;
  };
  const std::optional<Tensor> grad_query = gradient(output_mask[0], query_shape(p));
  const std::optional<Tensor> grad_key = gradient(output_mask[1], key_shape(p));
  const std::optional<Tensor> grad_value = gradient(output_mask[2], value_shape(p));
  const OptionalTensors3 gradients{grad_query, grad_key, grad_value};
  if (is_empty(p)) {
    for (const auto* grad : {&grad_query, &grad_key, &grad_value}) {
      if (*grad) {
        fill_zero(**grad);
      }
    }
    return gradients;
  }
  if (!grad_query && !grad_key && !grad_value) {
    return gradients;
  }
  const auto optional_view = [](const std::optional<Tensor>& tensor) { return tensor ? mutable_view(*tensor) : View{}; };
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
  PTK_CHECK(PTK_DISPATCH(attention_kernels).backward(params), "attention: out of memory");
  return gradients;
}

}  // namespace

const char* attention_kernel_name(const Problem& problem) {
  return PTK_DISPATCH(attention_kernels).describe(problem);
}

}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, "
              "float? scale=None) -> (Tensor, Tensor)");
  library.def("_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
              "Tensor out, Tensor lse, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
              "bool[3] output_mask=[True, True, True]) -> (Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("attention", TORCH_BOX(&ptk::attention_cpu));
  library.impl("_attention_backward", TORCH_BOX(&ptk::attention_backward_cpu));
}
