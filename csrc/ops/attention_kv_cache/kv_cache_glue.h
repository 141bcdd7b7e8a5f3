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

inline void check_cpu(const char* name, const Tensor& tensor) {
  PTK_KV_CHECK(tensor.is_cpu(), name, ": got a tensor on another device, expected it on the cpu device of query");
}

inline void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* form) {
  check_cpu(name, tensor);
  PTK_KV_CHECK(tensor.dim() == rank, name, ": got ", tensor.dim(), " dimensions, expected ", rank, ": ", form);
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  check_cpu(name, tensor);
  PTK_KV_CHECK(std::ranges::equal(tensor.sizes(), expected), name, ": got shape ", shape_text(tensor.sizes()),
               ", expected ", shape_text(expected));
}

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

// Distinct elements at distinct places, for what is written: no expanded dimension.
inline void check_writable(const char* name, const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    PTK_KV_CHECK(tensor.size(i) < 2 || tensor.stride(i) != 0, name, ": got stride 0 in dimension ", i,
                 ", expected a cache whose elements all lie in places of their own");
  }
}

// The problem of a call, and the integers that its pointers refer to.
struct Call {
  KvCacheParams params;
  std::vector<int64_t> total, leftpad, blocks;

  void check_operands(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache);
  void check_scales(const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scale,
                    const OptionalTensor& v_scale);
  void check_new(const OptionalTensor& k, const OptionalTensor& v, const Tensor& k_cache, const Tensor& v_cache,
                 const OptionalTensor& k_scale, const OptionalTensor& v_scale);
  void place(const Tensor& k_cache, const Tensor& cache_seqlens, const OptionalTensor& block_table,
             const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad);
  void check_rotary(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved, bool has_new);
  void check_options(std::optional<double> scale, bool is_causal, int64_t window_left, int64_t window_right,
                     double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks);

private:
  void place_pages(const Tensor& table, int64_t num_blocks);
  void check_blocks_written_once() const;
};

}  // namespace ptk::kv_cache
