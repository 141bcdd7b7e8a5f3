// Tiles between global and shared memory by the copy engine (TMA, cp.async.bulk.tensor): sm_90.
#pragma once

#include "csrc/core/checks.h"
#include "csrc/cuda/barrier.cuh"
#include "csrc/cuda/tensor_map.cuh"

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

namespace ptk::cuda {

// Passed to kernels by value.
struct TensorMap {
  CUtensorMap map;
};

// The driver's function is looked up at run time: nothing is linked against libcuda.
inline TensorMap make_tensor_map(const TensorMapShape& shape, bool is_bfloat16) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    PTK_CHECK(found == cudaDriverEntryPointSuccess, "ptkernels: the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  const TensorMapParameters parameters = tensor_map_parameters(shape);
  const char* refused = refused_by_copy_engine(parameters, reinterpret_cast<uintptr_t>(shape.data));
  PTK_CHECK(refused == nullptr, "ptkernels: a tensor map: got ", refused);
  const cuuint32_t steps[] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map.map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(shape.data), parameters.sizes, parameters.strides, parameters.box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  PTK_CHECK(result == CUDA_SUCCESS, "ptkernels: cuTensorMapEncodeTiled failed with ", static_cast<int>(result));
  return map;
}

// Starts to copy the tile at (outer, middle, row, col) by one thread; zeros stand in for what lies outside. `arrived`
// gets tile_middle * tile_rows * 128 bytes. shared is a multiple of 1024.
__device__ inline void copy_tile(void* shared, const TensorMap& map, Barrier& arrived, int outer, int middle, int row,
                                 int col) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
               "%6}], [%2];" ::"r"(shared_address(shared)),
               "l"(reinterpret_cast<uint64_t>(&map.map)), "r"(shared_address(&arrived)), "r"(col), "r"(row),
               "r"(middle), "r"(outer)
               : "memory");
}

__device__ inline void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map.map)) : "memory");
}

}  // namespace ptk::cuda
