// Clusters: blocks that run side by side on neighbouring multiprocessors and reach each other's shared memory: sm_90. A
// kernel has them where it says so with `static constexpr int kClusterBlocks` (launch.cuh), of which its number of
// blocks is a multiple; consecutive blocks make a cluster.
//
// A block's shared memory is there only while the block is: nobody leaves before the others have done with it, nor
// reaches over before the others have begun. A sync_cluster() at both ends sees to that.
#pragma once

#include "csrc/cuda/tma.cuh"

namespace ptk::cuda {

// Which of its cluster's blocks this one is.
__device__ inline int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of all blocks of the cluster meet; what each had written by then is seen by the others. Between arriving
// and waiting a thread may do what needs nobody else.
__device__ inline void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline void sync_cluster() {
  arrive_in_cluster();
  wait_for_cluster();
}

// Where another block of the cluster has what lies at `shared` in this one: for reading and writing as it is.
template <typename Value>
__device__ Value* in_block(Value* shared, int rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<Value*>(address);
}

// Barrier::arrive() at the same barrier of another block, or of this one.
__device__ inline void arrive_in_block(Barrier& barrier, int rank) {
  asm volatile("{\n"
               ".reg .b32 address;\n"
               "mapa.shared::cluster.u32 address, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [address];\n"
               "}" ::"r"(shared_address(&barrier)),
               "r"(rank)
               : "memory");
}

// copy_tile() to the same place in every block whose bit is set, each of whose `arrived` gets the bytes: one read of
// global memory for all.
__device__ inline void copy_tile_to_blocks(void* shared, const TensorMap& map, Barrier& arrived, int outer, int middle,
                                           int row, int col, uint16_t blocks) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
               "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
               "l"(reinterpret_cast<uint64_t>(&map.map)), "r"(shared_address(&arrived)), "r"(col), "r"(row),
               "r"(middle), "r"(outer), "h"(blocks)
               : "memory");
}

}  // namespace ptk::cuda
