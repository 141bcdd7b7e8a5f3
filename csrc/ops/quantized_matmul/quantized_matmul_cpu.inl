// Products with a quantized weight on the CPU, one ISA level: which kernel answers which problem. The kernels are in
// quantized_matmul_cpu_forward.h (tiled), quantized_matmul_cpu_direct.h (few rows of input),
// quantized_matmul_cpu_backward.h and quantized_matmul_cpu_rows.h.
#if PTK_ISA_LEVEL <= 3
#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_direct.h"
#endif
#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_backward.h"
#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_rows.h"

namespace ptk::PTK_ISA {
namespace {

#if PTK_ISA_LEVEL != 4
template <class F>
bool tiled_integers(const QuantizedForward& p) {
  // vpdpbusd wants an unsigned operand: shifted here, what it adds comes off with the sums of the input's codes.
  using Bytes = std::conditional_t<PTK_ISA_LEVEL == 3, uint8_t, int8_t>;
  return p.weight.format == CodeFormat::u4 ? TiledProduct<u4, F>(p).run() : TiledProduct<Bytes, F>(p).run();
}
#endif

// Above avx512 the levels differ in 8-bit products (avx512_vnni, amx) and in bfloat16 ones (avx512_bf16, amx):
// everything else runs the kernels of the level below.
#if PTK_ISA_LEVEL >= 3
#if PTK_ISA_LEVEL == 3
const QuantizedMatmulKernels& below() {
  return avx512::quantized_matmul_kernels();
}
#elif PTK_ISA_LEVEL == 4
const QuantizedMatmulKernels& below() {
  return avx512_vnni::quantized_matmul_kernels();
}
#else
const QuantizedMatmulKernels& below() {
  return avx512_bf16::quantized_matmul_kernels();
}
#endif

// Rows of input that the direct kernels of the levels below answer better: tiles overtake them early.
constexpr int64_t kDirectRows = PTK_ISA_LEVEL == 5 ? 4 : PTK_ISA_LEVEL == 4 ? 16 : 0;

bool is_own(const QuantizedForward& p) {
  if (p.m <= kDirectRows || p.input.dtype == DType::f64) return false;
  return p.quantize_input ? PTK_ISA_LEVEL != 4 : PTK_ISA_LEVEL >= 4 && p.input.dtype == DType::bf16;
}
bool is_own(const QuantizedBackward& p) {
  return PTK_ISA_LEVEL >= 4 && p.grad_out.dtype == DType::bf16;
}

bool forward(const QuantizedForward& p) {
  if (!is_own(p)) return below().forward(p);
#if PTK_ISA_LEVEL == 3
  if (DirectProduct<true>::suits(p)) return DirectProduct<true>(p).run();
#endif
#if PTK_ISA_LEVEL != 4
  if (p.quantize_input) return tiled_integers<float>(p);
#endif
#if PTK_ISA_LEVEL >= 4
  return TiledProduct<bf16, float>(p).run();
#endif
  __builtin_unreachable();
}

bool backward(const QuantizedBackward& p) {
  if (!is_own(p)) return below().backward(p);
#if PTK_ISA_LEVEL >= 4
  return TiledInputGradient<bf16>(p).run();
#endif
  __builtin_unreachable();
}

void rows(const QuantizedRows& p) {
  below().rows(p);
}

#else

constexpr bool is_own(const QuantizedForward&) {
  return true;
}
const QuantizedMatmulKernels& below() {
  return quantized_matmul_kernels();
}

bool forward(const QuantizedForward& p) {
  if (DirectProduct<true>::suits(p)) return DirectProduct<true>(p).run();
  if (DirectProduct<false>::suits(p)) return DirectProduct<false>(p).run();
  const DType dtype = p.input.dtype;
  if (p.quantize_input) return dtype == DType::f64 ? tiled_integers<double>(p) : tiled_integers<float>(p);
  switch (dtype) {
  case DType::f64:
    return TiledProduct<double, double>(p).run();
  case DType::f32:
    return TiledProduct<float, float>(p).run();
  case DType::bf16:
    return TiledProduct<bf16, float>(p).run();
  case DType::f16:
    return TiledProduct<f16, float>(p).run();
  }
  __builtin_unreachable();
}

bool backward(const QuantizedBackward& p) {
  switch (p.grad_out.dtype) {
  case DType::f64:
    return TiledInputGradient<double>(p).run();
  case DType::f32:
    return TiledInputGradient<float>(p).run();
  case DType::bf16:
    return TiledInputGradient<bf16>(p).run();
  case DType::f16:
    return TiledInputGradient<f16>(p).run();
  }
  __builtin_unreachable();
}

void rows(const QuantizedRows& p) {
  switch (p.dtype) {
  case DType::f64:
    return decode_rows<double>(p);
  case DType::f32:
    return decode_rows<float>(p);
  case DType::bf16:
    return decode_rows<bf16>(p);
  case DType::f16:
    return decode_rows<f16>(p);
  }
  __builtin_unreachable();
}

#endif

#define PTK_TEXT(x) #x
#define PTK_NAME(isa, kernel) "cpu." PTK_TEXT(isa) "." kernel

const char* describe(const QuantizedForward& p) {
  if (!is_own(p)) return below().describe(p);
#if PTK_ISA_LEVEL <= 3
  if (DirectProduct<true>::suits(p)) return PTK_NAME(PTK_ISA, "direct_int8");
#endif
#if PTK_ISA_LEVEL < 3
  if (DirectProduct<false>::suits(p)) return PTK_NAME(PTK_ISA, "direct");
#endif
  return p.quantize_input ? PTK_NAME(PTK_ISA, "tiled_int8") : PTK_NAME(PTK_ISA, "tiled");
}

}  // namespace

const QuantizedMatmulKernels& quantized_matmul_kernels() {
  static constexpr QuantizedMatmulKernels kernels = {forward, backward, rows, describe};
  return kernels;
}

}  // namespace ptk::PTK_ISA
