// Schemas of attention with a cache and their CPU implementation: the kernels of the active ISA.
#include "csrc/ops/attention_kv_cache/kv_cache_glue.h"

#include <limits>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace ptk {

const char* kv_cache_kernel_name(const KvCacheParams& params) {
  KvCacheParams asked = params;
  asked.batch_invariant = is_batch_invariant();
  return PTK_DISPATCH(kv_cache_kernels).describe(asked);
}

namespace {

using kv_cache::OptionalTensor;

using kv_cache::empty_lse;
using kv_cache::empty_out;

std::tuple<Tensor, Tensor> append_and_attend(Tensor query, Tensor k_cache, Tensor v_cache, OptionalTensor k,
                                             OptionalTensor v, Tensor cache_seqlens, OptionalTensor block_table,
                                             OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad,
                                             OptionalTensor rotary_cos, OptionalTensor rotary_sin,
                                             bool rotary_interleaved, std::optional<double> scale, bool is_causal,
                                             int64_t window_left, int64_t window_right, double softcap,
                                             OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor k_scale,
                                             OptionalTensor v_scale) {
  kv_cache::Call call(query);
  call.check_operands(query, k_cache, v_cache);
  call.check_scales(k_cache, v_cache, k_scale, v_scale);
  call.check_new(k, v, k_cache, v_cache, k_scale, v_scale);
  call.place(k_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad);
  call.check_rotary(rotary_cos, rotary_sin, rotary_interleaved, k.has_value());
  call.check_options(scale, is_causal, window_left, window_right, softcap, alibi_slopes, sinks);

  KvCacheParams& p = call.params;
  p.batch_invariant = is_batch_invariant();
  const KvCacheKernels& kernels = PTK_DISPATCH(kv_cache_kernels);
  Tensor out = empty_out(query, p);
  Tensor lse = empty_lse(query, p);
  p.out.data = out.mutable_data_ptr();
  std::ranges::copy(out.strides(), p.out.strides);
  p.lse = lse.mutable_data_ptr();
  if (p.batch * p.heads_kv * p.len_new > 0) {
    PTK_KV_CHECK(kernels.append(p), "out of memory");
  }
  if (p.batch * p.heads_q * p.len_q > 0) {
    PTK_KV_CHECK(kernels.attend(p), "out of memory");
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> attend(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                                  OptionalTensor block_table, OptionalTensor cache_batch_idx,
                                  OptionalTensor cache_leftpad, std::optional<double> scale, bool is_causal,
                                  int64_t window_left, int64_t window_right, double softcap,
                                  OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor k_scale,
                                  OptionalTensor v_scale) {
  return append_and_attend(query, k_cache, v_cache, std::nullopt, std::nullopt, cache_seqlens, block_table,
                           cache_batch_idx, cache_leftpad, std::nullopt, std::nullopt, false, scale, is_causal,
                           window_left, window_right, softcap, alibi_slopes, sinks, k_scale, v_scale);
}

std::tuple<Tensor, Tensor> append(Tensor query, Tensor k_cache, Tensor v_cache, Tensor k, Tensor v,
                                  Tensor cache_seqlens, OptionalTensor block_table, OptionalTensor cache_batch_idx,
                                  OptionalTensor cache_leftpad, OptionalTensor rotary_cos, OptionalTensor rotary_sin,
                                  bool rotary_interleaved, std::optional<double> scale, bool is_causal,
                                  int64_t window_left, int64_t window_right, double softcap,
                                  OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor k_scale,
                                  OptionalTensor v_scale) {
  return append_and_attend(query, k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad,
                           rotary_cos, rotary_sin, rotary_interleaved, scale, is_causal, window_left, window_right,
                           softcap, alibi_slopes, sinks, k_scale, v_scale);
}

}  // namespace
}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("attention_with_kv_cache(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
              "Tensor? block_table=None, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, "
              "float? scale=None, bool is_causal=True, int window_left=-1, int window_right=-1, float softcap=0.0, "
              "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None) "
              "-> (Tensor, Tensor)");
  library.def(
      "attention_with_kv_cache_append(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor cache_seqlens, Tensor? block_table=None, Tensor? cache_batch_idx=None, "
      "Tensor? cache_leftpad=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
      "bool rotary_interleaved=False, float? scale=None, bool is_causal=True, int window_left=-1, "
      "int window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, "
      "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("attention_with_kv_cache", TORCH_BOX(&ptk::attend));
  library.impl("attention_with_kv_cache_append", TORCH_BOX(&ptk::append));
}
