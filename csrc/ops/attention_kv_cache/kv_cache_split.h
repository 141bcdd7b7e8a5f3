// Into how many parts the slots of a sequence are cut, so that few queries fill a GPU. Torch-free and CUDA-free.
#pragma once

#include <cstdint>

namespace ptk::cuda {

inline constexpr int kSlotsPerStep = 128;
inline constexpr int kRowsPerBlock = 8;

// Enough parts for two blocks on every multiprocessor, none of less than two steps. It depends on sizes alone, not on
// how many slots are filled: a captured graph replays at any length.
constexpr int64_t split_count(int64_t blocks_unsplit, int multiprocessors, int64_t capacity) {
  const int64_t wanted = (2 * static_cast<int64_t>(multiprocessors) + blocks_unsplit - 1) / blocks_unsplit;
  const int64_t most = (capacity + 2 * kSlotsPerStep - 1) / (2 * kSlotsPerStep);
  const int64_t count = wanted < most ? wanted : most;
  return count < 1 ? 1 : count;
}

}  // namespace ptk::cuda
