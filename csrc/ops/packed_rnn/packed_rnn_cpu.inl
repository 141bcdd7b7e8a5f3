// Recurrent layers on the CPU, one ISA level: the kernels are in packed_rnn_cpu_forward.h and
// packed_rnn_cpu_backward.h.
#include "csrc/ops/packed_rnn/packed_rnn_cpu_backward.h"
#include "csrc/ops/packed_rnn/packed_rnn_cpu_forward.h"

namespace ptk::PTK_ISA {
namespace {

// Above avx512 the levels differ in bfloat16 products only: everything else runs the avx512 kernels, compiled once.
#if PTK_ISA_LEVEL >= 3
const RnnKernels& inherited() {
  return avx512::packed_rnn_kernels();
}
bool is_inherited(const RnnProblem& p) {
  return PTK_ISA_LEVEL == 3 || p.dtype != DType::bf16;
}
#else
const RnnKernels& inherited() {
  return packed_rnn_kernels();
}
constexpr bool is_inherited(const RnnProblem&) {
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

bool forward(const RnnForwardParams& params) {
  if (is_inherited(params.problem)) return inherited().forward(params);
  return by_dtype(params.problem.dtype, [&](auto t) { return RnnForward<decltype(t)>(params).run(); });
}

bool backward(const RnnBackwardParams& params) {
  if (is_inherited(params.problem)) return inherited().backward(params);
  return by_dtype(params.problem.dtype, [&](auto t) { return RnnBackward<decltype(t)>(params).run(); });
}

#define PTK_TEXT(x) #x
#define PTK_NAME(isa, kernel) "cpu." PTK_TEXT(isa) "." kernel

const char* describe(const RnnProblem& problem) {
  return is_inherited(problem) ? inherited().describe(problem) : PTK_NAME(PTK_ISA, "sliced");
}

}  // namespace

const RnnKernels& packed_rnn_kernels() {
  static constexpr RnnKernels kernels = {forward, backward, describe};
  return kernels;
}

}  // namespace ptk::PTK_ISA
