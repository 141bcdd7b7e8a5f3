// Depthwise convolution of channels-first tensors as they lie: one plane after the other, in one or two dimensions.
//
//   layout    a vector holds neighbouring positions. Lines of a plane are copied, widened to the type of the sums, into
//             a window with zeros at its borders: there, a tap of neighbouring positions is one load. With a stride of
//             2 a line's even elements come first, then its odd ones.
//
//   tiling    an item is a band of lines of some channels; a band's window stays in L1. Four lines of positions at a
//             time share what they load. Where the lines of a window are further apart, or its height is not one of
//             the usual, the band is computed as one long line instead, eight vectors at a time, and what lies at the
//             borders is then left out.
//
//   weight gradient: an item is some channels of all images; a tap's sum runs over the positions of a band as one long
//             line, in which the gradient is zero at the borders.
//
//   threads   items are dealt out by a counter. Each position sums its taps in order, each weight its bands.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_depthwise.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_runs.h"

namespace ptk::PTK_ISA {

// The part of a plane that a band of lines of positions meets: line l of the window, `width` elements long, is line
// begin * step + l + base of the plane, with zeros where there is none.
template <class T>
class PlaneWindow {
  using A = Acc<T>;
  static constexpr int64_t kElements = 4096;

public:
  static constexpr int kLane = kLanes<A>, kLines = 4;

  explicit PlaneWindow(const Gather& gather) : g_(gather) {
    half_ = w_.count + ((w_.taps - 1) * w_.delta + w_.step - 1) / w_.step;
    width_ = w_.step * half_;
    const int64_t fitting = most(1, (kElements / width_ - reach() - 1) / h_.step + 1),
                  bands = (h_.count + fitting - 1) / fitting;
    band_ = (h_.count + bands - 1) / bands;
    bands_ = (h_.count + band_ - 1) / band_;
  }

  int64_t width() const { return width_; }
  int64_t band() const { return band_; }
  int64_t bands() const { return bands_; }
  int64_t taps() const { return h_.taps * w_.taps; }
  // With room for vectors, and for lines of positions, that begin inside.
  int64_t elements() const { return (lines(band_) + (kLines - 1) * h_.step) * width_ + 9 * kLane; }
  // What a tap reads, counted from the window's element of the same line and column.
  int64_t tap(int64_t i) const { return i / w_.taps * h_.delta * width_ + place(i % w_.taps * w_.delta); }

  // The borders are the same for all channels.
  void clear(A* window) const { std::memset(window, 0, lines(band_) * width_ * sizeof(A)); }

  void copy(const T* plane, int64_t begin, int64_t count, A* window) const {
    const int64_t top = begin * h_.step + h_.base, low = most(0, -top), high = least(lines(count), h_.source - top);
    const int64_t left = most(0, w_.base), at = most(0, -w_.base);
    const int64_t length = most(0, least(width_ - at, w_.source - left));
    for (int64_t row = low; row < high; ++row) {
      const T* from = plane + (top + row) * w_.source + left;
      // The next channel's plane is on its way.
      __builtin_prefetch(from + h_.source * w_.source);
      for (int64_t i = 0; i < least(w_.step, length); ++i) {
        const int64_t elements = (length - i + w_.step - 1) / w_.step;
        A* to = window + row * width_ + place(at + i);
        if constexpr (std::is_same_v<A, T>) {
          copy_spaced(from + i, w_.step, elements, to);
        } else {
          pack_row(from + i, w_.step, elements, elements, to);
        }
      }
    }
  }

  const Gather& g_;
  const Axis &h_ = g_.axis[1], &w_ = g_.axis[2];

private:
  int64_t reach() const { return (h_.taps - 1) * h_.delta; }
  // Of the window, for so many of positions.
  int64_t lines(int64_t count) const { return (count - 1) * h_.step + reach() + 1; }
  // Of an element of a line of the plane in that of the window.
  int64_t place(int64_t column) const { return column % w_.step * half_ + column / w_.step; }

  int64_t half_, width_, band_, bands_;
};

template <class T>
class DepthwisePlanes {
  using A = Acc<T>;
  static constexpr int kLane = kLanes<A>, kVectors = 8, kLines = PlaneWindow<T>::kLines;

public:
  DepthwisePlanes(const Gather& gather, const T* source, const T* weight, const ConvResult<T>& result)
      : g_(gather), source_(source), weight_(weight), r_(result) {
    if (shares_taps(h_.taps, h_.delta)) shared_taps_ = h_.taps;
    ld_sums_ = shared_taps_ ? round_up(w_.count, 2 * kLane) : window_.width();
    const int64_t planes = g_.batch * window_.bands(), wanted = 8 * num_threads();
    channels_ = most(1, least(kChannels, planes * g_.result_channels / wanted));
  }

