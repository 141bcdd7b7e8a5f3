// Attention on the CPU, one ISA level: which kernel answers which problem. The kernels are in attention_cpu_forward.h
// and attention_cpu_backward.h (tiled), attention_cpu_direct.h and attention_cpu_direct_backward.h (few queries), and
// attention_cpu_invariant.h (batch invariant).
#include "csrc/ops/attention/attention_cpu_direct_backward.h"
#include "csrc/ops/attention/attention_cpu_invariant.h"

namespace ptk::PTK_ISA {
namespace {

// Above avx512 the levels differ in bfloat16 products only: everything else runs the avx512 kernels, compiled once.
#if PTK_ISA_LEVEL >= 3
const AttentionKernels& inherited() {
  return avx512::attention_kernels();
}
bool is_inherited(const Problem& p) {
  return PTK_ISA_LEVEL == 3 || p.dtype != DType::bf16;
}
#else
const AttentionKernels& inherited() {
  return attention_kernels();
}
constexpr bool is_inherited(const Problem&) {
  return false;
}
#endif

template <class Call>
bool by_dtype([[maybe_unused]] DType dtype, [[maybe_unused]] const Call& call) {
#if PTK_ISA_LEVEL < 3
  switch (dtype) {
  case DType::f64:
    return call(double());
  case DType::f32:
    return call(float());
  case DType::bf16:
    return call(bf16());
  case DType::f16:
    return call(f16());
  }
  __builtin_unreachable();
#elif PTK_ISA_LEVEL == 3
  __builtin_unreachable();
#else
  return call(bf16());
#endif
}

// Only tiles multiply bfloat16 so much faster that three products of it take less time than one of float32.
Float32Products products_of([[maybe_unused]] const Problem& p) {
  const bool in_pieces = PTK_ISA_LEVEL >= 5 && p.dtype == DType::f32 && !p.batch_invariant;
  return in_pieces && !DirectForward<float>::suits(p) ? p.float32_products : Float32Products::exact;
}

bool forward(const ForwardParams& params) {
#if PTK_ISA_LEVEL >= 5
  if (products_of(params.problem) == Float32Products::three_bf16)
    return TiledForward<float, f32_pieces<3>>(params).run();
  if (products_of(params.problem) == Float32Products::one_bf16) return TiledForward<float, f32_pieces<1>>(params).run();
#endif
  if (is_inherited(params.problem)) return inherited().forward(params);
  const bool rows_contiguous = params.key.strides[3] == 1 && params.value.strides[3] == 1;
  return by_dtype(params.problem.dtype, [&](auto t) {
    using T = decltype(t);
    if (params.problem.batch_invariant)
      return attend_invariantly<T>(params.problem, TensorRows<T>(params), params.out, params.lse);
    return rows_contiguous && DirectForward<T>::suits(params.problem) ? DirectForward<T>(params).run()
                                                                      : TiledForward<T>(params).run();
  });
}

bool backward(const BackwardParams& params) {
  if (is_inherited(params.problem)) return inherited().backward(params);
  return by_dtype(params.problem.dtype, [&](auto t) {
    using T = decltype(t);
    return DirectBackward<T>::suits(params) ? DirectBackward<T>(params).run() : TiledBackward<T>(params).run();
  });
}

#define PTK_TEXT(x) #x
#define PTK_NAME(isa, kernel) "cpu." PTK_TEXT(isa) "." kernel

const char* describe(const Problem& problem) {
  if (products_of(problem) == Float32Products::three_bf16) return PTK_NAME(PTK_ISA, "tiled_bf16x3");
  if (products_of(problem) == Float32Products::one_bf16) return PTK_NAME(PTK_ISA, "tiled_bf16x1");
  if (is_inherited(problem)) return inherited().describe(problem);
  if (problem.batch_invariant) return PTK_NAME(PTK_ISA, "invariant");
  // The choice does not depend on the dtype.
  return DirectForward<float>::suits(problem) ? PTK_NAME(PTK_ISA, "direct") : PTK_NAME(PTK_ISA, "tiled");
}

}  // namespace

// For the cache's kernels as well, which call these.
#if PTK_ISA_LEVEL < 3
template bool attend_invariantly<double>(const Problem&, const InvariantRows<double>&, const View&, void*);
template bool attend_invariantly<float>(const Problem&, const InvariantRows<float>&, const View&, void*);
template bool attend_invariantly<f16>(const Problem&, const InvariantRows<f16>&, const View&, void*);
#endif
#if PTK_ISA_LEVEL != 3
template bool attend_invariantly<bf16>(const Problem&, const InvariantRows<bf16>&, const View&, void*);
#endif

const AttentionKernels& attention_kernels() {
  static constexpr AttentionKernels kernels = {forward, backward, describe};
  return kernels;
}

}  // namespace ptk::PTK_ISA
