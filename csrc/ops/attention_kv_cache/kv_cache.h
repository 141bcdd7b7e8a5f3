// Attention of new queries to a cache of keys and values: what the kernels are given. Torch-free.
//
//   slots of a sequence   leftpad <= j < total, the last len_new of them written by this call
//   query i               stands at slot total - len_q + i, and sees slots in [position - window_left,
//                         position + window_right], none after itself when causal
//   scores[i, j]          softcap(scale <rotate(query[i]), key[j]>) - slope |position - j|
//   out, lse              as in attention.h; a sink adds exp(sink) to a row's denominator
#pragma once

#include "csrc/ops/attention/attention.h"

namespace ptk {

enum class CacheType : uint8_t { as_query, s8, e4m3 };

constexpr int64_t cache_element_size(CacheType type, DType dtype) {
  return type == CacheType::as_query ? static_cast<int64_t>(element_size(dtype)) : 1;
}

// [blocks, heads, slots, dim] with stride 1 in dim. Strides are in elements.
struct CacheView {
  void* data = nullptr;
  int64_t stride_block = 0, stride_head = 0, stride_slot = 0;
};

// What a stored code is multiplied with: per head (other strides 0) or per slot and head.
struct ScaleView {
  float* data = nullptr;  // null where the cache is not quantised
  int64_t stride_block = 0, stride_head = 0, stride_slot = 0;
  bool is_per_slot = false;  // appending chooses and writes the scale; otherwise it uses the one it finds
};

struct Rotary {
  const void* cos = nullptr;  // [positions, dim / 2], null for no rotation
  const void* sin = nullptr;
  int64_t cos_strides[2] = {}, sin_strides[2] = {};
  DType dtype = DType::f32;
  int64_t dim = 0;
  bool interleaved = false;
};

struct KvCacheParams {
  DType dtype = DType::f32;
  CacheType cache_type = CacheType::as_query;
  int64_t batch = 0, heads_q = 0, heads_kv = 0, len_q = 0, len_new = 0, dim_qk = 0, dim_v = 0;
  double scale = 1.0, softcap = 0.0;
  bool is_causal = true;
  int64_t window_left = -1, window_right = -1;  // negative: no limit

  ConstView query, key_new, value_new;
  CacheView key, value;
  ScaleView key_scale, value_scale;
  Rotary rotary;
  const float* alibi = nullptr;  // [batch, heads_q]
  int64_t alibi_strides[2] = {};
  const float* sinks = nullptr;  // [heads_q]
  int64_t sinks_stride = 0;

  // Slot j of sequence b lies in block blocks[b * blocks_per_sequence + j / page], at j % page of it.
  const int64_t* blocks = nullptr;
  int64_t blocks_per_sequence = 0, page = 1;
  const int64_t* total = nullptr;
  const int64_t* leftpad = nullptr;

  bool batch_invariant = false;  // as in attention.h

  View out;             // [batch, heads_q, len_q, dim_v], uninitialised, stride 1 in dim
  void* lse = nullptr;  // [batch, heads_q, len_q] contiguous, float32 (float64 for float64)
};

struct KvCacheKernels {
  // Writes the new keys and values to their slots. False when memory ran out, before anything was written.
  bool (*append)(const KvCacheParams&);
  bool (*attend)(const KvCacheParams&);
  const char* (*describe)(const KvCacheParams&);
};

PTK_DECLARE_KERNELS(KvCacheKernels, kv_cache_kernels)

// Name of the kernel that the active level runs; only sizes and types are read.
PTK_EXPORT const char* kv_cache_kernel_name(const KvCacheParams& params);

}  // namespace ptk
