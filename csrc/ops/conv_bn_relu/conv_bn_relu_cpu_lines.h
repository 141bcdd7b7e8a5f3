// The source of a block of positions as lines that the engine reads in place: neighbouring positions of a line are rows
// of A that overlap, `step` pixels apart, and a tap is an offset.
//
//   in place   where no tap of any position lies outside, rows are read from the source itself
//   copied     else, from a copy of the lines that the block meets, in the engine's element type, with zeros at the
//              borders. Every source element is copied once for all taps, not once for each.
//
// Positions are dealt out in blocks: whole lines, or parts of one that is longer than a block.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_gather.h"

namespace ptk::PTK_ISA {

// Every `width` positions are divided into blocks of `rows`, the last of which is what is left.
struct Blocks {
  int64_t rows = 1, width = 1, positions = 0;
  int64_t per_width() const { return (width + rows - 1) / rows; }
  int64_t count() const {
    const int64_t full = positions / width;
    return full * per_width() + (positions - full * width + rows - 1) / rows;
  }
  int64_t begin(int64_t block) const { return block / per_width() * width + block % per_width() * rows; }
  int64_t size(int64_t block) const {
    const int64_t first = block % per_width() * rows;
    return least(rows, least(width, positions - (begin(block) - first)) - first);
  }
};

template <class T>
class Lines {
  using E = Element<T>;
  using Traits = GemmTraits<T>;
  static constexpr int64_t kMaxBytes = 768 * 1024;

public:
  static constexpr int64_t kMaxLines = 128;

  // Positions of one line are rows of the engine's kernels, and what a line leaves over runs in small ones: true if
  // at most a seventh of the time is lost to them. Fewer than `busy` rows do not keep the multipliers busy.
  static bool fits_rows(int64_t width) {
    constexpr int64_t mr = Traits::kMr, busy = detail::kEvenTail<T> ? 5 : 4;
    int64_t cost = 0;
    for (int64_t left = width; left > 0;) {
      const int64_t rows = detail::strip_rows<T>(left);
      cost += rows == mr ? mr : most(rows, busy);
      left -= rows;
    }
    return 7 * cost <= 8 * width;
  }

  Lines(const Gather& g, const DepthSteps& steps, const Blocks& blocks) : g_(g), blocks_(blocks) {
    if (detail::kUsesTiles<T> || g.taps() * g.group_source() == 0) return;
    const Axis &h = g.axis[1], &w = g.axis[2];
    lines_ = most(1, blocks.rows / w.count);
    length_ = least(w.count, blocks.rows);
    const int64_t part = steps.largest().channels;
    is_in_place_ = std::is_same_v<E, T> && g.group_source() % Traits::kKStep == 0;
    for (const Axis& a : g.axis)
      is_in_place_ = is_in_place_ && a.base >= 0 && (a.count - 1) * a.step + a.base + (a.taps - 1) * a.delta < a.source;
    merges_ = w.delta == 1 && (!is_in_place_ || part == g.source_channels);
    if (w.taps == 1) merges_ = true;
    if (!merges_ && steps.largest().rows * steps.largest().taps > kMaxGemmBlocks) return;
    if (!is_in_place_) {
      line_ = ((length_ - 1) * w.step + (w.taps - 1) * w.delta + 1) * pitch(part);
      // The lines lie in one plane of the source, or in up to `planes` of them.
      const int64_t planes = least(lines_, 2 + (lines_ - 1) / h.count), window = (h.taps - 1) * h.delta + 1;
      plane_ = most((lines_ - 1) * h.step + window, (lines_ - planes) * h.step + planes * window);
      if (bytes() > kMaxBytes) return;
    }
    is_used_ = lines_ <= kMaxLines && (fits_rows(length_) || g.is_pointwise());
  }

  bool is_used() const { return is_used_; }
  bool is_in_place() const { return is_in_place_; }
  int64_t bytes() const { return g_.axis[0].taps * plane_ * line_ * static_cast<int64_t>(sizeof(E)); }
  // Elements that a tap of `channels` takes in the copied lines and in the packed weights.
  static int64_t pitch(int64_t channels) { return round_up(channels, Traits::kKStep); }

  // A block of positions, for one part of the channels.
  struct Block {
    int64_t runs, length, starts[kMaxLines];
    const E* data;
  };

