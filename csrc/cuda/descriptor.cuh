// How wgmma is told where an operand lies in shared memory, for panels of 64 16-bit columns swizzled over 128 bytes
// (the panels of a RowTile).
#pragma once

#include <cstdint>

namespace ptk::cuda {

struct OperandPlace {
  uint32_t start;                                 // byte address in shared memory
  uint32_t panel_stride;                          // bytes between panels; read only where rows are what is summed over
  static constexpr uint32_t kGroupStride = 1024;  // of eight rows
};

// Bits 0-13 start, 16-29 stride of panels, 32-45 stride of groups, all in units of 16 bytes; bits 62-63: 1 is the
// swizzle over 128 bytes.
__host__ __device__ inline uint64_t operand_descriptor(const OperandPlace& place) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(place.start) | field(place.panel_stride) << 16 | field(OperandPlace::kGroupStride) << 32 |
         uint64_t{1} << 62;
}

// The same operand, `bytes` further on: a multiple of 16, within the block's shared memory.
__host__ __device__ inline uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace ptk::cuda
