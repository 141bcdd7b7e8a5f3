// Depthwise convolution: as many groups as channels, one result channel each. No product is large enough for the
// engine.
//
//   layout   channels last; a vector holds neighbouring channels. Weights are brought to [tap][channel] once per call.
//
//   tiling   an item is a line of positions. Up to eight positions share each vector of weights where all of their taps
//            are inside; fewer take more channels at a time, so that there are always enough sums to hide the latency
//            of an addition. Positions at the borders are computed one at a time, over the taps that are inside.
//
//   weight gradient: lines are divided into segments whose number depends on the problem alone, each with sums of its
//            own, which are added in order.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_implicit.h"

namespace ptk::PTK_ISA {

static inline bool is_depthwise(const ConvProblem& p) {
  return p.groups > 1 && p.groups == p.in_channels && p.groups == p.out_channels;
}

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
  }

  int64_t lines() const { return g_.batch * g_.axis[0].count * g_.axis[1].count; }
  Blocks blocks() const { return {w_.count, most(1, g_.positions()), g_.positions()}; }

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
    bool ok = true;
    parallel_items(lines(), [&](int64_t i) {
      if (!line(static_cast<const A*>(packed), i)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
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

  // Channels [c, c + V * lanes) of N positions, of whose last vector `valid` channels exist.
  template <int N, int V>
  PTK_INLINE void block(const DepthwiseConv& conv, const Taps& taps, const T* image, const A* weight, int64_t c,
                        int64_t valid, T* out, const T* residual, int64_t ld_out) {
    constexpr int lanes = kLanes<A>;
    const int64_t step = conv.w_.step * conv.channels_;
    Vec<A> sum[N][V] = {};
    for (int64_t i = 0; i < taps.count; ++i) {
      const T* from = image + taps.list[i].from + c;
      const A* w = weight + taps.list[i].weight + c;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<A> factor = load(w + v * lanes);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[n][v] += load_as_partial(from + n * step + v * lanes, valid) * factor;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const auto vectors = conv.r_.at(c + v * lanes);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const int64_t to = n * ld_out + c + v * lanes;
        conv.r_.finish(sum[n][v], vectors, residual ? residual + to : nullptr, out + to, valid);
      }
    }
  }

  // N positions that share their taps, `out` at the first of them.
  template <int N>
  void positions(const Taps& taps, const T* image, const A* weight, T* out, const T* residual, int64_t ld_out) const {
    constexpr int lanes = kLanes<A>, vectors = N >= 8 ? 1 : N >= 2 ? 8 / N : 4;
    int64_t c = 0;
    for (; c + vectors * lanes <= channels_; c += vectors * lanes)
      block<N, vectors>(*this, taps, image, weight, c, lanes, out, residual, ld_out);
    if constexpr (vectors > 1)
      for (; c + lanes <= channels_; c += lanes)
        block<N, 1>(*this, taps, image, weight, c, lanes, out, residual, ld_out);
    if (c < channels_) block<N, 1>(*this, taps, image, weight, c, channels_ - c, out, residual, ld_out);
  }

  bool line(const A* weight, int64_t index) const {
    const bool transposed = is_transposed();
    const int64_t begin = index * w_.count, end = begin + w_.count;
    const int64_t space = g_.axis[0].out_size * g_.axis[1].out_size * w_.out_size;
    Position p;
    locate(g_, begin, 1, &p);
    T* out = r_.out;
    const T* residual = r_.residual;
    int64_t ld = channels_;
    const int64_t taps_bytes = round_up(most(1, g_.taps()) * static_cast<int64_t>(sizeof(Tap)), 64);
    char* scratch =
        static_cast<char*>(thread_scratch(taps_bytes + (transposed ? 2 * w_.count * channels_ * sizeof(T) : 0)));
    if (!scratch) return false;
    Taps taps;
    taps.list = reinterpret_cast<Tap*>(scratch);
    if (transposed) {
      out = reinterpret_cast<T*>(scratch + taps_bytes);
      if (residual) {
        rows_from_planes(residual, channels_, space, begin, end, 0, channels_, out + w_.count * channels_, channels_);
        residual = out + w_.count * channels_;
      }
    } else {
      ld = w_.out_step * channels_;
      out += p.out * channels_;
      if (residual) residual += p.out * channels_;
    }
    const T* image = source_ + p.image * g_.axis[0].source * g_.axis[1].source * w_.source * channels_;
    for (int64_t at = 0, found = -1; at < w_.count;) {
      const bool inner = at >= first_inner_ && at < inner_end_;
      if (!inner || found < 0) find_taps(p, at, taps);
      const T* from = image;
      if (inner) {
        if (found < 0) found = at;
        from += (at - found) * w_.step * channels_;
      }
      T* to = out + at * ld;
      const T* added = residual ? residual + at * ld : nullptr;
      const int64_t left = inner ? inner_end_ - at : 1;
      const auto together = [&]<int N>() {
        positions<N>(taps, from, weight, to, added, ld);
        at += N;
      };
      if (left >= 8) {
        together.template operator()<8>();
      } else if (left >= 4) {
        together.template operator()<4>();
      } else if (left >= 2) {
        together.template operator()<2>();
      } else {
        together.template operator()<1>();
      }
    }
    if (transposed) planes_from_rows(out, channels_, r_.out, channels_, space, begin, end, 0, channels_);
    if (r_.statistics) {
      A* to = r_.statistics + index * 2 * channels_;
      block_statistics(r_.out + begin * channels_, channels_, w_.count, channels_, to, to + channels_);
    }
    release_large_scratch();
    return true;
  }

  const Gather& g_;
  const Axis& w_ = g_.axis[2];
  const T *source_, *weight_;
  const ConvResult<T>& r_;
  const int64_t channels_ = g_.result_channels;
  int64_t first_inner_, inner_end_;
};

template <class T>
class DepthwiseWeightGradient {
  using A = Acc<T>;
  static constexpr int64_t kSegments = 32;

public:
  DepthwiseWeightGradient(const Gather& gather, const T* source, const T* grad, T* grad_weight)
      : g_(gather), source_(source), grad_(grad), grad_weight_(grad_weight) {}

  // False when memory ran out.
  bool run() const {
    const int64_t lines = g_.batch * g_.axis[0].count * g_.axis[1].count, segments = least(kSegments, lines);
    const int64_t size = g_.taps() * ld();
    const SharedBuffer sums(most(1, segments * size) * static_cast<int64_t>(sizeof(A)));
    if (!sums) return false;
    parallel_items(segments, [&](int64_t i) {
      A* to = sums.as<A>() + i * size;
      std::memset(to, 0, size * sizeof(A));
      for (int64_t line = i * lines / segments; line < (i + 1) * lines / segments; ++line) add_line(line, to);
    });
    finish(sums.as<A>(), segments, size);
    return true;
  }

private:
  int64_t ld() const { return round_up(channels_, kLanes<A>); }

  void add_line(int64_t index, A* sums) const {
    const Axis &d_ = g_.axis[0], &h_ = g_.axis[1];
    Position p;
    locate(g_, index * w_.count, 1, &p);
    const T* grad = grad_ + index * w_.count * channels_;
    for (int64_t row = 0; row < d_.taps * h_.taps; ++row) {
      const int64_t d = p.source[0] + row / h_.taps * d_.delta, h = p.source[1] + row % h_.taps * h_.delta;
      if (d < 0 || d >= d_.source || h < 0 || h >= h_.source) continue;
      const T* line = source_ + ((p.image * d_.source + d) * h_.source + h) * w_.source * channels_;
      for (int64_t t = 0; t < w_.taps; ++t) {
        const int64_t offset = w_.base + t * w_.delta, last = w_.source - 1 - offset;
        const int64_t low = offset >= 0 ? 0 : (-offset + w_.step - 1) / w_.step;
        const int64_t high = last < 0 ? 0 : least(w_.count, last / w_.step + 1);
        add_tap(line + offset * channels_, grad, low, high, sums + (row * w_.taps + t) * ld());
      }
    }
  }

  // sums += over positions [low, high) of source * grad, four of them at a time in sums of their own.
  void add_tap(const T* source, const T* grad, int64_t low, int64_t high, A* sums) const {
    const int64_t step = w_.step * channels_;
    for (int64_t c = 0; c < channels_; c += kLanes<A>) {
      const int64_t valid = channels_ - c;
      Vec<A> sum[4] = {};
      int64_t i = low;
      for (; i + 4 <= high; i += 4)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n)
          sum[n] += load_as_partial(source + (i + n) * step + c, valid) *
                    load_as_partial(grad + (i + n) * channels_ + c, valid);
      for (; i < high; ++i)
        sum[0] += load_as_partial(source + i * step + c, valid) * load_as_partial(grad + i * channels_ + c, valid);
      store(sums + c, load(sums + c) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
  }

  void finish(const A* sums, int64_t segments, int64_t size) const {
    const int64_t taps = g_.taps();
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t tap = 0; tap < taps; ++tap) {
        A sum = 0;
        for (int64_t s = 0; s < segments; ++s) sum += sums[s * size + tap * ld() + c];
        grad_weight_[c * taps + tap] = round_to<T>(sum);
      }
  }

  const Gather& g_;
  const Axis& w_ = g_.axis[2];
  const T *source_, *grad_;
  T* grad_weight_;
  const int64_t channels_ = g_.result_channels;
};

}  // namespace ptk::PTK_ISA
