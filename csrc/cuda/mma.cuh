// Matrix products of one warp on the tensor cores, from sm_80 on: ldmatrix, mma.sync m16n8k16 and conversions.
//
// With g = lane / 4 and t = lane % 4, a lane holds of the 16x8 product, and of any accumulator that is made of such,
//   d[0], d[1] = row g, columns 2t and 2t + 1        d[2], d[3] = row g + 8, the same columns.
// Scalar is torch::headeronly::BFloat16 or Half; sums are float.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace ptk::cuda {

template <typename Scalar>
inline constexpr bool kIsBfloat16 = std::is_same_v<Scalar, torch::headeronly::BFloat16>;

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8x8 matrices of 16-bit values. Lane i gives the address of row i % 8 of matrix i / 8, 16 bytes in shared memory;
// it gets entries (g, 2t) and (g, 2t + 1) of matrix m in matrices[m].
__device__ inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// The same of the transposed matrices: entries (2t, g) and (2t + 1, g) of what lies in shared memory.
__device__ inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// d += A B with A 16x16 and B 16x8. a: rows g and g + 8 of columns 2t.. and, in a[2] and a[3], 2t + 8..; b0 and b1:
// column g of rows 2t.. and 2t + 8...
template <typename Scalar>
__device__ void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kIsBfloat16<Scalar>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two numbers rounded to nearest even, `low` in the lower half.
template <typename Scalar>
__device__ uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  if constexpr (kIsBfloat16<Scalar>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// 2^x within 2 ulp; 0 where the result would be subnormal.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a / b within 2 ulp for b up to 2^126 and for an infinite b.
__device__ inline float divide_approximate(float a, float b) {
  return __fdividef(a, b);
}

// a / b within 1 ulp where nothing overflows or is subnormal: without the call for other cases, around which registers
// would have to be moved.
__device__ inline float divide_in_range(float a, float b) {
  const float reciprocal = divide_approximate(1, b), quotient = a * reciprocal;
  return std::fma(reciprocal, std::fma(-b, quotient, a), quotient);
}
__device__ inline double divide_in_range(double a, double b) {
  return a / b;
}

// Keeps the compiler from computing a pointer in another way than the program does.
template <typename Value>
__device__ void hide_origin(const Value*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// Keeps the compiler from computing what follows from a number anywhere but after this: what would be kept in registers
// from one round of a loop to the next is computed anew.
__device__ inline void hide_origin(int& number) {
  asm volatile("" : "+r"(number));
}

}  // namespace ptk::cuda
