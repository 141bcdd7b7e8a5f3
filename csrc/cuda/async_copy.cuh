// cp.async, from sm_80 on: copies from global to shared memory that run while the thread goes on.
#pragma once

#include "csrc/cuda/mma.cuh"

namespace ptk::cuda {

// The first `bytes` of 16, zeros in the rest. Both addresses are multiples of 16; with 0 bytes nothing is read.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Makes a group of this thread's copies since the last group.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `Groups` of this thread's groups are under way. What other threads copied is seen after a
// barrier.
template <int Groups>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

}  // namespace ptk::cuda
