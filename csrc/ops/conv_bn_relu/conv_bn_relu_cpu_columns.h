// Gradients by way of the columns that a convolution's window meets: of pointwise convolutions, whose columns are the
// source itself, and of those of few positions, where it would cost more to rearrange a weight than to multiply by it.
// Weights are read, and their gradients written, once and as they lie in memory.
//
//   equation  columns[p, c * taps + t] = source[channel c, position p moved by tap t], zeros outside
//             grad_weight[o, k] = sum over p of grad_conv[p, o] * columns[p, k]
//             grad_columns[p, k] = sum over o of grad_conv[p, o] * weight[o, k]
//             grad_source: every element the sum of the grad_columns that it is in, in order of positions and taps
//
//   layout    grad_conv is rows of channels; source and grad_source either layout; columns are in memory of the call.
//
//   tiling    both products are those of PlanesConv, whose channels are the positions, or the result channels, and
//             whose plane is a row of columns. Columns are made and added up one chunk of channels at a time.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_planes.h"

namespace ptk::PTK_ISA {

template <class T>
class ColumnsGradient {
  using A = Acc<T>;
  static constexpr int64_t kChannels = 64;  // of a chunk

public:
  explicit ColumnsGradient(const ConvProblem& problem)
      : p_(problem), g_(forward_gather(problem)), taps_(g_.taps()), space_(volume(problem.in)) {}

  // Columns take no more memory than the weights.
  static bool pays(const ConvProblem& p) { return has_few_positions(p) && p.batch * volume(p.out) <= p.out_channels; }

  // False when memory ran out.
  bool weight(const T* grad, const T* source, T* grad_weight) const {
    const SharedBuffer columns(columns_bytes<T>());
    if (!columns) return false;
    for_chunks(g_.positions(), [&](int64_t position, int64_t channel, int64_t end) {
      take(source, position, channel, end, columns.as<T>() + position * depth());
      return true;
    });
    return weight_of_columns(grad, columns.as<T>(), grad_weight);
  }

  // Positions are not shared out among threads: where there are many, and few weights, these would lack work.
  static bool source_is_columns(const ConvProblem& p, const Gather& g) {
    return p.groups == 1 && g.is_pointwise() && g.positions() <= 8192 && p.in_channels * p.out_channels >= 2048;
  }
  bool weight_of_columns(const T* grad, const T* columns, T* grad_weight) const {
    const int64_t outs = p_.out_channels, positions = g_.positions();
    // The other way round where fewer rows and columns are for nothing.
    if (padded(depth(), outs) >= padded(outs, depth()))
      return multiply(outs, positions, depth(), grad, 1, outs, columns, grad_weight);
    const SharedBuffer product(outs * depth() * static_cast<int64_t>(sizeof(T)));
    if (!product || !multiply(depth(), positions, outs, columns, 1, depth(), grad, product.as<T>())) return false;
    parallel_items((outs + kChannels - 1) / kChannels, [&](int64_t i) {
      const int64_t first = i * kChannels;
      transpose_block(product.as<T>() + first, outs, grad_weight + first * depth(), depth(), depth(),
                      least(kChannels, outs - first));
    });
    return true;
  }

  bool input(const T* grad, const T* weight, T* grad_source) const {
    // Not rounded before they are added up.
    const SharedBuffer columns(columns_bytes<A>());
    return columns &&
           multiply(g_.positions(), p_.out_channels, depth(), grad, p_.out_channels, 1, weight, columns.as<A>()) &&
           for_chunks(p_.batch, [&](int64_t image, int64_t channel, int64_t end) {
             return add_image(columns.as<A>(), image, channel, end, grad_source);
           });
  }

private:
  int64_t depth() const { return p_.in_channels * taps_; }
  template <class U>
  int64_t columns_bytes() const {
    return g_.positions() * depth() * static_cast<int64_t>(sizeof(U));
  }

  // What a product of that size takes, up to a constant.
  static int64_t padded(int64_t rows, int64_t columns) {
    return round_up(rows, GemmTraits<T>::kMr) * round_up(columns, GemmTraits<T>::kNr / 2);
  }

