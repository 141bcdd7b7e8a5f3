// Torch glue of attention with a cache for CUDA kernels, run through a Launcher: StreamLauncher on a GPU. Numbers in
// tensors are not read here but by the kernels (kv_cache.cuh).
#pragma once

#include "csrc/ops/attention/attention_cuda_glue.h"
#include "csrc/ops/attention_kv_cache/kv_cache.cuh"
#include "csrc/ops/attention_kv_cache/kv_cache_glue.h"

namespace ptk::cuda {

using kv_cache::OptionalTensor;

inline IntegerArray integer_array(const kv_cache::IntegerView& view) {
  return {view.data, {view.strides[0], view.strides[1]}, view.is_wide};
}

// Calls run.template operator()<Scalar, CacheType>().
template <typename Run>
void with_cache_types(const KvCacheParams& p, Run&& run) {
  with_scalar(p.dtype, [&]<typename Scalar>() {
    switch (p.cache_type) {
    case CacheType::as_query:
      return run.template operator()<Scalar, CacheType::as_query>();
    case CacheType::s8:
      return run.template operator()<Scalar, CacheType::s8>();
    case CacheType::e4m3:
      return run.template operator()<Scalar, CacheType::e4m3>();
    }
  });
}

template <typename Launcher>
struct KvCacheBackend {
  static std::tuple<Tensor, Tensor>
  append_and_attend(Tensor query, Tensor k_cache, Tensor v_cache, OptionalTensor k, OptionalTensor v,
                    Tensor cache_seqlens, OptionalTensor block_table, OptionalTensor cache_batch_idx,
                    OptionalTensor cache_leftpad, OptionalTensor rotary_cos, OptionalTensor rotary_sin,
                    bool rotary_interleaved, std::optional<double> scale, bool is_causal, int64_t window_left,
                    int64_t window_right, double softcap, OptionalTensor alibi_slopes, OptionalTensor sinks,
                    OptionalTensor k_scale, OptionalTensor v_scale) {
    PTK_KV_CHECK(Launcher::owns(query), "query: got a tensor on another device, expected it on ", Launcher::kDevice);
    PTK_KV_CHECK(newest_architecture != Architecture::none,
                 "query: got a tensor on cuda, expected one on the cpu: no CUDA kernel has passed on a GPU yet; "
                 "PTKERNELS_CUDA_ARCH chooses those that have not");
    kv_cache::Call call(query);
    call.check_operands(query, k_cache, v_cache);
    call.check_scales(k_cache, v_cache, k_scale, v_scale);
    call.check_new(k, v, k_cache, v_cache, k_scale, v_scale);
    kv_cache::Placement placement =
        call.place_unread(k_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad);
    call.check_rotary(rotary_cos, rotary_sin, rotary_interleaved, k.has_value());
    placement.positions = rotary_cos ? rotary_cos->size(0) : placement.positions;
    call.check_options(scale, is_causal, window_left, window_right, softcap, alibi_slopes, sinks);

    KvCacheParams& p = call.params;
    Tensor out = kv_cache::empty_out(query, p);
    Tensor lse = kv_cache::empty_lse(query, p);
    p.out.data = out.mutable_data_ptr();
    std::ranges::copy(out.strides(), p.out.strides);
    p.lse = lse.mutable_data_ptr();
    if (p.batch * p.heads_q > 0) {
      run(p, placement, query);
    }
    return {out, lse};
  }

  static void run(KvCacheParams p, const kv_cache::Placement& placement, const Tensor& query) {
    const Launcher launcher(query.get_device_index());
    const int64_t unsplit =
        p.batch * p.heads_kv * ((p.heads_q / p.heads_kv * p.len_q + kRowsPerBlock - 1) / kRowsPerBlock);
    const int64_t splits = unsplit > 0 ? split_count(unsplit, launcher.multiprocessors(), placement.capacity) : 1;
    const int64_t rows = p.batch * p.heads_q * p.len_q;
    const DType wide = lse_dtype(p.dtype);
    // As wide as int64.
    const Tensor places = empty_contiguous(query, {p.batch * (2 + p.blocks_per_sequence)}, DType::f64);
    const Tensor parts = empty_contiguous(query, {splits * rows * (2 + p.dim_v)}, wide);
    CacheWorkspace work;
    work.total = static_cast<int64_t*>(places.mutable_data_ptr());
    work.leftpad = work.total + p.batch;
    work.blocks = work.leftpad + p.batch;
    char* memory = static_cast<char*>(parts.mutable_data_ptr());
    const int64_t statistics = splits * rows * static_cast<int64_t>(element_size(wide));
    work.max = memory;
    work.sum = memory + statistics;
    work.out = memory + 2 * statistics;
    work.splits = splits;
    p.total = work.total;
    p.leftpad = work.leftpad;
    p.blocks = work.blocks;

    launcher.template run<KvPlace>({integer_array(placement.seqlens), integer_array(placement.table),
                                    integer_array(placement.batch_idx), integer_array(placement.leftpad),
                                    p.blocks_per_sequence, p.page, placement.num_blocks, placement.capacity,
                                    placement.positions, p.len_new, p.batch, work});
    with_cache_types(p, [&]<typename Scalar, CacheType Type>() {
      launcher.template run<KvAppend<Scalar, Type>>(p);
      launcher.template run<KvSplit<Scalar, Type>>({p, work});
      launcher.template run<KvCombine<Scalar>>({p, work});
    });
  }

  static std::tuple<Tensor, Tensor> attend(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                                           OptionalTensor block_table, OptionalTensor cache_batch_idx,
                                           OptionalTensor cache_leftpad, std::optional<double> scale, bool is_causal,
                                           int64_t window_left, int64_t window_right, double softcap,
                                           OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor k_scale,
                                           OptionalTensor v_scale) {
    return append_and_attend(query, k_cache, v_cache, std::nullopt, std::nullopt, cache_seqlens, block_table,
                             cache_batch_idx, cache_leftpad, std::nullopt, std::nullopt, false, scale, is_causal,
                             window_left, window_right, softcap, alibi_slopes, sinks, k_scale, v_scale);
  }

  static std::tuple<Tensor, Tensor>
  append(Tensor query, Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor cache_seqlens,
         OptionalTensor block_table, OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad,
         OptionalTensor rotary_cos, OptionalTensor rotary_sin, bool rotary_interleaved, std::optional<double> scale,
         bool is_causal, int64_t window_left, int64_t window_right, double softcap, OptionalTensor alibi_slopes,
         OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale) {
    return append_and_attend(query, k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad,
                             rotary_cos, rotary_sin, rotary_interleaved, scale, is_causal, window_left, window_right,
                             softcap, alibi_slopes, sinks, k_scale, v_scale);
  }
};

}  // namespace ptk::cuda
