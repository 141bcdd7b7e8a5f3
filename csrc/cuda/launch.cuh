// Launching kernels on torch's current stream, over the stable ABI.
//
// A kernel is a struct: `Params` (passed by value), `Shared` (what a block shares), `kThreads`, `static int64_t
// blocks(const Params&)` and `__device__ static void run(const Params&, Shared&)`; `kClusterBlocks` where blocks make
// clusters (cluster.cuh). What it does is then free of launch syntax, and any executor of the CUDA model can run it.
#pragma once

#include "csrc/core/checks.h"

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace ptk::cuda {

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerMultiprocessor)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Kernel::run(params, *reinterpret_cast<typename Kernel::Shared*>(shared));
}

// Makes a device current for its lifetime and launches on the stream that torch has current there.
class StreamLauncher {
public:
  static constexpr const char* kDevice = "cuda";

  static bool owns(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

  explicit StreamLauncher(int32_t device_index) : guard_(device_index) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Compute capability of the current device, major * 10 + minor.
  int capability() const {
    return attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  template <typename Kernel>
  void run(const typename Kernel::Params& params) const {
    constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
    const int64_t blocks = Kernel::blocks(params);
    PTK_CHECK(blocks <= kMaxBlocks, "ptkernels: got a problem of ", blocks, " thread blocks, expected at most ",
              kMaxBlocks);
    if (blocks == 0) {
      return;
    }
    constexpr int kShared = std::is_empty_v<typename Kernel::Shared> ? 0 : sizeof(typename Kernel::Shared);
    constexpr int kSharedByDefault = 48 << 10;
    if constexpr (kShared > kSharedByDefault) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    }
    if constexpr (requires { Kernel::kClusterBlocks; }) {
      launch_clusters<Kernel>(params, static_cast<unsigned>(blocks), kShared);
    } else {
      kernel_entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, kShared, stream_>>>(params);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

private:
  template <typename Kernel>
  void launch_clusters(const typename Kernel::Params& params, unsigned blocks, size_t shared) const {
    static_assert(1 < Kernel::kClusterBlocks && Kernel::kClusterBlocks <= 8);  // what every GPU with clusters has
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = Kernel::kClusterBlocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = Kernel::kThreads;
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    config.attrs = &cluster;
    config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel_entry<Kernel>, params));
  }

  static int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace ptk::cuda
