#include "csrc/ops/attention_kv_cache/kv_cache_glue.h"

namespace ptk::kv_cache {

void Call::check_device(const char* name, const Tensor& tensor) const {
  PTK_KV_CHECK(tensor.is_cpu() == query.is_cpu() && tensor.get_device_index() == query.get_device_index(), name,
               ": got a tensor on another device, expected it on the ", query.is_cpu() ? "cpu" : "cuda",
               " device of query");
}

void Call::check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* form) const {
  check_device(name, tensor);
  PTK_KV_CHECK(tensor.dim() == rank, name, ": got ", tensor.dim(), " dimensions, expected ", rank, ": ", form);
}

void Call::check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) const {
  check_device(name, tensor);
  PTK_KV_CHECK(std::ranges::equal(tensor.sizes(), expected), name, ": got shape ", shape_text(tensor.sizes()),
               ", expected ", shape_text(expected));
}

void Call::check_operands(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache) {
  check_rank("query", query, 4, "[batch, heads, length, dim]");
  check_rank("k_cache", k_cache, 4, "[batch or blocks, kv heads, capacity or page size, dim]");
  check_rank("v_cache", v_cache, 4, "[batch or blocks, kv heads, capacity or page size, dim]");
  KvCacheParams& p = params;
  const std::optional<DType> dtype = float_dtype(query);
  PTK_KV_CHECK(dtype, "query: got another dtype, expected float64, float32, bfloat16 or float16");
  p.dtype = *dtype;
  const int32_t stored = shim_dtype(k_cache);
  p.cache_type = stored == aoti_torch_dtype_int8()            ? CacheType::s8
                 : stored == aoti_torch_dtype_float8_e4m3fn() ? CacheType::e4m3
                                                              : CacheType::as_query;
  PTK_KV_CHECK(p.cache_type != CacheType::as_query || float_dtype(k_cache) == p.dtype,
               "k_cache: got another dtype, expected ", dtype_name(p.dtype), ", int8 or float8_e4m3fn");
  PTK_KV_CHECK(shim_dtype(v_cache) == stored, "v_cache: got another dtype, expected that of k_cache");
  p.batch = query.size(0);
  p.heads_q = query.size(1);
  p.len_q = query.size(2);
  p.dim_qk = query.size(3);
  p.heads_kv = k_cache.size(1);
  p.dim_v = v_cache.size(3);
  check_shape("k_cache", k_cache, {k_cache.size(0), p.heads_kv, k_cache.size(2), p.dim_qk});
  check_shape("v_cache", v_cache, {k_cache.size(0), p.heads_kv, k_cache.size(2), p.dim_v});
  PTK_KV_CHECK(p.heads_kv == 0 ? p.heads_q == 0 : p.heads_q % p.heads_kv == 0, "k_cache: got ", p.heads_kv,
               " heads, expected a divisor of query's ", p.heads_q);
  for (const auto& [name, dim] : {std::pair("query", p.dim_qk), std::pair("v_cache", p.dim_v)}) {
    PTK_KV_CHECK(1 <= dim && dim <= kMaxHeadDim, name, ": got head dim ", dim, ", expected 1 to ", kMaxHeadDim);
  }
  for (const auto& [name, cache] : {std::pair("k_cache", &k_cache), std::pair("v_cache", &v_cache)}) {
    PTK_KV_CHECK(cache->stride(3) == 1 || cache->size(3) == 1, name, ": got stride ", cache->stride(3),
                 " in its last dimension, expected 1");
  }
  p.query = view(query);
  p.key = cache_view(k_cache);
  p.value = cache_view(v_cache);
}

