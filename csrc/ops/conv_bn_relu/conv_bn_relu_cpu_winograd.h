// Winograd's minimal filtering F(2x2, 3x3): 3x3 kernels of stride 1, float32.
//
//   out tile = A^T [ sum over channels (G g G^T) * (B^T d B) ] A        d: 4x4 of the source, out tile: 2x2
//
//           | 1  0 -1  0 |        |  1    0    0  |
//     B^T = | 0  1  1  0 |    G = | 1/2  1/2  1/2 |    A^T = | 1  1  1  0 |
//           | 0 -1  1  0 |        | 1/2 -1/2  1/2 |          | 0  1 -1 -1 |
//           | 0  1  0 -1 |        |  0    0    1  |
//
// The products over channels, one matrix product for each of the 16 elements, take 16 multiplications for 4 results
// where the direct sum takes 36. Their sums are a ninth as long as direct ones and the transforms only add, so that the
// error stays about that of a direct sum (tests hold it to the rule of every kernel).
//
//   layout   source and result are channels last. Transformed weights lie in the engine's panels,
//            [element][panel][channel][column]; transformed tiles are rows of channels, [element][tile][channel].
//
//   tiling   an item is a block of consecutive tiles times a range of panels: for kColumns channels at a time 16
//            products into [element][tile][column], then the results of these channels.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_lines.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_result.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_weights.h"

namespace ptk::PTK_ISA {

class WinogradConv {
  using Traits = GemmTraits<float>;
  using V = Vec<float>;
  static constexpr int64_t kNr = Traits::kNr, kLane = kLanes<float>, kElements = 16;
  // Panels pass by once per block of tiles: more tiles read fewer panels, from memory where there are many channels.
  static constexpr int64_t kTiles = 8 * Traits::kMr < 64 ? 12 * Traits::kMr : 8 * Traits::kMr;
  static constexpr int64_t kBlockBytes = 2560 * 1024;
  static constexpr int64_t kCachedWeights = 2 * 1024 * 1024;
  static constexpr int64_t kColumns = 64;  // a block's tiles are read once for so many channels

public:
  WinogradConv(const ConvProblem& problem, const Gather& gather, const float* source, const float* weight,
               const ConvResult<float>& result)
      : p_(problem), g_(gather), source_(source), weight_(weight), r_(result) {
    const int64_t wanted = 2 * num_threads(), fitting = kBlockBytes / (kElements * channels() * 4);
    const int64_t most_tiles = most(Traits::kMr, least(kTiles, fitting / Traits::kMr * Traits::kMr));
    const int64_t blocks = most(1, (tiles() + most_tiles - 1) / most_tiles);
    // Fewer, larger blocks leave a thread idle at the end.
    const int64_t evened = least(most(blocks, wanted), (tiles() + Traits::kMr - 1) / Traits::kMr);
    block_ = round_up((tiles() + evened - 1) / evened, Traits::kMr);
    const int64_t parts = most(1, least(panels(), wanted / most(1, blocks_count())));
    part_ = (panels() + parts - 1) / parts;
  }

  static bool fits(const ConvProblem& p, const Gather& g) {
    if (!p.allows_winograd || p.dtype != DType::f32 || p.groups != 1 || g.axis[0].taps != 1 || g.axis[0].source != 1)
      return false;
    for (int d = 1; d < 3; ++d)
      if (const Axis& a = g.axis[d]; a.taps != 3 || a.step != 1 || a.delta != 1 || a.out_step != 1) return false;
    // With few channels the transforms cost more than the products they save.
    if (g.source_channels < 16 || g.result_channels < 16) return false;
    const int64_t tiles = g.batch * ((g.axis[1].count + 1) / 2) * ((g.axis[2].count + 1) / 2);
    // Fewer would not pay for the transformed weights, nor for tiles that lie outside in good part: 16 products of a
    // tile with their transforms cost about as much as 22 of the 9 that each position takes directly. Weights that no
    // cache keeps cost the time of 16 tiles more to read, being 16 / 9 times as many.
    const bool is_cached = kElements * g.source_channels * g.result_channels <= kCachedWeights;
    return tiles >= 16 && 22 * (is_cached ? tiles : tiles + 16) < 9 * g.positions();
  }

  static bool packs_on_the_way() { return false; }
  int64_t packed_kind() const { return 1; }
  int64_t packed_bytes() const { return kElements * element_stride() * static_cast<int64_t>(sizeof(float)); }

