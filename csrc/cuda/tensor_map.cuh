// What the copy engine (TMA) is told of a tensor, and what it takes: numbers alone, for the host. tma.cuh makes the
// map.
#pragma once

#include <cstdint>

namespace ptk::cuda {

inline constexpr int kTensorMapCols = 64;  // of a tile: 128 bytes, the width of the swizzle

// A tensor [outer, middle, rows, cols] of 16-bit numbers, and the tile of middle x rows x 64 columns that is copied
// from it into a panel of a RowTile of tile_middle * tile_rows rows.
struct TensorMapShape {
  const void* data;
  int64_t outer, middle, rows, cols;
  int64_t stride_outer, stride_middle, stride_rows;  // in elements; columns are contiguous
  int tile_rows;
  int tile_middle = 1;
};

// The arguments of cuTensorMapEncodeTiled: columns first.
struct TensorMapParameters {
  uint64_t sizes[4];
  uint64_t strides[3];  // bytes; columns have none
  uint32_t box[4];
};

constexpr TensorMapParameters tensor_map_parameters(const TensorMapShape& shape) {
  // Of a dimension of one entry any stride will do, and that of a tensor may be one that the engine does not take.
  const auto stride = [](int64_t elements, int64_t size) {
    return static_cast<uint64_t>(size == 1 ? 16 : 2 * elements);
  };
  return {{static_cast<uint64_t>(shape.cols), static_cast<uint64_t>(shape.rows), static_cast<uint64_t>(shape.middle),
           static_cast<uint64_t>(shape.outer)},
          {stride(shape.stride_rows, shape.rows), stride(shape.stride_middle, shape.middle),
           stride(shape.stride_outer, shape.outer)},
          {kTensorMapCols, static_cast<uint32_t>(shape.tile_rows), static_cast<uint32_t>(shape.tile_middle), 1}};
}

// What the copy engine does not take, or null: the conditions in the documentation of cuTensorMapEncodeTiled.
constexpr const char* refused_by_copy_engine(const TensorMapParameters& parameters, uint64_t address) {
  if (address % 16 != 0) {
    return "an address that is no multiple of 16 bytes";
  }
  for (const uint64_t size : parameters.sizes) {
    if (size == 0 || size > uint64_t{1} << 32) {
      return "a size that is not 1 to 2^32";
    }
  }
  for (const uint64_t stride : parameters.strides) {
    if (stride == 0 || stride % 16 != 0 || stride >= uint64_t{1} << 40) {
      return "a stride that is no multiple of 16 bytes below 2^40";
    }
  }
  for (const uint32_t entries : parameters.box) {
    if (entries == 0 || entries > 256) {
      return "a tile that is not 1 to 256 entries wide";
    }
  }
  return nullptr;
}

}  // namespace ptk::cuda
