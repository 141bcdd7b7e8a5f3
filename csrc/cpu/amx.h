// The eight AMX tile registers, each 16 rows of 64 bytes.
//
// Tile numbers are part of the instruction, so the operations are macros over literals. With PTK_EMULATE the same
// macros work on eight arrays in memory: the tile kernels' logic then runs, and is tested, on machines without AMX.
#pragma once

#include "simd.h"

#if PTK_ISA_LEVEL >= 5

#define PTK_TILE_ROWS 16
#define PTK_TILE_BYTES 64

#if !PTK_EMULATE

#define PTK_TILE_ZERO(t) _tile_zero(t)
#define PTK_TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define PTK_TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define PTK_TILE_DP_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
#define PTK_TILE_DP_S8S8(c, a, b) _tile_dpbssd(c, a, b)
#define PTK_TILE_DP_U8S8(c, a, b) _tile_dpbusd(c, a, b)

namespace ptk::PTK_ISA {

// Tiles stay configured for one scope: a configured thread pays for 8 KiB of state at every context switch.
class TileScope {
public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.bytes_per_row[t] = PTK_TILE_BYTES;
      config.rows[t] = PTK_TILE_ROWS;
    }
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace ptk::PTK_ISA

#else  // PTK_EMULATE

namespace ptk::PTK_ISA {

struct TileScope {
  TileScope() {}
  ~TileScope() {}
};

namespace emulated {

struct Tile {
  alignas(64) uint8_t row[PTK_TILE_ROWS][PTK_TILE_BYTES];
};
static thread_local Tile tiles[8];

PTK_INLINE void tile_load(Tile& t, const void* p, int64_t stride) {
  for (int i = 0; i < PTK_TILE_ROWS; ++i)
    std::memcpy(t.row[i], static_cast<const uint8_t*>(p) + i * stride, PTK_TILE_BYTES);
}
PTK_INLINE void tile_store(const Tile& t, void* p, int64_t stride) {
  for (int i = 0; i < PTK_TILE_ROWS; ++i) std::memcpy(static_cast<uint8_t*>(p) + i * stride, t.row[i], PTK_TILE_BYTES);
}

static inline void tile_dp_bf16(Tile& c, const Tile& a, const Tile& b) {
  auto* sum = reinterpret_cast<float (*)[16]>(c.row);
  auto* left = reinterpret_cast<const bf16(*)[32]>(a.row);
  auto* right = reinterpret_cast<const bf16(*)[32]>(b.row);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        sum[m][n] += to_float(left[m][2 * k]) * to_float(right[k][2 * n]) +
                     to_float(left[m][2 * k + 1]) * to_float(right[k][2 * n + 1]);
}

template <class A>
static inline void tile_dp_8bit(Tile& c, const Tile& a, const Tile& b) {
  auto* sum = reinterpret_cast<int32_t (*)[16]>(c.row);
  auto* left = reinterpret_cast<const A(*)[64]>(a.row);
  auto* right = reinterpret_cast<const int8_t (*)[64]>(b.row);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        for (int q = 0; q < 4; ++q)
          sum[m][n] += static_cast<int32_t>(left[m][4 * k + q]) * static_cast<int32_t>(right[k][4 * n + q]);
}

}  // namespace emulated
}  // namespace ptk::PTK_ISA

#define PTK_TILE_ZERO(t) (emulated::tiles[t] = {})
#define PTK_TILE_LOAD(t, p, stride) emulated::tile_load(emulated::tiles[t], p, stride)
#define PTK_TILE_STORE(t, p, stride) emulated::tile_store(emulated::tiles[t], p, stride)
#define PTK_TILE_DP_BF16(c, a, b) emulated::tile_dp_bf16(emulated::tiles[c], emulated::tiles[a], emulated::tiles[b])
#define PTK_TILE_DP_S8S8(c, a, b)                                                                                      \
  emulated::tile_dp_8bit<int8_t>(emulated::tiles[c], emulated::tiles[a], emulated::tiles[b])
#define PTK_TILE_DP_U8S8(c, a, b)                                                                                      \
  emulated::tile_dp_8bit<uint8_t>(emulated::tiles[c], emulated::tiles[a], emulated::tiles[b])

#endif  // PTK_EMULATE

#else  // no tiles at this level

namespace ptk::PTK_ISA {
struct TileScope {
  TileScope() {}
  ~TileScope() {}
};
}  // namespace ptk::PTK_ISA

#endif