  // out[row][column] = sum over k of a[row * ld + k * step] * b[k][column].
  template <class Out>
  bool multiply(int64_t rows, int64_t depth_of_sums, int64_t columns, const T* a, int64_t ld, int64_t step, const T* b,
                Out* out) const {
    Gather g = g_;
    g.batch = 1;
    for (Axis& axis : g.axis) axis = kUnitAxis;
    g.axis[2].count = g.axis[2].source = g.axis[2].out_size = columns;
    g.source_channels = depth_of_sums;
    g.result_channels = rows;
    g.weight_result = ld;
    g.weight_source = step;
    ConvResult<Out> result;
    result.out = out;
    result.layout = Layout::channels_first;
    return PlanesConv<T, Out>(p_, g, b, a, result).run(nullptr);
  }

  template <class Body>
  bool for_chunks(int64_t count, const Body& body) const {
    const int64_t chunks = (p_.in_channels + kChannels - 1) / kChannels;
    bool ok = true;
    parallel_items(count * chunks, [&](int64_t i) {
      const int64_t channel = i % chunks * kChannels;
      if (!body(i / chunks, channel, least(p_.in_channels, channel + kChannels)))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

  // Calls body(pixel of the image, tap) for the pixels that a position meets.
  template <class Body>
  void for_taps(const Position& position, const Body& body) const {
    const Axis *d = &g_.axis[0], *h = &g_.axis[1], *w = &g_.axis[2];
    int64_t tap = 0;
    for (int64_t i = 0; i < d->taps; ++i)
      for (int64_t j = 0; j < h->taps; ++j)
        for (int64_t k = 0; k < w->taps; ++k, ++tap) {
          const int64_t z = position.source[0] + i * d->delta, y = position.source[1] + j * h->delta,
                        x = position.source[2] + k * w->delta;
          if (z < 0 || z >= d->source || y < 0 || y >= h->source || x < 0 || x >= w->source) continue;
          body((z * h->source + y) * w->source + x, tap);
        }
  }

  // Where pixel 0 of a channel is, and the distances to the next of either.
  struct Place {
    int64_t first, channel, pixel;
  };
  Place place(int64_t image, int64_t channel) const {
    const int64_t first = image * p_.in_channels * space_;
    return p_.layout == Layout::channels_first ? Place{first + channel * space_, space_, 1}
                                               : Place{first + channel, 1, p_.in_channels};
  }

  void take(const T* source, int64_t index, int64_t channel, int64_t end, T* columns) const {
    Position position;
    locate(g_, index, 1, &position);
    const Place at = place(position.image, channel);
    T* to = columns + channel * taps_;
    std::memset(to, 0, (end - channel) * taps_ * sizeof(T));
    for_taps(position, [&](int64_t pixel, int64_t tap) {
      const T* from = source + at.first + pixel * at.pixel;
      for (int64_t c = 0; c < end - channel; ++c) to[c * taps_ + tap] = from[c * at.channel];
    });
  }

  // False when memory ran out.
  bool add_image(const A* columns, int64_t image, int64_t channel, int64_t end, T* grad_source) const {
    A* sums = static_cast<A*>(thread_scratch(kChannels * space_ * sizeof(A)));  // [pixel][channel]
    if (!sums) return false;
    std::memset(sums, 0, kChannels * space_ * sizeof(A));
    const int64_t positions = g_.positions() / p_.batch, channels = end - channel;
    for (int64_t index = image * positions; index < (image + 1) * positions; ++index) {
      Position position;
      locate(g_, index, 1, &position);
      const A* from = columns + index * depth() + channel * taps_;
      for_taps(position, [&](int64_t pixel, int64_t tap) {
        A* to = sums + pixel * kChannels;
        for (int64_t c = 0; c < channels; ++c) to[c] += from[c * taps_ + tap];
      });
    }
    const Place at = place(image, channel);
    for (int64_t pixel = 0; pixel < space_; ++pixel)
      for (int64_t c = 0; c < channels; ++c)
        grad_source[at.first + c * at.channel + pixel * at.pixel] = round_to<T>(sums[pixel * kChannels + c]);
    release_large_scratch();
    return true;
  }

  const ConvProblem& p_;
  const Gather g_;
  const int64_t taps_, space_;
};

}  // namespace ptk::PTK_ISA