  static bool shares_taps(int64_t taps, int64_t delta) { return delta == 1 && (taps == 3 || taps == 5 || taps == 7); }
  // Also of a stride of 2, of which no gradient is computed in planes.
  static bool fits_strided(const ConvProblem& p) {
    return is_depthwise(p) && p.in[0] == 1 && p.kernel[0] == 1 && p.padding[0] == 0 && p.stride[1] == 2 &&
           p.stride[2] == 2 && shares_taps(p.kernel[1], p.dilation[1]) && volume(p.out) >= kFewest;
  }

  static bool packs_on_the_way() { return true; }
  static int64_t packed_kind() { return 0; }
  static int64_t packed_bytes() { return 0; }
  static bool pack(void*) { return true; }

  // False when memory ran out.
  bool run(const void*) const {
    const int64_t chunks = (g_.result_channels + channels_ - 1) / channels_, bands = window_.bands();
    bool ok = true;
    parallel_items(g_.batch * bands * chunks, [&](int64_t i) {
      if (!item(i / chunks / bands, i / chunks % bands * window_.band(), i % chunks * channels_))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  static constexpr int64_t kChannels = 16, kFewest = 49;

  struct Scratch {
    A *window, *sums, *weight;
    int64_t* taps;
  };
  Scratch carve(Carver& carver) const {
    Scratch s;
    s.window = carver.take<A>(window_.elements());
    s.sums = carver.take<A>(round_up(window_.band(), kLines) * ld_sums_ + (kVectors + 1) * kLane);
    s.weight = carver.take<A>(window_.taps());
    s.taps = carver.take<int64_t>(window_.taps());
    return s;
  }

  bool item(int64_t image, int64_t begin, int64_t first) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    const int64_t lines = least(window_.band(), h_.count - begin), volume = g_.kernel[0] * g_.kernel[1] * g_.kernel[2];
    for (int64_t i = 0; i < window_.taps(); ++i) s.taps[i] = window_.tap(i);
    window_.clear(s.window);
    for (int64_t c = first; c < least(first + channels_, g_.result_channels); ++c) {
      const int64_t plane = image * g_.result_channels + c;
      for (int64_t i = 0; i < window_.taps(); ++i)
        s.weight[i] = load_scalar(weight_ + c * volume + tap_offset(g_, 0, i / w_.taps, i % w_.taps));
      window_.copy(source_ + plane * h_.source * w_.source, begin, lines, s.window);
      sum(s, lines);
      finish(s.sums, c, (plane * h_.count + begin) * w_.count, lines);
    }
    release_large_scratch();
    return true;
  }

  void sum(const Scratch& s, int64_t lines) const {
    switch (shared_taps_) {
    case 3:
      return h_.step == 1 ? sum_lines<3, 1>(s, lines) : sum_lines<3, 2>(s, lines);
    case 5:
      return h_.step == 1 ? sum_lines<5, 1>(s, lines) : sum_lines<5, 2>(s, lines);
    case 7:
      return h_.step == 1 ? sum_lines<7, 1>(s, lines) : sum_lines<7, 2>(s, lines);
    default:
      const int64_t count = (lines - 1) * window_.width() + w_.count;
      int64_t i = 0;
      for (; i + kVectors / 2 * kLane < count; i += kVectors * kLane) sum_vectors<kVectors>(s, i);
      for (; i < count; i += 2 * kLane) sum_vectors<2>(s, i);
    }
  }

  // Windows of H lines, each S behind the one before it.
  template <int H, int S>
  void sum_lines(const Scratch& s, int64_t lines) const {
    for (int64_t y = 0; y < lines; y += kLines) {
      int64_t x = 0;
      for (; x + kLane < w_.count; x += 2 * kLane) sum_square<H, S, 2>(s, y, x);
      if (x < w_.count) sum_square<H, S, 1>(s, y, x);
    }
  }

  // kLines lines of V vectors. Line l of the window is line l - i * S of the taps of the i-th line of positions.
  template <int H, int S, int V>
  void sum_square(const Scratch& s, int64_t y, int64_t x) const {
    const int64_t ld = window_.width(), width = w_.taps;
    const A* window = s.window + y * S * ld + x;
    Vec<A> sum[kLines][V] = {};
    for (int64_t t = 0; t < width; ++t) {
      Vec<A> factor[H];
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) factor[h] = broadcast(s.weight[h * width + t]);
      const A* from = window + s.taps[t];
#pragma GCC unroll 16
      for (int line = 0; line < (kLines - 1) * S + H; ++line, from += ld) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          Vec<A> x = load(from + v * kLane);
          PTK_OPAQUE(x);
#pragma GCC unroll 4
          for (int i = 0; i < kLines; ++i)
            if (line - i * S >= 0 && line - i * S < H) sum[i][v] += x * factor[line - i * S];
        }
      }
    }
    A* sums = s.sums + y * ld_sums_ + x;
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(sums + i * ld_sums_ + v * kLane, sum[i][v]);
  }

