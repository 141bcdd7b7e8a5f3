// Which rows a persistent kernel's tiles of queries hold, and the order in which it takes them. Torch-free and
// CUDA-free.
//
// Query heads of one key head see the same keys, so that their rows can share a tile: one copy of the keys serves them
// all, and a short sequence still fills a tile.
//
// Block b of B takes tiles b, b + B, b + 2 B, ... Within a section of heads the last rows of every head come first:
// under causality they are the longest, and short tiles at the end even out what the blocks have got. Sections follow
// one another, each of as many heads as have keys and values that fit in half of the L2 cache between them.
#pragma once

#include "csrc/ops/attention/attention.h"

#ifdef __CUDACC__
#define PTK_HOST_DEVICE __host__ __device__
#else
#define PTK_HOST_DEVICE
#endif

namespace ptk::cuda {

struct TileSchedule {
  int64_t heads;  // of all batches
  int64_t tiles_per_head;
  int64_t heads_per_section;

  struct Place {
    int64_t head;
    int64_t tile;
  };

  PTK_HOST_DEVICE int64_t count() const { return heads * tiles_per_head; }

  PTK_HOST_DEVICE Place at(int64_t index) const {
    const int64_t section = index / (heads_per_section * tiles_per_head);
    const int64_t first = section * heads_per_section;
    const int64_t size = heads - first < heads_per_section ? heads - first : heads_per_section;
    const int64_t rest = index - first * tiles_per_head;
    return {first + rest % size, tiles_per_head - 1 - rest / size};
  }
};

inline constexpr int64_t kSectionBytes = 25 << 20;  // half of the L2 cache of an H100

// A tile of queries: `rows` neighbouring rows of each of `heads` neighbouring heads, one head after the other.
struct QueryTile {
  int heads;
  int rows;

  struct Place {
    int head;
    int row;
  };

  PTK_HOST_DEVICE Place at(int tile_row) const { return {tile_row / rows, tile_row % rows}; }
};

inline constexpr int kMinRowsPerHead = 16;  // those of a warp are of one head

// As many heads as make the fewest tiles, and no more: a tile of fewer rows of more heads sees the same keys.
constexpr QueryTile choose_query_tile(const Problem& problem, int tile_rows) {
  const int64_t group = problem.heads_q / problem.heads_kv;
  const auto tiles = [&](int heads) {
    const int rows = tile_rows / heads;
    return (problem.len_q + rows - 1) / rows * (group / heads);
  };
  int best = 1;
  for (int heads = 2; heads * kMinRowsPerHead <= tile_rows && group % heads == 0; heads *= 2) {
    best = tiles(heads) < tiles(best) ? heads : best;
  }
  return {best, tile_rows / best};
}

// "Heads" of the schedule are as many as a tile holds.
constexpr TileSchedule make_schedule(const Problem& problem, const QueryTile& tile) {
  const int64_t group = problem.heads_q / problem.heads_kv / tile.heads;
  const int64_t bytes =
      problem.len_k * (problem.dim_qk + problem.dim_v) * static_cast<int64_t>(element_size(problem.dtype));
  const int64_t key_heads = bytes > 0 ? kSectionBytes / bytes : 1;
  const int64_t heads = problem.batch * problem.heads_q / tile.heads;
  const int64_t wanted = (key_heads > 1 ? key_heads : 1) * group;
  return {heads, (problem.len_q + tile.rows - 1) / tile.rows, wanted < heads ? wanted : heads};
}

}  // namespace ptk::cuda
