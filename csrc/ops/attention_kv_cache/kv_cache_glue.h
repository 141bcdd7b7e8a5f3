// What the operators on a cache check before a pointer is read. Messages begin with the public function's name.
#pragma once

#include "csrc/core/checks.h"
#include "csrc/core/stable_compat.h"
#include "csrc/ops/attention_kv_cache/kv_cache.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace ptk::kv_cache {

inline constexpr int64_t kMaxHeadDim = 512;
#define PTK_KV_CHECK(condition, ...) PTK_CHECK(condition, "attention_with_kv_cache: ", __VA_ARGS__)

using OptionalTensor = std::optional<Tensor>;

inline void check_dtype(const char* name, const Tensor& tensor, DType expected) {
  const std::optional<DType> dtype = float_dtype(tensor);
  PTK_KV_CHECK(dtype == expected, name, ": got ", dtype ? dtype_name(*dtype) : "another dtype", ", expected ",
               dtype_name(expected));
}

// Values of a one-dimensional int32 or int64 tensor.
inline std::vector<int64_t> read_integers(const char* name, const Tensor& tensor) {
  const int32_t dtype = shim_dtype(tensor);
  const bool is_wide = dtype == aoti_torch_dtype_int64();
  PTK_KV_CHECK(is_wide || dtype == aoti_torch_dtype_int32(), name, ": got another dtype, expected int32 or int64");
  std::vector<int64_t> values(tensor.size(0));
  const int64_t stride = tensor.stride(0);
  const void* data = values.empty() ? nullptr : tensor.const_data_ptr();
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) * stride;
    values[i] = is_wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
  return values;
}

inline ConstView view(const Tensor& tensor) {
  ConstView v;
  v.data = tensor.const_data_ptr();
  std::ranges::copy(tensor.strides(), v.strides);
  return v;
}

inline CacheView cache_view(const Tensor& tensor) {
  // Only append() writes through the pointer, to caches whose schema says so.
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// As attention allocates its results: shape [batch, heads, length, dim] over memory [batch, length, heads, dim].
inline Tensor empty_out(const Tensor& query, const KvCacheParams& p) {
  const int64_t token = p.dim_v * std::max<int64_t>(p.heads_q, 1);
  return empty_strided<4>(query, {p.batch, p.heads_q, p.len_q, p.dim_v},
                          {token * std::max<int64_t>(p.len_q, 1), p.dim_v, token, 1}, p.dtype);
}

inline Tensor empty_lse(const Tensor& query, const KvCacheParams& p) {
  const int64_t head = std::max<int64_t>(p.len_q, 1);
  return empty_strided<3>(query, {p.batch, p.heads_q, p.len_q}, {head * std::max<int64_t>(p.heads_q, 1), head, 1},
                          p.dtype == DType::f64 ? DType::f64 : DType::f32);
}

// Distinct elements at distinct places, for what is written: no expanded dimension.
inline void check_writable(const char* name, const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    PTK_KV_CHECK(tensor.size(i) < 2 || tensor.stride(i) != 0, name, ": got stride 0 in dimension ", i,
                 ", expected a cache whose elements all lie in places of their own");
  }
}

// Integers in memory of the device: int64 where is_wide, int32 elsewhere. data is null where there are none.
struct IntegerView {
  const void* data = nullptr;
  int64_t strides[2] = {};
  bool is_wide = false;
};

// Where sequences lie, as the call says it.
struct Placement {
  IntegerView seqlens, table, batch_idx, leftpad;
  int64_t num_blocks = 0;
  int64_t capacity = 0;           // slots of a sequence
  int64_t positions = INT64_MAX;  // that rotary_cos has
};

// The problem of a call, and the integers that its pointers refer to.
struct Call {
  explicit Call(const Tensor& query) : query(query) {}

  const Tensor& query;
  KvCacheParams params;
  std::vector<int64_t> total, leftpad, blocks;

  // On the device of query.
  void check_device(const char* name, const Tensor& tensor) const;
  void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* form) const;
  void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) const;

  void check_operands(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache);
  void check_scales(const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scale,
                    const OptionalTensor& v_scale);
  void check_new(const OptionalTensor& k, const OptionalTensor& v, const Tensor& k_cache, const Tensor& v_cache,
                 const OptionalTensor& k_scale, const OptionalTensor& v_scale);
  void place(const Tensor& k_cache, const Tensor& cache_seqlens, const OptionalTensor& block_table,
             const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad);
  // The same without a look at any number: what is out of range is for the kernels to find.
  Placement place_unread(const Tensor& k_cache, const Tensor& cache_seqlens, const OptionalTensor& block_table,
                         const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad);
  void check_rotary(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved, bool has_new);
  void check_options(std::optional<double> scale, bool is_causal, int64_t window_left, int64_t window_right,
                     double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks);

private:
  void place_pages(const Tensor& table, int64_t num_blocks);
  void check_blocks_written_once() const;
};

}  // namespace ptk::kv_cache
