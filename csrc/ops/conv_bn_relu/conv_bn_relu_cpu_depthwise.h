// Depthwise convolution: as many groups as channels, one result channel each. No product is large enough for the
// engine.
//
//   layout   channels last; a vector holds neighbouring channels. Weights are brought to [tap][channel] once per call.
//
//   tiling   an item is some lines of positions. Up to eight positions share each vector of weights where all of their
//   taps
//            are inside; fewer take more channels at a time, so that there are always enough sums to hide the latency
//            of an addition. Positions at the borders are computed one at a time, over the taps that are inside.
//            Where many are at the borders, or taps are many, an item is a band of lines and some of the channels
//            instead, and reads a copy of its part of the source, in L1, with zeros around it: then all positions are
//            alike.
//
//   weight gradient: lines are divided into segments whose number depends on the problem alone, each with sums of its
//            own, which are added in order.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_implicit.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_runs.h"

namespace ptk::PTK_ISA {

template <class T>
class DepthwiseConv {
  using A = Acc<T>;

public:
  DepthwiseConv(const Gather& gather, const T* source, const T* weight, const ConvResult<T>& result)
      : g_(gather), source_(source), weight_(weight), r_(result) {
    // Positions whose taps are all inside.
    const int64_t reach = (w_.taps - 1) * w_.delta, low = w_.base + least(0, reach), high = w_.base + most(0, reach);
    first_inner_ = least(w_.count, low >= 0 ? 0 : (-low + w_.step - 1) / w_.step);
    const int64_t last = w_.source - 1 - high;
    inner_end_ = most(first_inner_, last < 0 ? 0 : least(w_.count, last / w_.step + 1));
    const Axis &d_ = g_.axis[0], &h_ = g_.axis[1];
    const bool is_plane = d_.taps == 1 && d_.source == 1 && d_.count == 1 && d_.base == 0;
    const bool is_inner = 5 * (inner_end_ - first_inner_) >= 4 * w_.count;
    if (!is_plane || g_.taps() == 0 || (is_inner && g_.taps() < kManyTaps)) return;
    window_width_ = (w_.count - 1) * w_.step + (w_.taps - 1) * w_.delta + 1;
    const int64_t span = (h_.taps - 1) * h_.delta + 1;
    // Fewer channels leave room for more lines, and each is read again for `span` lines of positions.
    for (;; chunk_ /= 2) {
      const int64_t fitting = kWindowBytes / (window_width_ * chunk_ * static_cast<int64_t>(sizeof(T)));
      if (fitting >= span) band_ = least(h_.count, (fitting - span) / h_.step + 1);
      if (band_ >= least(span, h_.count) || chunk_ <= kLanes<A>) break;
    }
  }

  int64_t lines() const { return g_.batch * g_.axis[0].count * g_.axis[1].count; }
  Blocks blocks() const { return {w_.count, most(1, g_.positions()), g_.positions()}; }

  static bool packs_on_the_way() { return false; }
  int64_t packed_kind() const { return 0; }
  int64_t packed_bytes() const { return most(1, g_.taps()) * ld_weight() * static_cast<int64_t>(sizeof(A)); }

  bool pack(void* to) const {
    A* packed = static_cast<A*>(to);
    const int64_t volume = g_.kernel[0] * g_.kernel[1] * g_.kernel[2];
    int64_t tap = 0;
    for (int64_t row = 0; row < g_.axis[0].taps * g_.axis[1].taps; ++row)
      for (int64_t t = 0; t < w_.taps; ++t, ++tap) {
        const T* from = weight_ + tap_offset(g_, row / g_.axis[1].taps, row % g_.axis[1].taps, t);
        for (int64_t c = 0; c < ld_weight(); ++c)
          packed[tap * ld_weight() + c] = c < channels_ ? load_scalar(from + c * volume) : A(0);
      }
    return true;
  }

