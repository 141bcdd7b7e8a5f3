// Schemas of rotary embedding and their CPU implementation: checks, allocation, the kernel of the active ISA.
#include "csrc/ops/rotary_embedding/rotary_embedding.h"

#include "csrc/core/checks.h"
#include "csrc/core/stable_compat.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#define PTK_ROTARY_CHECK(condition, ...) PTK_CHECK(condition, "rotary_embedding: ", __VA_ARGS__)

namespace ptk {
namespace {

using OptionalTensor = std::optional<Tensor>;

ConstView view(const Tensor& tensor) {
  ConstView v;
  v.data = tensor.const_data_ptr();
  std::ranges::copy(tensor.strides(), v.strides);
  return v;
}

void check_on_cpu(const char* name, const Tensor& tensor) {
  PTK_ROTARY_CHECK(tensor.is_cpu(), name, ": got a tensor on another device, expected one on the cpu");
}

void check_dtype(const char* name, const Tensor& tensor, DType expected) {
  const std::optional<DType> dtype = float_dtype(tensor);
  PTK_ROTARY_CHECK(dtype == expected, name, ": got ", dtype ? dtype_name(*dtype) : "another dtype", ", expected ",
                   dtype_name(expected), " like query");
}

void set_operand(RotaryProblem& p, int which, const char* name, const Tensor& input) {
  check_on_cpu(name, input);
  check_dtype(name, input, p.dtype);
  PTK_ROTARY_CHECK(input.dim() == 4, name, ": got ", input.dim(),
                   " dimensions, expected 4: [batch, heads, length, dim]");
  PTK_ROTARY_CHECK(input.size(0) == p.batch && input.size(2) == p.length && input.size(3) == p.dim, name,
                   ": got shape ", shape_text(input.sizes()), ", expected [", p.batch, ", heads, ", p.length, ", ",
                   p.dim, "] like query");
  p.operands[which].heads = input.size(1);
  p.operands[which].input = view(input);
}

void set_weight(RotaryProblem& p, int which, const char* name, OptionalTensor& weight) {
  if (!weight) {
    return;
  }
  check_on_cpu(name, *weight);
  check_dtype(name, *weight, p.dtype);
  PTK_ROTARY_CHECK(weight->dim() == 1 && weight->size(0) == p.dim, name, ": got shape ", shape_text(weight->sizes()),
                   ", expected [", p.dim, "]");
  weight = torch::stable::contiguous(*weight);
  p.operands[which].weight = weight->const_data_ptr();
}

void set_tables(RotaryProblem& p, const Tensor& cos, const Tensor& sin) {
  check_on_cpu("cos", cos);
  check_on_cpu("sin", sin);
  const std::optional<DType> dtype = float_dtype(cos);
  PTK_ROTARY_CHECK(dtype && dtype == float_dtype(sin), "sin: got another dtype, expected a floating one like cos");
  PTK_ROTARY_CHECK(cos.dim() == 2 && 2 * cos.size(1) <= p.dim, "cos: got shape ", shape_text(cos.sizes()),
                   ", expected [positions, up to ", p.dim / 2, "]");
  PTK_ROTARY_CHECK(std::ranges::equal(sin.sizes(), cos.sizes()), "sin: got shape ", shape_text(sin.sizes()),
                   ", expected ", shape_text(cos.sizes()), " like cos");
  p.table_dtype = *dtype;
  p.rotary_dim = 2 * cos.size(1);
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  std::ranges::copy(cos.strides(), p.cos_strides);
  std::ranges::copy(sin.strides(), p.sin_strides);
}

void set_positions(RotaryProblem& p, const OptionalTensor& positions, int64_t rows) {
  if (!positions) {
    PTK_ROTARY_CHECK(p.length <= rows, "cos: got ", rows, " positions, expected at least ", p.length,
                     ", the length of query");
    return;
  }
  check_on_cpu("positions", *positions);
  PTK_ROTARY_CHECK(is_int64(*positions), "positions: got another dtype, expected int64");
  const bool per_batch = positions->dim() == 2;
  PTK_ROTARY_CHECK(per_batch ? positions->size(0) == p.batch && positions->size(1) == p.length
                             : positions->dim() == 1 && positions->size(0) == p.length,
                   "positions: got shape ", shape_text(positions->sizes()), ", expected [", p.length, "] or [", p.batch,
                   ", ", p.length, "]");
  p.positions = static_cast<const int64_t*>(positions->const_data_ptr());
  p.position_strides[0] = per_batch ? positions->stride(0) : 0;
  p.position_strides[1] = positions->stride(per_batch ? 1 : 0);
  for (int64_t b = 0; b < (per_batch ? p.batch : 1); ++b) {
    for (int64_t i = 0; i < p.length; ++i) {
      const int64_t position = p.positions[b * p.position_strides[0] + i * p.position_strides[1]];
      PTK_ROTARY_CHECK(0 <= position && position < rows, "positions: got ", position, ", expected 0 to ", rows - 1,
                       ", the rows of cos");
    }
  }
}

// Weights become contiguous.
RotaryProblem make_problem(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                           const OptionalTensor& positions, OptionalTensor& query_norm_weight,
                           OptionalTensor& key_norm_weight, bool interleaved, double norm_eps) {
  RotaryProblem p;
  const std::optional<DType> dtype = float_dtype(query);
  PTK_ROTARY_CHECK(dtype, "query: got another dtype, expected float64, float32, bfloat16 or float16");
  PTK_ROTARY_CHECK(query.dim() == 4, "query: got ", query.dim(),
                   " dimensions, expected 4: [batch, heads, length, dim]");
  PTK_ROTARY_CHECK(std::isfinite(norm_eps) && norm_eps >= 0, "norm_eps: got ", norm_eps, ", expected 0 or more");
  p.dtype = *dtype;
  p.batch = query.size(0);
  p.length = query.size(2);
  p.dim = query.size(3);
  p.interleaved = interleaved;
  p.eps = norm_eps;
  set_operand(p, 0, "query", query);
  set_operand(p, 1, "key", key);
  set_tables(p, cos, sin);
  set_positions(p, positions, cos.size(0));
  set_weight(p, 0, "query_norm_weight", query_norm_weight);
  set_weight(p, 1, "key_norm_weight", key_norm_weight);
  return p;
}

bool is_empty(const RotaryProblem& p) {
  return p.batch * p.length * p.dim * (p.operands[0].heads + p.operands[1].heads) == 0;
}

// Shape [batch, heads, length, dim] over memory [batch, length, heads, dim]: where projections have put the operands,
// and what the projection after attention reads without a copy.
Tensor empty_heads_inside(const Tensor& like, DType dtype) {
  const std::array<int64_t, 4> shape = {like.size(0), like.size(1), like.size(2), like.size(3)};
  const int64_t row = std::max<int64_t>(shape[3], 1), token = row * std::max<int64_t>(shape[1], 1);
  return empty_strided<4>(like, shape, {token * std::max<int64_t>(shape[2], 1), row, token, 1}, dtype);
}

void set_out(RotaryOperand& operand, const Tensor& out) {
  operand.out.data = out.mutable_data_ptr();
  std::ranges::copy(out.strides(), operand.out.strides);
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor cos, Tensor sin, OptionalTensor positions,
                                   OptionalTensor query_norm_weight, OptionalTensor key_norm_weight, bool interleaved,
                                   double norm_eps) {
  RotaryProblem p =
      make_problem(query, key, cos, sin, positions, query_norm_weight, key_norm_weight, interleaved, norm_eps);
  Tensor query_out = empty_heads_inside(query, p.dtype), key_out = empty_heads_inside(key, p.dtype);
  set_out(p.operands[0], query_out);
  set_out(p.operands[1], key_out);
  PTK_ROTARY_CHECK(is_empty(p) || PTK_DISPATCH(rotary_kernels).forward(p), "out of memory");
  return {query_out, key_out};
}

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

// In the order of output_mask: query, key, query_norm_weight, key_norm_weight.
Gradients backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, Tensor cos, Tensor sin,
                   OptionalTensor positions, OptionalTensor query_norm_weight, OptionalTensor key_norm_weight,
                   bool interleaved, double norm_eps, std::vector<bool> output_mask) {
  RotaryProblem p =
      make_problem(query, key, cos, sin, positions, query_norm_weight, key_norm_weight, interleaved, norm_eps);
  PTK_ROTARY_CHECK(output_mask.size() == 4, "output_mask: got ", output_mask.size(), " entries, expected 4");
  const Tensor* grads[] = {&grad_query, &grad_key};
  const Tensor* inputs[] = {&query, &key};
  const OptionalTensor* weights[] = {&query_norm_weight, &key_norm_weight};
  const char* names[] = {"grad_query", "grad_key"};
  std::array<OptionalTensor, 4> results;
  for (int which = 0; which < 2; ++which) {
    check_on_cpu(names[which], *grads[which]);
    check_dtype(names[which], *grads[which], p.dtype);
    PTK_ROTARY_CHECK(std::ranges::equal(grads[which]->sizes(), inputs[which]->sizes()), names[which], ": got shape ",
                     shape_text(grads[which]->sizes()), ", expected ", shape_text(inputs[which]->sizes()));
    RotaryOperand& operand = p.operands[which];
    operand.grad_out = view(*grads[which]);
    if (output_mask[which]) {
      results[which] = empty_heads_inside(*inputs[which], p.dtype);
      set_out(operand, *results[which]);
    }
    if (output_mask[2 + which]) {
      PTK_ROTARY_CHECK(*weights[which], "output_mask: got true for a weight that the call does not have");
      results[2 + which] = torch::stable::new_zeros(**weights[which], (*weights[which])->sizes());
      operand.grad_weight = results[2 + which]->mutable_data_ptr();
    }
  }
  PTK_ROTARY_CHECK(is_empty(p) || PTK_DISPATCH(rotary_kernels).backward(p), "out of memory");
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace
}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("rotary_embedding(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? positions=None, "
              "Tensor? query_norm_weight=None, Tensor? key_norm_weight=None, bool interleaved=False, "
              "float norm_eps=1e-06) -> (Tensor, Tensor)");
  library.def("_rotary_embedding_backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, Tensor cos, "
              "Tensor sin, Tensor? positions, Tensor? query_norm_weight, Tensor? key_norm_weight, bool interleaved, "
              "float norm_eps, bool[] output_mask) -> (Tensor?, Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("rotary_embedding", TORCH_BOX(&ptk::forward));
  library.impl("_rotary_embedding_backward", TORCH_BOX(&ptk::backward));
}
