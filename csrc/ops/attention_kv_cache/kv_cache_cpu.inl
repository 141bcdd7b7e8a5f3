// Attention with a cache on the CPU, one ISA level: which kernel answers which problem. The kernels are in
// kv_cache_cpu_append.h, kv_cache_cpu_direct.h (few queries), kv_cache_cpu_tiled.h and kv_cache_cpu_invariant.h.
#include "csrc/ops/attention_kv_cache/kv_cache_cpu_invariant.h"

namespace ptk::PTK_ISA {
namespace {

#define PTK_TEXT(x) #x
#define PTK_NAME(isa, kernel) "cpu." PTK_TEXT(isa) "." kernel

#if PTK_ISA_LEVEL >= 3
// Above avx512 the levels differ in bfloat16 products only.
bool is_own(const KvCacheParams& p) {
  return PTK_ISA_LEVEL > 3 && p.dtype == DType::bf16 && (p.batch_invariant || !DirectAttend<float>::suits(p));
}

bool append(const KvCacheParams& p) {
  return avx512::kv_cache_kernels().append(p);
}

bool attend(const KvCacheParams& p) {
#if PTK_ISA_LEVEL > 3
  if (is_own(p)) return p.batch_invariant ? InvariantAttend<bf16>(p).run() : TiledAttend<bf16>(p).run();
#endif
  return avx512::kv_cache_kernels().attend(p);
}

const char* describe(const KvCacheParams& p) {
  if (!is_own(p)) return avx512::kv_cache_kernels().describe(p);
  return p.batch_invariant ? PTK_NAME(PTK_ISA, "invariant") : PTK_NAME(PTK_ISA, "tiled");
}
#else
// Codes are widened to float32: a quantised cache under float64 queries takes the tiled kernel, which has float64.
bool is_direct(const KvCacheParams& p) {
  return DirectAttend<float>::suits(p) && (p.dtype != DType::f64 || p.cache_type == CacheType::as_query);
}

bool append(const KvCacheParams& p) {
  return with_type(p.dtype, [&](auto t) { return Append<decltype(t)>(p).run(); });
}

bool attend(const KvCacheParams& p) {
  if (p.batch_invariant) return with_type(p.dtype, [&](auto t) { return InvariantAttend<decltype(t)>(p).run(); });
  if (!is_direct(p)) return p.dtype == DType::f64 ? TiledAttend<double>(p).run() : TiledAttend<float>(p).run();
  if (p.cache_type == CacheType::s8) return DirectAttend<int8_t>(p).run();
  if (p.cache_type == CacheType::e4m3) return DirectAttend<e4m3>(p).run();
  return with_type(p.dtype, [&](auto t) { return DirectAttend<decltype(t)>(p).run(); });
}

const char* describe(const KvCacheParams& p) {
  if (p.batch_invariant) return PTK_NAME(PTK_ISA, "invariant");
  return is_direct(p) ? PTK_NAME(PTK_ISA, "direct") : PTK_NAME(PTK_ISA, "tiled");
}
#endif

}  // namespace

const KvCacheKernels& kv_cache_kernels() {
  static constexpr KvCacheKernels kernels = {append, attend, describe};
  return kernels;
}

}  // namespace ptk::PTK_ISA
