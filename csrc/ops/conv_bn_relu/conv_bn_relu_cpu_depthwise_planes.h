// Depthwise convolution of channels-first tensors as they lie: one plane after the other, in one or two dimensions.
//
//   layout    a vector holds neighbouring positions. Lines of a plane are copied, widened to the type of the sums, into
//             a window with zeros at its borders, which is divided by the residues of line and column modulo the
//             stride: there, a tap of neighbouring positions is one load, whatever the stride.
//
//   tiling    an item is a band of lines of some channels; a band's window stays in L1. Four lines of positions at a
//             time share what they load. Where the lines of a window are further apart, or its height is not one of
//             the usual, the band is computed as one long line instead, eight vectors at a time, and what lies at the
//             borders is then left out.
//
//   threads   items are dealt out by a counter. Each position sums its taps in order.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_depthwise.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_runs.h"

namespace ptk::PTK_ISA {

template <class T>
class DepthwisePlanes {
  using A = Acc<T>;
  static constexpr int64_t kWindow = 4096;  // elements
  static constexpr int kLane = kLanes<A>, kVectors = 8, kLines = 4;

public:
  DepthwisePlanes(const ConvProblem& problem, const Gather& gather, const T* source, const T* weight,
                  const ConvResult<T>& result)
      : p_(problem), g_(gather), source_(source), weight_(weight), r_(result) {
    width_ = w_.count + (w_.taps - 1) * w_.delta / w_.step;
    if (h_.step == 1 && h_.delta == 1 && (h_.taps == 3 || h_.taps == 5 || h_.taps == 7)) shared_taps_ = h_.taps;
    ld_sums_ = shared_taps_ ? round_up(w_.count, 2 * kLane) : width_;
    const int64_t phases = h_.step * w_.step;
    const int64_t fitting = kWindow / (phases * width_) - reach();
    const int64_t bands = (h_.count + most(1, fitting) - 1) / most(1, fitting);
    band_ = (h_.count + bands - 1) / bands;
    bands_ = (h_.count + band_ - 1) / band_;
    const int64_t planes = g_.batch * bands_, wanted = 8 * num_threads();
    channels_ = most(1, least(kChannels, planes * g_.result_channels / wanted));
  }

  static bool fits(const ConvProblem& p) { return p.in[0] == 1 && p.kernel[0] == 1 && p.padding[0] == 0; }

  // Copies of short lines, or of every other element, take longer than a transposition.
  static bool pays(const ConvProblem& p) { return p.stride[1] == 1 && p.stride[2] == 1 && volume(p.out) >= 196; }

  static int64_t packed_kind() { return 0; }
  static int64_t packed_bytes() { return 0; }
  static bool pack(void*) { return true; }
  Blocks blocks() const { return {h_.count * w_.count, most(1, g_.positions()), g_.positions()}; }

