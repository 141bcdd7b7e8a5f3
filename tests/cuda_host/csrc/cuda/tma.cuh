// Twin of csrc/cuda/tma.cuh: a tile comes when no thread can go on without it, or at once.
#pragma once

#include "csrc/cuda/tensor_map.cuh"
#include "tests/cuda_host/csrc/cuda/barrier.cuh"

namespace ptk::cuda {

struct TensorMap {
  const void* data;
  TensorMapParameters parameters;
};

inline TensorMap make_tensor_map(const TensorMapShape& shape, bool) {
  const TensorMapParameters parameters = tensor_map_parameters(shape);
  if (const char* refused = refused_by_copy_engine(parameters, reinterpret_cast<uintptr_t>(shape.data))) {
    throw std::runtime_error(std::string("cuda_host: a tensor map: got ") + refused);
  }
  return {shape.data, parameters};
}

// The place of every entry of the box, columns first, is in bytes, and swizzled over eight rows.
inline void copy_tile(void* shared, const TensorMap& map, Barrier& arrived, int outer, int middle, int row, int col) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) {
    cuda_host::active->fail("a tile is not aligned to 1024 bytes");
  }
  cuda_host::active->submit([=, &arrived, data = map.data, p = map.parameters] {
    char* tile = static_cast<char*>(shared);
    const uint32_t rows = p.box[1] * p.box[2];
    for (uint32_t r = 0; r < rows; ++r) {
      const uint64_t in_middle = middle + r / p.box[1], in_rows = row + r % p.box[1];
      for (uint32_t c = 0; c < p.box[0]; ++c) {
        uint16_t value = 0;
        if (col + c < p.sizes[0] && in_rows < p.sizes[1] && in_middle < p.sizes[2] &&
            static_cast<uint64_t>(outer) < p.sizes[3]) {
          const uint64_t place =
              2 * (col + c) + in_rows * p.strides[0] + in_middle * p.strides[1] + outer * p.strides[2];
          std::memcpy(&value, static_cast<const char*>(data) + place, sizeof value);
        }
        const uint32_t offset = r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2;
        std::memcpy(tile + offset, &value, sizeof value);
      }
    }
    arrived.complete(static_cast<int>(rows * p.box[0] * 2));
  });
}

inline void prefetch_tensor_map(const TensorMap&) {}

}  // namespace ptk::cuda
