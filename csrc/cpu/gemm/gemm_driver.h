// Whole matrix products and machine limits on top of the engine: what tests and benchmarks of the engine itself call.
// Torch-free.
#pragma once

#include "csrc/cpu/isa.h"

#include <cstdint>

namespace ptk {

enum class GemmType : uint8_t { f64, f32, bf16, f16, s8, u8 };

// C[m, n] = act(sum over r, k of A[r, m, k] * B[r, k, n] + bias[n]). Strides in elements. C has A's type (s8/u8: int32)
// and is contiguous; bias is float (f64: double, 8-bit: int32), may be null. For u8, A is unsigned and B signed.
struct GemmProblem {
  GemmType type;
  int64_t reduce, m, n, k;
  const void* a;
  int64_t stride_a[3];
  const void* b;
  int64_t stride_b[3];
  const void* bias;
  bool relu;
  void* c;
};

struct GemmKernels {
  // False when memory ran out.
  bool (*gemm)(const GemmProblem&);
  // Operations per second (a multiply-add is two) of one thread for `seconds`: operands packed and warm in cache.
  double (*warm)(GemmType, int64_t m, int64_t n, int64_t k, double seconds);
  // The same from a loop that only touches registers: the limit that `warm` is a fraction of.
  double (*peak)(GemmType, double seconds);
  // Sums the bytes, a vector at a time.
  int64_t (*read)(const void* data, int64_t bytes);
};

PTK_DECLARE_KERNELS(GemmKernels, gemm_kernels)

}  // namespace ptk