  // False when memory ran out.
  bool run(const void*) const {
    const int64_t chunks = (g_.result_channels + channels_ - 1) / channels_;
    bool ok = true;
    parallel_items(g_.batch * bands_ * chunks, [&](int64_t i) {
      if (!item(i / chunks / bands_, i / chunks % bands_ * band_, i % chunks * channels_))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  static constexpr int64_t kChannels = 16;

  // Lines of one residue that a band needs beyond its own.
  int64_t reach() const { return (h_.taps - 1) * h_.delta / h_.step; }
  int64_t phase_size() const { return (band_ + reach()) * width_; }
  // What a position's taps read, counted from the window's element of the same line and column.
  int64_t tap_in_window(int64_t y, int64_t x) const {
    y *= h_.delta, x *= w_.delta;
    return (y % h_.step * w_.step + x % w_.step) * phase_size() + y / h_.step * width_ + x / w_.step;
  }

  // Elements of a line that belong to one residue of the column: `count` of them from `source`, to column `at`.
  struct Columns {
    int64_t source, at, count;
  };
  Columns columns_of(int64_t phase) const {
    const int64_t offset = phase + w_.base;
    const int64_t at = offset >= 0 ? 0 : (-offset + w_.step - 1) / w_.step;
    const int64_t end = least(width_, (w_.source - offset + w_.step - 1) / w_.step);
    return {at * w_.step + offset, at, most(0, end - at)};
  }

  struct Scratch {
    A *window, *sums, *line;
    int64_t* taps;
    Columns* columns;
  };
  Scratch carve(Carver& carver) const {
    const int64_t slack = (kVectors + 1) * kLane + (kLines - 1) * width_;
    Scratch s;
    s.window = carver.take<A>(h_.step * w_.step * phase_size() + slack);
    s.sums = carver.take<A>(round_up(band_, kLines) * ld_sums_ + slack);
    s.line = carver.take<A>(std::is_same_v<A, T> ? 0 : w_.source);
    s.taps = carver.take<int64_t>(h_.taps * w_.taps);
    s.columns = carver.take<Columns>(w_.step);
    return s;
  }

  bool item(int64_t image, int64_t begin, int64_t first) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    const int64_t lines = least(band_, h_.count - begin), taps = h_.taps * w_.taps;
    for (int64_t i = 0; i < taps; ++i) s.taps[i] = tap_in_window(i / w_.taps, i % w_.taps);
    for (int64_t i = 0; i < w_.step; ++i) s.columns[i] = columns_of(i);
    // The borders are the same in all channels.
    std::memset(s.window, 0, (h_.step * w_.step * phase_size()) * sizeof(A));
    for (int64_t c = first; c < least(first + channels_, g_.result_channels); ++c) {
      const int64_t plane = image * g_.result_channels + c;
      copy_lines(source_ + plane * h_.source * w_.source, begin, lines, s);
      sum(s, weight_ + c * taps, lines);
      finish(s.sums, c, (plane * h_.count + begin) * w_.count, lines);
    }
    release_large_scratch();
    return true;
  }

  // The lines of a plane that a band of the result needs, into the window.
  void copy_lines(const T* plane, int64_t begin, int64_t lines, const Scratch& s) const {
    const int64_t top = begin * h_.step + h_.base, span = (lines - 1) * h_.step + (h_.taps - 1) * h_.delta + 1;
    const int64_t low = most(0, -top), high = least(span, h_.source - top);
    for (int64_t phase = 0; phase < h_.step; ++phase) {
      int64_t skipped = low > phase ? (low - phase + h_.step - 1) / h_.step : 0;
      A* to = s.window + phase * w_.step * phase_size() + skipped * width_;
      for (int64_t row = phase + skipped * h_.step; row < high; row += h_.step, to += width_) {
        // The next channel's plane is on its way.
        __builtin_prefetch(plane + (h_.source + top + row) * w_.source);
        const A* line = widened(plane + (top + row) * w_.source, s.line);
        for (int64_t i = 0; i < w_.step; ++i) {
          const Columns& columns = s.columns[i];
          copy_spaced(line + columns.source, w_.step, columns.count, to + i * phase_size() + columns.at);
        }
      }
    }
  }

  const A* widened(const T* line, A* buffer) const {
    if constexpr (std::is_same_v<A, T>) {
      return line;
    } else {
      pack_row(line, 1, w_.source, w_.source, buffer);
      return buffer;
    }
  }

  void sum(const Scratch& s, const T* weight, int64_t lines) const {
    switch (shared_taps_) {
    case 3:
      return sum_lines<3>(s, weight, lines);
    case 5:
      return sum_lines<5>(s, weight, lines);
    case 7:
      return sum_lines<7>(s, weight, lines);
    default:
      const int64_t count = (lines - 1) * width_ + w_.count, taps = h_.taps * w_.taps;
      int64_t i = 0;
      for (; i + kVectors / 2 * kLane < count; i += kVectors * kLane) sum_vectors<kVectors>(s, weight, taps, i);
      for (; i < count; i += 2 * kLane) sum_vectors<2>(s, weight, taps, i);
    }
  }

  // Windows of H lines, each next to the one before it.
  template <int H>
  void sum_lines(const Scratch& s, const T* weight, int64_t lines) const {
    for (int64_t y = 0; y < lines; y += kLines) {
      int64_t x = 0;
      for (; x + kLane < w_.count; x += 2 * kLane) sum_square<H, 2>(s, weight, y, x);
      if (x < w_.count) sum_square<H, 1>(s, weight, y, x);
    }
  }

  // kLines lines of V vectors. Line l of the window is line l - i of the taps of the i-th line of positions.
  template <int H, int V>
  PTK_INLINE void sum_square_of(const A* window, int64_t ld, const int64_t* taps, int64_t width, const T* weight, A* sums,
                                int64_t ld_sums) {
    Vec<A> sum[kLines][V] = {};
    for (int64_t t = 0; t < width; ++t) {
      Vec<A> factor[H];
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) factor[h] = broadcast(load_scalar(weight + h * width + t));
      const A* from = window + taps[t];
#pragma GCC unroll 16
      for (int line = 0; line < kLines + H - 1; ++line, from += ld) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          Vec<A> x = load(from + v * kLane);
          PTK_OPAQUE(x);
#pragma GCC unroll 4
          for (int i = 0; i < kLines; ++i)
            if (line - i >= 0 && line - i < H) sum[i][v] += x * factor[line - i];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(sums + i * ld_sums + v * kLane, sum[i][v]);
  }
  template <int H, int V>
  void sum_square(const Scratch& s, const T* weight, int64_t y, int64_t x) const {
    sum_square_of<H, V>(s.window + y * width_ + x, width_, s.taps, w_.taps, weight, s.sums + y * ld_sums_ + x, ld_sums_);
  }

  template <int V>
  PTK_INLINE void sum_vectors(const Scratch& s, const T* weight, int64_t taps, int64_t at) {
    Vec<A> sum[V] = {};
    const A* window = s.window + at;
    for (int64_t i = 0; i < taps; ++i) {
      const Vec<A> factor = broadcast(load_scalar(weight + i));
      const A* from = window + s.taps[i];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[v] += load(from + v * kLane) * factor;
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(s.sums + at + v * kLane, sum[v]);
  }

  // A vector may run over into the next line of the band, which is written after it.
  void finish(const A* sums, int64_t channel, int64_t at, int64_t lines) const {
    const ConvResult<T> r = r_;
    const typename ConvResult<T>::Vectors v = r.of(channel);
    const int64_t end = at + lines * w_.count;
    for (int64_t y = 0; y < lines; ++y, at += w_.count, sums += ld_sums_)
      for (int64_t x = 0; x < w_.count; x += kLane)
        r.finish(load(sums + x), v, r.residual ? r.residual + at + x : nullptr, r.out + at + x, end - at - x);
  }

  const ConvProblem& p_;
  const Gather& g_;
  const Axis &h_ = g_.axis[1], &w_ = g_.axis[2];
  const T *source_, *weight_;
  const ConvResult<T>& r_;
  int64_t width_, band_, bands_, channels_, ld_sums_;
  int64_t shared_taps_ = 0;  // lines of taps that neighbouring lines of positions share; 0: not used
};

}  // namespace ptk::PTK_ISA
