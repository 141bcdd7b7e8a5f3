// Arithmetic that the compiler does not contract: a product that is rounded before it is added to anything.
#pragma once

namespace ptk::cuda {

__device__ inline float multiply_rounded(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ inline double multiply_rounded(double a, double b) {
  return __dmul_rn(a, b);
}

}  // namespace ptk::cuda