void Call::check_scales(const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scale,
                        const OptionalTensor& v_scale) {
  const auto check = [&](const char* name, const OptionalTensor& scale, const Tensor& cache) -> ScaleView {
    const bool is_quantized = params.cache_type != CacheType::as_query;
    PTK_KV_CHECK(scale.has_value() == is_quantized, name, ": got ", scale ? "a tensor" : "None", ", expected ",
                 is_quantized ? "the scales of the quantised cache" : "None for a cache that is not quantised");
    if (!scale) {
      return {};
    }
    check_device(name, *scale);
    check_dtype(name, *scale, DType::f32);
    ScaleView v;
    v.data = static_cast<float*>(const_cast<void*>(scale->const_data_ptr()));
    v.is_per_slot = scale->dim() == 3;
    if (v.is_per_slot) {
      check_shape(name, *scale, {cache.size(0), cache.size(1), cache.size(2)});
      v.stride_block = scale->stride(0);
      v.stride_head = scale->stride(1);
      v.stride_slot = scale->stride(2);
    } else {
      check_shape(name, *scale, {cache.size(1)});
      v.stride_head = scale->stride(0);
    }
    return v;
  };
  params.key_scale = check("k_scale", k_scale, k_cache);
  params.value_scale = check("v_scale", v_scale, v_cache);
}

void Call::check_new(const OptionalTensor& k, const OptionalTensor& v, const Tensor& k_cache, const Tensor& v_cache,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  KvCacheParams& p = params;
  PTK_KV_CHECK(k.has_value() == v.has_value(), k ? "v" : "k", ": got None, expected both of k and v or neither");
  if (!k) {
    return;
  }
  check_rank("k", *k, 4, "[batch, kv heads, new length, dim]");
  p.len_new = k->size(2);
  check_shape("k", *k, {p.batch, p.heads_kv, p.len_new, p.dim_qk});
  check_shape("v", *v, {p.batch, p.heads_kv, p.len_new, p.dim_v});
  check_dtype("k", *k, p.dtype);
  check_dtype("v", *v, p.dtype);
  check_writable("k_cache", k_cache);
  check_writable("v_cache", v_cache);
  for (const auto& [name, scale] : {std::pair("k_scale", &k_scale), std::pair("v_scale", &v_scale)}) {
    if (*scale && (*scale)->dim() == 3) {
      check_writable(name, **scale);
    }
  }
  p.key_new = view(*k);
  p.value_new = view(*v);
}

void Call::place(const Tensor& k_cache, const Tensor& cache_seqlens, const OptionalTensor& block_table,
                 const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad) {
  KvCacheParams& p = params;
  check_shape("cache_seqlens", cache_seqlens, {p.batch});
  total = read_integers("cache_seqlens", cache_seqlens);
  leftpad.assign(p.batch, 0);
  if (cache_leftpad) {
    check_shape("cache_leftpad", *cache_leftpad, {p.batch});
    leftpad = read_integers("cache_leftpad", *cache_leftpad);
  }
  PTK_KV_CHECK(!(block_table && cache_batch_idx),
               "cache_batch_idx: got a tensor, expected None where block_table says where sequences lie");
  int64_t capacity = k_cache.size(2);
  if (block_table) {
    check_rank("block_table", *block_table, 2, "[batch, blocks of a sequence]");
    check_shape("block_table", *block_table, {p.batch, block_table->size(1)});
    PTK_KV_CHECK(1 <= capacity && capacity <= 512, "k_cache: got page size ", capacity, ", expected 1 to 512");
    capacity *= block_table->size(1);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    PTK_KV_CHECK(0 <= total[b] && total[b] <= capacity - p.len_new, "cache_seqlens: got ", total[b], " for sequence ",
                 b, ", expected 0 to ", capacity - p.len_new, " (a capacity of ", capacity, ", ", p.len_new,
                 " of it for new keys)");
    total[b] += p.len_new;
    PTK_KV_CHECK(0 <= leftpad[b] && leftpad[b] <= total[b] - p.len_new, "cache_leftpad: got ", leftpad[b],
                 " for sequence ", b, ", expected 0 to its cache_seqlens, ", total[b] - p.len_new);
  }
  if (block_table) {
    p.page = k_cache.size(2);
    place_pages(*block_table, k_cache.size(0));
  } else {
    p.page = std::max<int64_t>(capacity, 1);
    p.blocks_per_sequence = 1;
    const int64_t rows = k_cache.size(0);
    if (cache_batch_idx) {
      check_shape("cache_batch_idx", *cache_batch_idx, {p.batch});
      blocks = read_integers("cache_batch_idx", *cache_batch_idx);
    } else {
      PTK_KV_CHECK(rows == p.batch, "k_cache: got batch size ", rows, ", expected ", p.batch,
                   " like query; cache_batch_idx chooses rows of a larger cache");
      for (int64_t b = 0; b < p.batch; ++b) {
        blocks.push_back(b);
      }
    }
    for (int64_t b = 0; b < p.batch; ++b) {
      PTK_KV_CHECK(0 <= blocks[b] && blocks[b] < rows, "cache_batch_idx: got ", blocks[b], " for sequence ", b,
                   ", expected 0 to ", rows - 1);
    }
  }
  if (p.len_new > 0) {
    check_blocks_written_once();
  }
  p.blocks = blocks.data();
  p.total = total.data();
  p.leftpad = leftpad.data();
}

