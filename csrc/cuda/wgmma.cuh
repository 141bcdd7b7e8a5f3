// Products of a warpgroup on the tensor cores (wgmma m64nNk16, N 64 or 128): sm_90a. They run while the warpgroup goes
// on, and read shared memory themselves. Thread layout of the 64 x N result: warp w of the four has rows 16 w to 16 w +
// 15, as an MmaTile<1, N / 8>.
//
// Between an issue and the wait for it, nothing may touch the result or a left operand in registers.
#pragma once

#include "csrc/cuda/barrier.cuh"
#include "csrc/cuda/descriptor.cuh"

namespace ptk::cuda {

// Orders earlier writes of registers before the products that follow.
__device__ inline void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Makes a group of the products since the last group.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `Groups` groups are under way.
template <int Groups>
__device__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

// Keeps the compiler from computing operands in registers later, or reading results earlier, than here.
template <int Tiles>
__device__ void pin(float (&d)[Tiles][4]) {
#pragma unroll
  for (int i = 0; i < Tiles; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
}
template <int Tiles>
__device__ void pin(uint32_t (&a)[Tiles][4]) {
#pragma unroll
  for (int i = 0; i < Tiles; ++i) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  }
}

// clang-format off
#define PTK_RESULT_8(d, i)                                                                                             \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), "+f"(d[i + 1][3])
#define PTK_RESULT_32(d, i) PTK_RESULT_8(d, i), PTK_RESULT_8(d, i + 2), PTK_RESULT_8(d, i + 4), PTK_RESULT_8(d, i + 6)

// d[First...] = (or +=, where accumulate is not 0) left rows times right rows: both operands in shared memory, 16 columns
// of each. Columns First * 8 to First * 8 + N of the result.
template <typename Scalar, int N, int First, int Tiles>
__device__ void multiply_rows_async(float (&d)[Tiles][4], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 128);
  constexpr int first = First;
  if constexpr (N == 64 && kIsBfloat16<Scalar>) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." "bf16.bf16" " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, 0;\n}"
                 : PTK_RESULT_32(d, first)
                 : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (N == 64 && !kIsBfloat16<Scalar>) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." "f16.f16" " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, 0;\n}"
                 : PTK_RESULT_32(d, first)
                 : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (N == 128 && kIsBfloat16<Scalar>) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." "bf16.bf16" " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, p, 1, 1, 0, 0;\n}"
                 : PTK_RESULT_32(d, first), PTK_RESULT_32(d, first + 8)
                 : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (N == 128 && !kIsBfloat16<Scalar>) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." "f16.f16" " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, p, 1, 1, 0, 0;\n}"
                 : PTK_RESULT_32(d, first), PTK_RESULT_32(d, first + 8)
                 : "l"(a), "l"(b), "r"(accumulate));
  }
}

// The same of weights in registers, the left operand of a 64 x 16 product, and 16 rows of N columns in shared memory.
template <typename Scalar, int N, int First, int Tiles>
__device__ void multiply_weights_async(float (&d)[Tiles][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 128);
  constexpr int first = First;
  if constexpr (N == 64 && kIsBfloat16<Scalar>) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." "bf16.bf16" " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
                 : PTK_RESULT_32(d, first)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  } else if constexpr (N == 64 && !kIsBfloat16<Scalar>) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." "f16.f16" " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
                 : PTK_RESULT_32(d, first)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  } else if constexpr (N == 128 && kIsBfloat16<Scalar>) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." "bf16.bf16" " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
                 : PTK_RESULT_32(d, first), PTK_RESULT_32(d, first + 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  } else if constexpr (N == 128 && !kIsBfloat16<Scalar>) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." "f16.f16" " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
                 : PTK_RESULT_32(d, first), PTK_RESULT_32(d, first + 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
}
// clang-format on

#undef PTK_RESULT_8
#undef PTK_RESULT_32

}  // namespace ptk::cuda