  // False when memory ran out.
  bool run(const void* packed) const {
    const A* weight = static_cast<const A*>(packed);
    const int64_t bands = band_ ? (g_.axis[1].count + band_ - 1) / band_ : 0,
                  chunks = (channels_ + chunk_ - 1) / chunk_;
    // Neighbouring lines read the same lines of the source.
    const int64_t together = most(1, least(8, lines() / (4 * num_threads())));
    bool ok = true;
    parallel_items(band_ ? g_.batch * bands * chunks : (lines() + together - 1) / together, [&](int64_t i) {
      if (!(band_ ? band(weight, i / chunks / bands, i / chunks % bands * band_, i % chunks * chunk_)
                  : some_lines(weight, i * together, least(lines(), (i + 1) * together))))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  static constexpr int64_t kMostChannels = 64, kWindowBytes = 48 * 1024;
  // So many that a copy of the source costs little beside them.
  static constexpr int64_t kManyTaps = 25;

  int64_t ld_weight() const { return round_up(channels_, kLanes<A>); }
  bool is_transposed() const {
    return r_.layout == Layout::channels_first && channels_ > 1 &&
           g_.axis[0].out_size * g_.axis[1].out_size * w_.out_size > 1;
  }

  // The taps of a position that lie inside the source: where, counted from the start of the image, and their weights.
  struct Tap {
    int64_t from, weight;
  };
  struct Taps {
    int64_t count = 0;
    Tap* list;
  };
  void find_taps(const Position& p, int64_t at, Taps& taps) const {
    const Axis &d_ = g_.axis[0], &h_ = g_.axis[1];
    taps.count = 0;
    for (int64_t row = 0; row < d_.taps * h_.taps; ++row) {
      const int64_t d = p.source[0] + row / h_.taps * d_.delta, h = p.source[1] + row % h_.taps * h_.delta;
      if (d < 0 || d >= d_.source || h < 0 || h >= h_.source) continue;
      for (int64_t t = 0; t < w_.taps; ++t) {
        const int64_t w = at * w_.step + w_.base + t * w_.delta;
        if (w >= 0 && w < w_.source)
          taps.list[taps.count++] = {((d * h_.source + h) * w_.source + w) * channels_,
                                     (row * w_.taps + t) * ld_weight()};
      }
    }
  }

  // Positions that share their taps: `from` at the first one's image, `out` and `residual` at the first one, all at
  // channel 0 of what they point to; neighbouring positions are a step apart in the source, ld_out in the result.
  struct Operands {
    const Taps& taps;
    const A* weight;
    const T* from;
    int64_t step;
    T* out;
    const T* residual;
    int64_t ld_out;
  };

  // V vectors from channel c of N positions, of whose last vector `valid` channels exist; in the result that is channel
  // first + c.
  template <int N, int V>
  PTK_INLINE void block(const ConvResult<T>& result, const Operands& o, int64_t first, int64_t c, int64_t valid) {
    constexpr int lanes = kLanes<A>;
    Vec<A> sum[N][V] = {};
    for (int64_t i = 0; i < o.taps.count; ++i) {
      const T* from = o.from + o.taps.list[i].from + c;
      const A* w = o.weight + o.taps.list[i].weight + first + c;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<A> factor = load(w + v * lanes);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[n][v] += load_as_partial(from + n * o.step + v * lanes, valid) * factor;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const auto vectors = result.at(first + c + v * lanes);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const int64_t to = n * o.ld_out + c + v * lanes;
        result.finish(sum[n][v], vectors, o.residual ? o.residual + to : nullptr, o.out + to, valid);
      }
    }
  }

  // Channels [first, first + channels) of N positions.
  template <int N>
  void positions(const Operands& o, int64_t first, int64_t channels) const {
    constexpr int lanes = kLanes<A>, vectors = N >= 8 ? 1 : N >= 2 ? 8 / N : 4;
    int64_t c = 0;
    for (; c + vectors * lanes <= channels; c += vectors * lanes) block<N, vectors>(r_, o, first, c, lanes);
    if constexpr (vectors > 1)
      for (; c + lanes <= channels; c += lanes) block<N, 1>(r_, o, first, c, lanes);
    if (c < channels) block<N, 1>(r_, o, first, c, channels - c);
  }

  // Up to `count` positions, as many as one kernel takes. Returns how many.
  int64_t some_positions(const Operands& o, int64_t count, int64_t first, int64_t channels) const {
    constexpr int widest = GemmTraits<T>::kMr > 8 ? 16 : 8;  // with 32 registers
    if (count >= widest) return positions<widest>(o, first, channels), widest;
    if (count >= 8) return positions<8>(o, first, channels), 8;
    if (count >= 4) return positions<4>(o, first, channels), 4;
    if (count >= 2) return positions<2>(o, first, channels), 2;
    return positions<1>(o, first, channels), 1;
  }

  // Where the result of one line is written, and the residual read: in place, or in rows that go to planes afterwards.
  struct Target {
    T* out;
    const T* residual;
    int64_t ld;
  };
  int64_t space() const { return g_.axis[0].out_size * g_.axis[1].out_size * w_.out_size; }
  Target target(const Position& p, int64_t index, int64_t first, int64_t channels, T* rows) const {
    if (!is_transposed()) {
      const int64_t at = p.out * channels_ + first;
      return {r_.out + at, r_.residual ? r_.residual + at : nullptr, w_.out_step * channels_};
    }
    T* residual = r_.residual ? rows + w_.count * channels : nullptr;
    const int64_t begin = index * w_.count;
    if (residual)
      rows_from_planes(r_.residual, channels_, space(), begin, begin + w_.count, first, channels, residual, channels);
    return {rows, residual, channels};
  }
  void finish_line(const Target& target, int64_t index, int64_t first, int64_t channels) const {
    const int64_t begin = index * w_.count;
    if (is_transposed())
      planes_from_rows(target.out, channels, r_.out, channels_, space(), begin, begin + w_.count, first, channels);
    if (r_.statistics) {
      A* to = r_.statistics + index * 2 * channels_ + first;
      block_statistics(r_.out + begin * channels_ + first, channels_, w_.count, channels, to, to + channels_);
    }
  }

  struct Scratch {
    Taps taps;
    T *rows, *window;
  };
  Scratch carve(Carver& carver, int64_t channels) const {
    Scratch s;
    s.taps.list = carver.take<Tap>(most(1, g_.taps()));
    s.rows = carver.take<T>(is_transposed() ? 2 * w_.count * channels : 0);
    s.window = carver.take<T>(band_ ? window_rows() * window_width_ * chunk_ : 0);
    return s;
  }

  bool some_lines(const A* weight, int64_t begin, int64_t end) const {
    bool ok = true;
    for (int64_t i = begin; i < end; ++i) ok = ok && line(weight, i);
    return ok;
  }

  bool line(const A* weight, int64_t index) const {
    Carver count;
    carve(count, channels_);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    Scratch s = carve(carver, channels_);
    Position p;
    locate(g_, index * w_.count, 1, &p);
    const Target to = target(p, index, 0, channels_, s.rows);
    const T* image = source_ + p.image * g_.axis[0].source * g_.axis[1].source * w_.source * channels_;
    const int64_t step = w_.step * channels_;
    for (int64_t at = 0, found = -1; at < w_.count;) {
      const bool inner = at >= first_inner_ && at < inner_end_;
      if (!inner || found < 0) find_taps(p, at, s.taps);
      if (inner && found < 0) found = at;
      const Operands o{s.taps,
                       weight,
                       inner ? image + (at - found) * step : image,
                       step,
                       to.out + at * to.ld,
                       to.residual ? to.residual + at * to.ld : nullptr,
                       to.ld};
      at += some_positions(o, inner ? inner_end_ - at : 1, 0, channels_);
    }
    finish_line(to, index, 0, channels_);
    release_large_scratch();
    return true;
  }

  int64_t window_rows() const { return (band_ - 1) * g_.axis[1].step + (g_.axis[1].taps - 1) * g_.axis[1].delta + 1; }

  // Channels [first, first + chunk_) of up to band_ lines of an image.
  bool band(const A* weight, int64_t image, int64_t begin, int64_t first) const {
    const Axis& h_ = g_.axis[1];
    const int64_t channels = least(chunk_, channels_ - first), end = least(h_.count, begin + band_);
    Carver count;
    carve(count, chunk_);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    Scratch s = carve(carver, chunk_);
    copy_window(image, begin * h_.step + h_.base, first, channels, s.window);
    for (int64_t h = 0; h < h_.taps; ++h)
      for (int64_t w = 0; w < w_.taps; ++w)
        s.taps.list[s.taps.count++] = {(h * h_.delta * window_width_ + w * w_.delta) * chunk_,
                                       (h * w_.taps + w) * ld_weight()};
    for (int64_t y = begin; y < end; ++y) {
      const int64_t index = image * h_.count + y, step = w_.step * chunk_;
      Position p;
      locate(g_, index * w_.count, 1, &p);
      const Target to = target(p, index, first, channels, s.rows);
      const T* from = s.window + (y - begin) * h_.step * window_width_ * chunk_;
      for (int64_t at = 0; at < w_.count;) {
        const T* residual = to.residual ? to.residual + at * to.ld : nullptr;
        const Operands o{s.taps, weight, from + at * step, step, to.out + at * to.ld, residual, to.ld};
        at += some_positions(o, w_.count - at, first, channels);
      }
      finish_line(to, index, first, channels);
    }
    release_large_scratch();
    return true;
  }

  // window[row from `top`][pixel from the first tap of the first position][channel], zeros outside the source.
  void copy_window(int64_t image, int64_t top, int64_t first, int64_t channels, T* window) const {
    const int64_t height = g_.axis[1].source;
    const int64_t low = least(window_width_, most(0, -w_.base));
    const int64_t high = most(low, least(window_width_, w_.source - w_.base));
    for (int64_t row = 0; row < window_rows(); ++row, window += window_width_ * chunk_) {
      const int64_t y = top + row;
      if (y < 0 || y >= height) {
        std::memset(window, 0, window_width_ * chunk_ * sizeof(T));
        continue;
      }
      const T* from = source_ + ((image * height + y) * w_.source + w_.base) * channels_ + first;
      std::memset(window, 0, low * chunk_ * sizeof(T));
      for (int64_t x = low; x < high; ++x) copy_elements(from + x * channels_, channels, window + x * chunk_);
      std::memset(window + high * chunk_, 0, (window_width_ - high) * chunk_ * sizeof(T));
    }
  }

  const Gather& g_;
  const Axis& w_ = g_.axis[2];
  const T *source_, *weight_;
  const ConvResult<T>& r_;
  const int64_t channels_ = g_.result_channels;
  int64_t first_inner_, inner_end_;
  int64_t band_ = 0, window_width_ = 0, chunk_ = kMostChannels;  // lines, 0: they are not copied; pixels; channels
};

template <class T>
class DepthwiseWeightGradient {
  using A = Acc<T>;
  static constexpr int64_t kSegments = 32, kPositions = 8;

public:
  DepthwiseWeightGradient(const Gather& gather, const T* source, const T* grad, T* grad_weight)
      : g_(gather), source_(source), grad_(grad), grad_weight_(grad_weight) {}

  // False when memory ran out.
  bool run() const {
    const int64_t lines = g_.batch * g_.axis[0].count * g_.axis[1].count, segments = most(1, least(kSegments, lines));
    const int64_t size = g_.taps() * ld();
    const SharedBuffer sums(most(1, segments * size) * static_cast<int64_t>(sizeof(A)));
    if (!sums) return false;
    parallel_items(segments, [&](int64_t i) {
      A* to = sums.as<A>() + i * size;
      std::memset(to, 0, size * sizeof(A));
      for (int64_t line = i * lines / segments; line < (i + 1) * lines / segments; ++line) add_line(line, to);
    });
    parallel_items(ld() / kLanes<A>, [&](int64_t i) { finish(sums.as<A>(), segments, size, i * kLanes<A>); });
    return true;
  }

private:
  int64_t ld() const { return round_up(channels_, kLanes<A>); }

  // A few positions at a time for every row of taps, so that gradients stay in L1 and memory is read in order.
  void add_line(int64_t index, A* sums) const {
    const Axis &d_ = g_.axis[0], &h_ = g_.axis[1];
    Position p;
    locate(g_, index * w_.count, 1, &p);
    const T* grad = grad_ + index * w_.count * channels_;
    for (int64_t begin = 0; begin < w_.count; begin += kPositions) {
      const int64_t end = least(w_.count, begin + kPositions);
      for (int64_t row = 0; row < d_.taps * h_.taps; ++row) {
        const int64_t d = p.source[0] + row / h_.taps * d_.delta, h = p.source[1] + row % h_.taps * h_.delta;
        if (d < 0 || d >= d_.source || h < 0 || h >= h_.source) continue;
        add_row(source_ + ((p.image * d_.source + d) * h_.source + h) * w_.source * channels_, grad, begin, end,
                sums + row * w_.taps * ld());
      }
    }
  }

  // The taps of one row at positions [begin, end) of a line of the source.
  void add_row(const T* line, const T* grad, int64_t begin, int64_t end, A* sums) const {
    const int64_t low = begin * w_.step + w_.base, high = (end - 1) * w_.step + w_.base + (w_.taps - 1) * w_.delta;
    if (low >= 0 && high < w_.source) {
      const T* from = line + low * channels_;
      grad += begin * channels_;
      switch (w_.taps) {
      case 3:
        return add_taps<3>(from, grad, end - begin, sums);
      case 5:
        return add_taps<5>(from, grad, end - begin, sums);
      case 7:
        return add_taps<7>(from, grad, end - begin, sums);
      }
    }
    for (int64_t t = 0; t < w_.taps; ++t) {
      const int64_t offset = w_.base + t * w_.delta, last = w_.source - 1 - offset;
      const int64_t first = offset >= 0 ? 0 : (-offset + w_.step - 1) / w_.step;
      const int64_t stop = last < 0 ? 0 : last / w_.step + 1;
      const int64_t from = most(begin, first), count = least(end, stop) - from;
      if (count > 0)
        add_taps<1>(line + (from * w_.step + offset) * channels_, grad + from * channels_, count, sums + t * ld());
    }
  }

  // sums[tap] += over `count` positions of source * grad.
  template <int K>
  void add_taps(const T* source, const T* grad, int64_t count, A* sums) const {
    int64_t c = 0;
    for (; c + kLanes<A> <= channels_; c += kLanes<A>) add_vector<K>(source + c, grad + c, count, kLanes<A>, sums + c);
    if (c < channels_) add_vector<K>(source + c, grad + c, count, channels_ - c, sums + c);
  }
  template <int K>
  inline __attribute__((always_inline)) void add_vector(const T* source, const T* grad, int64_t count, int64_t valid,
                                                        A* sums) const {
    const int64_t step = w_.step * channels_, tap = w_.delta * channels_;
    Vec<A> sum[K];
#pragma GCC unroll 8
    for (int t = 0; t < K; ++t) sum[t] = load(sums + t * ld());
    for (int64_t i = 0; i < count; ++i, source += step, grad += channels_) {
      const Vec<A> factor = load_as_partial(grad, valid);
#pragma GCC unroll 8
      for (int t = 0; t < K; ++t) sum[t] = multiply_add<A>(load_as_partial(source + t * tap, valid), factor, sum[t]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < K; ++t) store(sums + t * ld(), sum[t]);
  }

  // Adds the segments of a vector of channels and writes their weights where they belong.
  void finish(const A* sums, int64_t segments, int64_t size, int64_t channel) const {
    const int64_t taps = g_.taps(), valid = least(kLanes<A>, channels_ - channel);
    T* to = grad_weight_ + channel * taps;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const A* from = sums + tap * ld() + channel;
      Vec<A> sum = load(from);
      for (int64_t s = 1; s < segments; ++s) sum += load(from + s * size);
      A lanes[kLanes<A>];
      store(lanes, sum);
      for (int64_t c = 0; c < valid; ++c) to[c * taps + tap] = round_to<T>(lanes[c]);
    }
  }

  const Gather& g_;
  const Axis& w_ = g_.axis[2];
  const T *source_, *grad_;
  T* grad_weight_;
  const int64_t channels_ = g_.result_channels;
};

}  // namespace ptk::PTK_ISA
