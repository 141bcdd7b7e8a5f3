// Depthwise convolution: as many groups as channels, one result channel each. No product is large enough for the
// engine.
//
//   layout   channels last; a vector holds neighbouring channels. Weights are brought to [tap][channel] once per call.
//
//   tiling   an item is a line of positions. Four positions share each vector of weights where all of their taps are
//            inside; the positions at the borders are computed one at a time, over the taps that are.
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
  static constexpr int64_t kTogether = 4;

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

  // False when memory ran out.
  bool run() const {
    const SharedBuffer packed(most(1, g_.taps()) * ld_weight() * static_cast<int64_t>(sizeof(A)));
    if (!packed) return false;
    pack(packed.as<A>());
    bool ok = true;
    parallel_items(lines(), [&](int64_t i) {
      if (!line(packed.as<A>(), i)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  int64_t ld_weight() const { return round_up(channels_, kLanes<A>); }
  bool is_transposed() const {
    return r_.layout == Layout::channels_first && channels_ > 1 &&
           g_.axis[0].out_size * g_.axis[1].out_size * w_.out_size > 1;
  }

  void pack(A* packed) const {
    const int64_t volume = g_.kernel[0] * g_.kernel[1] * g_.kernel[2];
    int64_t tap = 0;
    for (int64_t row = 0; row < g_.axis[0].taps * g_.axis[1].taps; ++row)
      for (int64_t t = 0; t < w_.taps; ++t, ++tap) {
        const T* from = weight_ + tap_offset(g_, row / g_.axis[1].taps, row % g_.axis[1].taps, t);
        for (int64_t c = 0; c < ld_weight(); ++c)
          packed[tap * ld_weight() + c] = c < channels_ ? load_scalar(from + c * volume) : A(0);
      }
  }

  // Positions [at, at + N) of a line, result rows `ld_out` apart.
  template <int N, bool kInner>
  void positions(const A* weight, const Position& p, int64_t at, T* out, const T* residual, int64_t ld_out) const {
    const Axis &d_ = g_.axis[0], &h_ = g_.axis[1];
    for (int64_t c = 0; c < channels_; c += kLanes<A>) {
      const int64_t valid = channels_ - c;
      Vec<A> sum[N] = {};
      for (int64_t row = 0; row < d_.taps * h_.taps; ++row) {
        const int64_t d = p.source[0] + row / h_.taps * d_.delta, h = p.source[1] + row % h_.taps * h_.delta;
        if (d < 0 || d >= d_.source || h < 0 || h >= h_.source) continue;
        const T* line = source_ + ((p.image * d_.source + d) * h_.source + h) * w_.source * channels_ + c;
        for (int64_t t = 0; t < w_.taps; ++t) {
          const int64_t from = at * w_.step + w_.base + t * w_.delta;
          if (!kInner && (from < 0 || from >= w_.source)) continue;
          const Vec<A> w = load(weight + (row * w_.taps + t) * ld_weight() + c);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) sum[n] += load_as_partial(line + (from + n * w_.step) * channels_, valid) * w;
        }
      }
#pragma GCC unroll 1
      for (int n = 0; n < N; ++n) {
        const int64_t to = (at + n) * ld_out + c;
        r_.finish(sum[n], c, residual ? residual + to : nullptr, out + to, valid);
      }
    }
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
    if (transposed) {
      out = static_cast<T*>(thread_scratch(2 * w_.count * channels_ * sizeof(T)));
      if (!out) return false;
      if (residual) {
        rows_from_planes(residual, channels_, space, begin, end, 0, channels_, out + w_.count * channels_, channels_);
        residual = out + w_.count * channels_;
      }
    } else {
      ld = w_.out_step * channels_;
      out += p.out * channels_;
      if (residual) residual += p.out * channels_;
    }
    int64_t at = 0;
    for (; at < first_inner_; ++at) positions<1, false>(weight, p, at, out, residual, ld);
    for (; at + kTogether <= inner_end_; at += kTogether) positions<kTogether, true>(weight, p, at, out, residual, ld);
    for (; at < w_.count; ++at) positions<1, false>(weight, p, at, out, residual, ld);
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
