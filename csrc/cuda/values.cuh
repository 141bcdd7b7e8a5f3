// Numbers of the host for kernels to read, passed by value: no copy has to wait, and a captured graph replays them.
// Not yet run on a GPU.
//
// Plan                                    threads  registers  shared of a block, at most
//   WriteValues                              256         16    0 KiB
#pragma once

#include <cstdint>

namespace ptk::cuda {

struct WriteValues {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerMultiprocessor = 1;
  struct Params {
    int64_t values[kThreads];
    int count;
    int64_t* out;
  };
  struct Shared {};

  static int64_t blocks(const Params&) { return 1; }

  __device__ static void run(const Params& params, Shared&) {
    if (static_cast<int>(threadIdx.x) < params.count) {
      params.out[threadIdx.x] = params.values[threadIdx.x];
    }
  }
};

}  // namespace ptk::cuda