Placement Call::place_unread(const Tensor& k_cache, const Tensor& cache_seqlens, const OptionalTensor& block_table,
                             const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad) {
  KvCacheParams& p = params;
  const auto view_of = [](const char* name, const Tensor& tensor) {
    const bool is_wide = shim_dtype(tensor) == aoti_torch_dtype_int64();
    PTK_KV_CHECK(is_wide || shim_dtype(tensor) == aoti_torch_dtype_int32(), name,
                 ": got another dtype, expected int32 or int64");
    IntegerView v{tensor.const_data_ptr(), {}, is_wide};
    std::ranges::copy(tensor.strides(), v.strides);
    return v;
  };
  Placement placement;
  check_shape("cache_seqlens", cache_seqlens, {p.batch});
  placement.seqlens = view_of("cache_seqlens", cache_seqlens);
  if (cache_leftpad) {
    check_shape("cache_leftpad", *cache_leftpad, {p.batch});
    placement.leftpad = view_of("cache_leftpad", *cache_leftpad);
  }
  PTK_KV_CHECK(!(block_table && cache_batch_idx),
               "cache_batch_idx: got a tensor, expected None where block_table says where sequences lie");
  placement.num_blocks = k_cache.size(0);
  p.page = std::max<int64_t>(k_cache.size(2), 1);
  p.blocks_per_sequence = 1;
  if (block_table) {
    check_rank("block_table", *block_table, 2, "[batch, blocks of a sequence]");
    check_shape("block_table", *block_table, {p.batch, block_table->size(1)});
    PTK_KV_CHECK(1 <= k_cache.size(2) && k_cache.size(2) <= 512, "k_cache: got page size ", k_cache.size(2),
                 ", expected 1 to 512");
    placement.table = view_of("block_table", *block_table);
    p.blocks_per_sequence = block_table->size(1);
  } else if (cache_batch_idx) {
    check_shape("cache_batch_idx", *cache_batch_idx, {p.batch});
    placement.batch_idx = view_of("cache_batch_idx", *cache_batch_idx);
  } else {
    PTK_KV_CHECK(k_cache.size(0) == p.batch, "k_cache: got batch size ", k_cache.size(0), ", expected ", p.batch,
                 " like query; cache_batch_idx chooses rows of a larger cache");
  }
  placement.capacity = k_cache.size(2) * p.blocks_per_sequence;
  return placement;
}

// Entries of pages that hold no slot yet are not read.
void Call::place_pages(const Tensor& table, int64_t num_blocks) {
  KvCacheParams& p = params;
  const int32_t dtype = shim_dtype(table);
  const bool is_wide = dtype == aoti_torch_dtype_int64();
  PTK_KV_CHECK(is_wide || dtype == aoti_torch_dtype_int32(), "block_table: got another dtype, expected int32 or int64");
  for (int64_t b = 0; b < p.batch; ++b) {
    p.blocks_per_sequence = std::max(p.blocks_per_sequence, (total[b] + p.page - 1) / p.page);
  }
  blocks.assign(p.batch * p.blocks_per_sequence, 0);
  const void* data = blocks.empty() ? nullptr : table.const_data_ptr();
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = leftpad[b] / p.page; i * p.page < total[b]; ++i) {
      const int64_t at = b * table.stride(0) + i * table.stride(1);
      const int64_t block = is_wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
      PTK_KV_CHECK(0 <= block && block < num_blocks, "block_table: got ", block, " for block ", i, " of sequence ", b,
                   ", expected 0 to ", num_blocks - 1);
      blocks[b * p.blocks_per_sequence + i] = block;
    }
  }
}