  template <int V>
  void sum_vectors(const Scratch& s, int64_t at) const {
    Vec<A> sum[V] = {};
    for (int64_t i = 0; i < window_.taps(); ++i) {
      const Vec<A> factor = broadcast(s.weight[i]);
      const A* from = s.window + at + s.taps[i];
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

  const Gather& g_;
  const Axis &h_ = g_.axis[1], &w_ = g_.axis[2];
  const PlaneWindow<T> window_{g_};
  const T *source_, *weight_;
  const ConvResult<T>& r_;
  int64_t channels_, ld_sums_;
  int64_t shared_taps_ = 0;  // lines of taps that neighbouring lines of positions share; 0: not used
};

template <class T>
class DepthwisePlanesWeightGradient {
  using A = Acc<T>;
  static constexpr int kLane = kLanes<A>;

public:
  DepthwisePlanesWeightGradient(const Gather& gather, const T* source, const T* grad, T* grad_weight)
      : g_(gather), source_(source), grad_(grad), grad_weight_(grad_weight) {}

  // False when memory ran out.
  bool run() const {
    const int64_t all = g_.result_channels, part = most(1, least(16, all / (4 * num_threads())));
    bool ok = true;
    parallel_items((all + part - 1) / part, [&](int64_t i) {
      if (!item(i * part, least(all, (i + 1) * part))) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  struct Scratch {
    A *window, *grad;
    double* sums;
  };
  Scratch carve(Carver& carver) const {
    Scratch s;
    s.window = carver.take<A>(window_.elements());
    s.grad = carver.take<A>(window_.elements());
    s.sums = carver.take<double>(window_.taps());
    return s;
  }

  bool item(int64_t first, int64_t end) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    const int64_t taps = window_.taps();
    // What vectors read behind a band is multiplied by a gradient of zero, and must be a number.
    for (A* zeros : {s.window, s.grad}) std::memset(zeros, 0, window_.elements() * sizeof(A));
    for (int64_t c = first; c < end; ++c) {
      for (int64_t i = 0; i < taps; ++i) s.sums[i] = 0;
      for (int64_t image = 0; image < g_.batch; ++image)
        for (int64_t begin = 0; begin < h_.count; begin += window_.band())
          add_band(image * g_.result_channels + c, begin, least(window_.band(), h_.count - begin), s);
      for (int64_t i = 0; i < taps; ++i) grad_weight_[c * taps + i] = round_to<T>(static_cast<A>(s.sums[i]));
    }
    release_large_scratch();
    return true;
  }

  void add_band(int64_t plane, int64_t begin, int64_t lines, const Scratch& s) const {
    const int64_t ld = window_.width(), count = (lines - 1) * ld + w_.count;
    if (window_.bands() > 1) window_.clear(s.window);
    window_.copy(source_ + plane * h_.source * w_.source, begin, lines, s.window);
    const T* grad = grad_ + (plane * h_.count + begin) * w_.count;
    for (int64_t y = 0; y < lines; ++y) pack_row(grad + y * w_.count, 1, w_.count, w_.count, s.grad + y * ld);
    for (int64_t i = count; i < round_up(count, 4 * kLane); ++i) s.grad[i] = A(0);
    for (int64_t tap = 0; tap < window_.taps(); ++tap) {
      const A* from = s.window + window_.tap(tap);
      Vec<A> sum[4] = {};
      for (int64_t i = 0; i < count; i += 4 * kLane)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[v] += load(from + i + v * kLane) * load(s.grad + i + v * kLane);
      s.sums[tap] += static_cast<double>(reduce_add<A>((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
  }

  const Gather& g_;
  const Axis &h_ = g_.axis[1], &w_ = g_.axis[2];
  const PlaneWindow<T> window_{g_};
  const T *source_, *grad_;
  T* grad_weight_;
};

}  // namespace ptk::PTK_ISA