  // False when memory ran out, as for run().
  bool pack(void* to) const {
    const int64_t chunks = (channels() + kPackedChannels - 1) / kPackedChannels;
    bool ok = true;
    parallel_items(panels() * chunks, [&](int64_t i) {
      if (!pack_panel(static_cast<float*>(to), i / chunks, i % chunks * kPackedChannels))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

  bool run(const void* packed) const {
    if (r_.layout == Layout::channels_first && g_.result_channels > 1) return run_channels_first(packed);
    const int64_t parts = (panels() + part_ - 1) / part_;
    bool ok = true;
    parallel_items(blocks_count() * parts, [&](int64_t i) {
      if (!item(static_cast<const float*>(packed), i / parts * block_, i % parts * part_))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    if (ok && r_.statistics) collect();
    return ok;
  }

  // Of positions, for statistics: tiles are no runs of them.
  Blocks blocks() const { return {64, most(1, g_.positions()), g_.positions()}; }

private:
  int64_t channels() const { return g_.source_channels; }
  int64_t panels() const { return (g_.result_channels + kNr - 1) / kNr; }
  int64_t tile_rows() const { return (g_.axis[1].count + 1) / 2; }
  int64_t tile_columns() const { return (g_.axis[2].count + 1) / 2; }
  int64_t tiles() const { return g_.batch * tile_rows() * tile_columns(); }
  int64_t blocks_count() const { return (tiles() + block_ - 1) / block_; }
  int64_t panel_stride() const { return channels() * kNr; }
  int64_t element_stride() const { return panels() * panel_stride(); }

  // By way of channels last.
  bool run_channels_first(const void* packed) const {
    const int64_t space = g_.axis[1].count * g_.axis[2].count, size = g_.batch * g_.result_channels * space;
    const SharedBuffer out(size * static_cast<int64_t>(sizeof(float))),
        residual(r_.residual ? size * static_cast<int64_t>(sizeof(float)) : 0);
    if (!out || !residual) return false;
    ConvResult<float> result = r_;
    result.layout = Layout::channels_last;
    result.out = out.as<float>();
    if (r_.residual) {
      to_channels_last(r_.residual, residual.as<float>(), g_.batch, g_.result_channels, space);
      result.residual = residual.as<float>();
    }
    if (!WinogradConv(p_, g_, source_, weight_, result).run(packed)) return false;
    to_channels_first(result.out, r_.out, g_.batch, g_.result_channels, space);
    return true;
  }

  void collect() const {
    const Blocks b = blocks();
    const int64_t all = g_.result_channels;
    parallel_items(b.count(), [&](int64_t i) {
      float* to = r_.statistics + i * 2 * all;
      block_statistics(r_.out + b.begin(i) * all, all, b.size(i), all, to, to + all);
    });
  }

  bool pack_panel(float* packed, int64_t panel, int64_t first) const {
    const int64_t n0 = panel * kNr, columns = least(kNr, g_.result_channels - n0);
    const int64_t count = least(kPackedChannels, channels() - first);
    float* loose = static_cast<float*>(thread_scratch(kPackedChannels * 9 * kNr * sizeof(float)));
    if (!loose) return false;
    load_weights(g_, weight_, n0, columns, first, count, loose);
    int64_t tap[9];
    for (int i = 0; i < 9; ++i) tap[i] = tap_offset(g_, 0, i / 3, i % 3) * kNr;
    for (int64_t c = 0; c < count; ++c)
      for (int64_t n = 0; n < kNr; n += kLane)
        transform_weights(loose + c * 9 * kNr + n, tap, packed + panel * panel_stride() + (first + c) * kNr + n);
    return true;
  }

  // G g G^T of one channel and a vector of columns.
  void transform_weights(const float* g, const int64_t (&tap)[9], float* to) const {
    V half[4][3];
    for (int j = 0; j < 3; ++j) {
      const V a = load(g + tap[j]), b = load(g + tap[3 + j]), c = load(g + tap[6 + j]);
      half[0][j] = a;
      half[1][j] = (a + c + b) * 0.5f;
      half[2][j] = (a + c - b) * 0.5f;
      half[3][j] = c;
    }
    for (int i = 0; i < 4; ++i) {
      const V a = half[i][0], b = half[i][1], c = half[i][2];
      const V u[4] = {a, (a + c + b) * 0.5f, (a + c - b) * 0.5f, c};
      for (int j = 0; j < 4; ++j) store(to + (i * 4 + j) * element_stride(), u[j]);
    }
  }

  struct Scratch {
    float *tiles, *products, *zeros;
  };
  Scratch carve(Carver& carver) const {
    Scratch s;
    s.tiles = carver.take<float>(kElements * block_ * channels());
    s.products = carver.take<float>(kElements * block_ * kColumns);
    s.zeros = carver.take<float>(channels());
    return s;
  }

  bool item(const float* packed, int64_t begin, int64_t first_panel) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    std::memset(s.zeros, 0, channels() * sizeof(float));
    const int64_t rows = least(block_, tiles() - begin);
    for (int64_t t = 0; t < rows; ++t) transform_tile(begin + t, s.zeros, s.tiles + t * channels());
    const int64_t end = least(panels(), first_panel + part_);
    for (int64_t panel = first_panel; panel < end; panel += kColumns / kNr) {
      const int64_t columns = least(kColumns, (end - panel) * kNr);
      for (int64_t e = 0; e < kElements; ++e)
        gemm<float>(rows, columns, channels(), s.tiles + e * block_ * channels(), channels(),
                    packed + e * element_stride() + panel * panel_stride(), panel_stride(),
                    StoreSums<float>{s.products + e * block_ * kColumns, kColumns});
      for (int64_t t = 0; t < rows; ++t) store_tile(begin + t, s.products + t * kColumns, panel * kNr, columns);
    }
    release_large_scratch();
    return true;
  }

  struct Tile {
    int64_t image, y, x;  // of its first result
  };
  Tile tile(int64_t index) const {
    const int64_t x = index % tile_columns(), rest = index / tile_columns();
    return {rest / tile_rows(), rest % tile_rows() * 2, x * 2};
  }

  // B^T d B of every channel of a tile.
  void transform_tile(int64_t index, const float* zeros, float* to) const {
    const Axis &h = g_.axis[1], &w = g_.axis[2];
    const Tile at = tile(index);
    const float* d[4][4];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const int64_t y = at.y + h.base + i, x = at.x + w.base + j;
        const bool inside = y >= 0 && y < h.source && x >= 0 && x < w.source;
        d[i][j] = inside ? source_ + ((at.image * h.source + y) * w.source + x) * channels() : zeros;
      }
    int64_t c = 0;
    for (; c + kLane <= channels(); c += kLane) transform_channels(d, c, kLane, to + c);
    if (c < channels()) transform_channels(d, c, channels() - c, to + c);
  }

  PTK_INLINE void transform_line(V a, V b, V c, V d, V (&to)[4]) {
    to[0] = a - c;
    to[1] = b + c;
    to[2] = c - b;
    to[3] = b - d;
  }
  inline __attribute__((always_inline)) void transform_channels(const float* (&d)[4][4], int64_t c, int64_t valid,
                                                                float* to) const {
    V half[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      transform_line(load_partial(d[i][0] + c, valid), load_partial(d[i][1] + c, valid),
                     load_partial(d[i][2] + c, valid), load_partial(d[i][3] + c, valid), half[i]);
    const int64_t stride = block_ * channels();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      V v[4];
      transform_line(half[0][j], half[1][j], half[2][j], half[3][j], v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store_partial(to + (i * 4 + j) * stride, v[i], valid);
    }
  }

  // A^T m A, finished, for some channels.
  void store_tile(int64_t index, const float* m, int64_t channel, int64_t columns) const {
    const Tile at = tile(index);
    const Axis &h = g_.axis[1], &w = g_.axis[2];
    const int64_t all = g_.result_channels, stride = block_ * kColumns;
    const int64_t first = ((at.image * h.count + at.y) * w.count + at.x) * all;
    for (int64_t c = channel; c < least(all, channel + columns); c += kLane, m += kLane) {
      V half[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const V a = load(m + j * stride), b = load(m + (4 + j) * stride), e = load(m + (8 + j) * stride);
        half[0][j] = a + b + e;
        half[1][j] = b - e - load(m + (12 + j) * stride);
      }
      const auto vectors = r_.at(c);
      const int64_t valid = all - c;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        if (at.y + i >= h.count) break;
        const int64_t to = first + i * w.count * all + c;
        const float* residual = r_.residual ? r_.residual + to : nullptr;
        r_.finish(half[i][0] + half[i][1] + half[i][2], vectors, residual, r_.out + to, valid);
        if (at.x + 1 < w.count)
          r_.finish(half[i][1] - half[i][2] - half[i][3], vectors, residual ? residual + all : nullptr,
                    r_.out + to + all, valid);
      }
    }
  }

  const ConvProblem& p_;
  const Gather g_;
  const float *source_, *weight_;
  const ConvResult<float>& r_;
  int64_t block_ = 0, part_ = 0;
};

}  // namespace ptk::PTK_ISA