  // Points the block at the lines of positions [begin, begin + rows), copied to `buffer` if they must be.
  void take(const T* source, int64_t channel, int64_t channels, int64_t begin, int64_t rows, E* buffer,
            Block& block) const {
    const Axis &d = g_.axis[0], &h = g_.axis[1], &w = g_.axis[2];
    block.length = least(rows, w.count);
    block.runs = rows / block.length;
    int64_t line = begin / w.count;
    const int64_t first = begin % w.count * w.step + w.base;
    if (is_in_place_) {
      if constexpr (std::is_same_v<E, T>) block.data = source + channel;
      for (int64_t r = 0; r < block.runs; ++r, ++line) {
        const int64_t y = line % h.count, z = line / h.count % d.count, image = line / (h.count * d.count);
        const int64_t from = (image * d.source + z * d.step + d.base) * h.source + y * h.step + h.base;
        block.starts[r] = (from * w.source + first) * g_.source_channels;
      }
      return;
    }
    block.data = buffer;
    const int64_t pixels = (block.length - 1) * w.step + (w.taps - 1) * w.delta + 1;
    int64_t at = 0;
    for (int64_t r = 0; r < block.runs;) {
      const int64_t y = line % h.count, z = line / h.count % d.count, image = line / (h.count * d.count);
      const int64_t together = least(block.runs - r, h.count - y);
      const int64_t copied = (together - 1) * h.step + (h.taps - 1) * h.delta + 1;
      for (int64_t tap = 0; tap < d.taps; ++tap) {
        const int64_t plane = z * d.step + d.base + tap * d.delta;
        for (int64_t i = 0; i < copied; ++i) {
          const int64_t row = y * h.step + h.base + i;
          E* to = buffer + (tap * plane_ + at + i) * line_;
          if (plane < 0 || plane >= d.source || row < 0 || row >= h.source) {
            std::memset(to, 0, pixels * pitch(channels) * sizeof(E));
          } else {
            const T* from = source + ((image * d.source + plane) * h.source + row) * w.source * g_.source_channels;
            copy_line(from + channel, channels, first, pixels, to);
          }
        }
      }
      for (int64_t i = 0; i < together; ++i) block.starts[r + i] = (at + i * h.step) * line_;
      at += copied;
      r += together;
      line += together;
    }
  }

  // The operands of one step of depth; weights as pack() of ImplicitConv laid them out. Returns their number.
  int64_t operands(const DepthStep& step, const Block& block, const E* weights, GemmBlock<T>* pairs) const {
    const Axis &d = g_.axis[0], &h = g_.axis[1], &w = g_.axis[2];
    const int64_t line = is_in_place_ ? w.source * g_.source_channels : line_;
    const int64_t plane = is_in_place_ ? h.source * line * d.delta : plane_ * line_;
    int64_t count = 0;
    for (int64_t row = step.row; row < step.row + step.rows; ++row)
      for (int64_t tap = 0; tap < step.taps; tap += merges_ ? step.taps : 1, ++count)
        pairs[count] = {block.data + row / h.taps * plane + row % h.taps * h.delta * line +
                            (step.tap + tap) * w.delta * pixel(step),
                        weights + count * depth(step) * Traits::kNr};
    return count;
  }
  // Of each of them.
  int64_t depth(const DepthStep& step) const { return (merges_ ? step.taps : 1) * pitch(step.channels); }
  int64_t row_stride(const DepthStep& step) const { return g_.axis[2].step * pixel(step); }

private:
  int64_t pixel(const DepthStep& step) const { return is_in_place_ ? g_.source_channels : pitch(step.channels); }

  // Pixels [first, first + pixels) of a line, zeros outside it.
  void copy_line(const T* line, int64_t channels, int64_t first, int64_t pixels, E* to) const {
    const int64_t all = g_.source_channels, width = g_.axis[2].source;
    const int64_t pitch = Lines::pitch(channels);
    const int64_t low = least(pixels, most(0, -first)), high = most(low, least(pixels, width - first));
    std::memset(to, 0, low * pitch * sizeof(E));
    if (channels == all && pitch == all) {
      pack_row(line + (first + low) * all, 1, (high - low) * all, (high - low) * all, to + low * pitch);
    } else {
      for (int64_t i = low; i < high; ++i) pack_row(line + (first + i) * all, 1, channels, pitch, to + i * pitch);
    }
    std::memset(to + high * pitch, 0, (pixels - high) * pitch * sizeof(E));
  }

  const Gather& g_;
  const Blocks blocks_;
  int64_t lines_ = 1, length_ = 1, line_ = 0, plane_ = 0;
  bool is_used_ = false, is_in_place_ = false, merges_ = false;
};

}  // namespace ptk::PTK_ISA
