// Twin of csrc/cuda/tma.cuh: a tile comes when no thread can go on without it, or at once.
#pragma once

#include "tests/cuda_host/csrc/cuda/barrier.cuh"

namespace ptk::cuda {

struct TensorMapShape {
  const void* data;
  int64_t outer, middle, rows, cols;
  int64_t stride_outer, stride_middle, stride_rows;
  int tile_rows;
  int tile_middle = 1;
};

struct TensorMap {
  TensorMapShape shape;
};

inline constexpr int kTensorMapCols = 64;

inline TensorMap make_tensor_map(const TensorMapShape& shape, bool) {
  const auto check = [](int64_t stride, int64_t size) {
    if (size != 1 && (stride <= 0 || stride % 8 != 0)) {
      throw std::runtime_error("cuda_host: a tensor map with a stride that the copy engine does not take");
    }
  };
  check(shape.stride_rows, shape.rows);
  check(shape.stride_middle, shape.middle);
  check(shape.stride_outer, shape.outer);
  if (reinterpret_cast<uintptr_t>(shape.data) % 16 != 0 || shape.tile_rows > 256 || shape.tile_middle > 256) {
    throw std::runtime_error("cuda_host: a tensor map that the copy engine does not take");
  }
  return {shape};
}

inline void copy_tile(void* shared, const TensorMap& map, Barrier& arrived, int outer, int middle, int row, int col) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) {
    cuda_host::active->fail("a tile is not aligned to 1024 bytes");
  }
  cuda_host::active->submit([=, &arrived, shape = map.shape] {
    char* tile = static_cast<char*>(shared);
    for (int r = 0; r < shape.tile_middle * shape.tile_rows; ++r) {
      const int in_middle = middle + r / shape.tile_rows, in_rows = row + r % shape.tile_rows;
      for (int c = 0; c < kTensorMapCols; ++c) {
        uint16_t value = 0;
        if (in_rows < shape.rows && col + c < shape.cols && in_middle < shape.middle && outer < shape.outer) {
          value =
              static_cast<const uint16_t*>(shape.data)[outer * shape.stride_outer + in_middle * shape.stride_middle +
                                                       in_rows * shape.stride_rows + col + c];
        }
        const int offset = r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2;
        std::memcpy(tile + offset, &value, sizeof value);
      }
    }
    arrived.complete(shape.tile_middle * shape.tile_rows * kTensorMapCols * 2);
  });
}

inline void prefetch_tensor_map(const TensorMap&) {}

}  // namespace ptk::cuda