// Two sequences, or two parts of one, that write to the same block would race for its slots.
void Call::check_blocks_written_once() const {
  const KvCacheParams& p = params;
  std::vector<int64_t> written;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = (total[b] - p.len_new) / p.page; i * p.page < total[b]; ++i) {
      written.push_back(blocks[b * p.blocks_per_sequence + i]);
    }
  }
  std::ranges::sort(written);
  const auto twice = std::ranges::adjacent_find(written);
  PTK_KV_CHECK(twice == written.end(), p.blocks_per_sequence == 1 ? "cache_batch_idx" : "block_table", ": got row ",
               *twice, " of the cache twice among those that are appended to, expected each once");
}

void Call::check_rotary(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved, bool has_new) {
  KvCacheParams& p = params;
  PTK_KV_CHECK(cos.has_value() == sin.has_value(), cos ? "rotary_sin" : "rotary_cos",
               ": got None, expected both of rotary_cos and rotary_sin or neither");
  if (!cos) {
    return;
  }
  PTK_KV_CHECK(has_new, "rotary_cos: got a tensor, expected None without new keys");
  PTK_KV_CHECK(p.len_new == p.len_q, "k: got length ", p.len_new, ", expected query's ", p.len_q,
               " where both are rotated");
  check_rank("rotary_cos", *cos, 2, "[positions, rotary dim / 2]");
  check_shape("rotary_sin", *sin, {cos->size(0), cos->size(1)});
  const std::optional<DType> dtype = float_dtype(*cos);
  PTK_KV_CHECK(dtype && (*dtype == p.dtype || *dtype == DType::f32), "rotary_cos: got ",
               dtype ? dtype_name(*dtype) : "another dtype", ", expected float32 or ", dtype_name(p.dtype));
  check_dtype("rotary_sin", *sin, *dtype);
  PTK_KV_CHECK(2 * cos->size(1) <= p.dim_qk, "rotary_cos: got ", cos->size(1), " angles, expected at most half of ",
               p.dim_qk);
  // Nothing where lengths are not read here.
  const int64_t needed = total.empty() ? 0 : *std::ranges::max_element(total);
  PTK_KV_CHECK(needed <= cos->size(0), "rotary_cos: got ", cos->size(0), " positions, expected at least ", needed);
  if (cos->size(1) == 0) {
    return;
  }
  Rotary& r = p.rotary;
  r.cos = cos->const_data_ptr();
  r.sin = sin->const_data_ptr();
  std::ranges::copy(cos->strides(), r.cos_strides);
  std::ranges::copy(sin->strides(), r.sin_strides);
  r.dtype = *dtype;
  r.dim = 2 * cos->size(1);
  r.interleaved = interleaved;
}

void Call::check_options(std::optional<double> scale, bool is_causal, int64_t window_left, int64_t window_right,
                         double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks) {
  KvCacheParams& p = params;
  p.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(p.dim_qk)));
  PTK_KV_CHECK(std::isfinite(p.scale), "scale: got ", p.scale, ", expected a finite number");
  PTK_KV_CHECK(std::isfinite(softcap) && softcap >= 0, "softcap: got ", softcap,
               ", expected a finite number that is not negative");
  p.softcap = softcap;
  p.is_causal = is_causal;
  p.window_left = window_left;
  p.window_right = window_right;
  if (alibi_slopes) {
    check_device("alibi_slopes", *alibi_slopes);
    check_dtype("alibi_slopes", *alibi_slopes, DType::f32);
    if (alibi_slopes->dim() == 1) {
      check_shape("alibi_slopes", *alibi_slopes, {p.heads_q});
    } else {
      check_shape("alibi_slopes", *alibi_slopes, {p.batch, p.heads_q});
      p.alibi_strides[0] = alibi_slopes->stride(0);
    }
    p.alibi_strides[1] = alibi_slopes->stride(alibi_slopes->dim() - 1);
    p.alibi = static_cast<const float*>(alibi_slopes->const_data_ptr());
  }
  if (sinks) {
    check_shape("sinks", *sinks, {p.heads_q});
    check_dtype("sinks", *sinks, DType::f32);
    p.sinks_stride = sinks->stride(0);
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
}

}  // namespace ptk::kv_cache
