// Everything between the convolution and the result: statistics, normalisation, residual, activation, and back.
//
//   layout   the convolution's result is rows of channels; residual, out and their gradients are what the caller has,
//   and
//            channels-first ones pass through a block of rows in the thread's scratch.
//   numerics statistics of a block of rows are its mean and its sum of squared differences from that mean; blocks are
//            merged in order, in double (Chan, Golub and LeVeque, 1983). Nothing is squared before it is centred.
//   units    what is normalised together is the batch, or an image: no block of rows belongs to two of them, and each
//   has
//            vectors of its own.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_activation.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_layout.h"

namespace ptk::PTK_ISA {

// mean[c] and m2[c] of `rows` rows of `channels`.
template <class T, class A = Acc<T>>
static void block_statistics(const T* x, int64_t ld, int64_t rows, int64_t channels, A* mean, A* m2) {
  const A inverse = A(1) / static_cast<A>(rows);
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    const int64_t valid = channels - c;
    // Differences from the first row: sums of numbers that are large and alike would lose what distinguishes them.
    const Vec<A> first = load_as_partial(x + c, valid);
    Vec<A> sum{}, squares{};
    for (int64_t r = 1; r < rows; ++r) sum += load_as_partial(x + r * ld + c, valid) - first;
    const Vec<A> centre = first + sum * inverse;
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<A> d = load_as_partial(x + r * ld + c, valid) - centre;
      squares += d * d;
    }
    store_partial(mean + c, centre, valid);
    store_partial(m2 + c, squares, valid);
  }
}

// blocks[b] = {mean, m2} of block b of `count` positions. Every `width` positions are divided into blocks of `rows`,
// the last of which is what is left.
template <class A>
static void merge_statistics(const A* blocks, int64_t channels, int64_t rows, int64_t width, int64_t count, A* mean,
                             A* variance) {
  parallel_items((channels + kChannelPadding - 1) / kChannelPadding, [&](int64_t part) {
    for (int64_t c = part * kChannelPadding; c < least(channels, (part + 1) * kChannelPadding); ++c) {
      double centre = 0, m2 = 0, seen = 0;
      const A* block = blocks + c;
      for (int64_t line = 0; line < count; line += width)
        for (int64_t begin = 0, end = least(width, count - line); begin < end; begin += rows, block += 2 * channels) {
          const double here = static_cast<double>(least(rows, end - begin)), all = seen + here;
          const double delta = static_cast<double>(block[0]) - centre;
          centre += delta * (here / all);
          m2 += static_cast<double>(block[channels]) + delta * delta * (seen * here / all);
          seen = all;
        }
      mean[c] = static_cast<A>(centre);
      variance[c] = static_cast<A>(m2 / seen);
    }
  });
}

// u of the centred result of the convolution, exactly as forward and backward must agree on it.
template <class T>
PTK_INLINE Vec<Acc<T>> before_activation(Vec<Acc<T>> centred, Vec<Acc<T>> scale, Vec<Acc<T>> shift, const T* residual,
                                         int64_t valid) {
  Vec<Acc<T>> u = multiply_add<Acc<T>>(centred, scale, shift);
  if (residual) u += load_as_partial(residual, valid);
  return u;
}

// Calls body(activation), the common ones as constants: no branch is then left in a loop.
template <class Body>
static void with_activation(Activation activation, const Body& body) {
  switch (activation) {
  case Activation::none:
    return body(std::integral_constant<Activation, Activation::none>());
  case Activation::relu:
    return body(std::integral_constant<Activation, Activation::relu>());
  case Activation::relu6:
    return body(std::integral_constant<Activation, Activation::relu6>());
  default:
    return body(activation);
  }
}

template <class T>
class Normalize {
  using A = Acc<T>;

public:
  Normalize(const NormalizeParams& params) : f_(params), p_(params.problem) {}

  bool run() const {
    bool ok = true;
    parallel_items(blocks(), [&](int64_t block) {
      T* scratch = nullptr;
      if (is_planes() && !(scratch = take_scratch())) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      forward_block(block, scratch);
    });
    return ok;
  }

  // Gradients that depend on sums over the batch come in a pass of their own.
  bool run_backward(const NormalizeBackwardParams& b) const {
    const bool wants_gradients = b.grad_conv || b.grad_residual, is_one_pass = wants_gradients && !b.batch_statistics;
    const int64_t vectors = units() * channels_ + kChannelPadding;
    const SharedBuffer partial(blocks() * kSumsOfBlock * channels_ * static_cast<int64_t>(sizeof(A))),
        shares(2 * vectors * static_cast<int64_t>(sizeof(A)));
    if (!partial || !shares) return false;
    const Shares share{shares.as<A>(), shares.as<A>() + vectors};
    if (!(is_one_pass ? backward_pass<true, true>(b, partial.as<A>(), share)
                      : backward_pass<true, false>(b, partial.as<A>(), share)))
      return false;
    merge_sums(partial.as<A>(), b);
    if (!is_one_pass && wants_gradients) {
      if (b.batch_statistics) divide_sums(b, shares.as<A>(), shares.as<A>() + vectors);
      if (!backward_pass<false, true>(b, partial.as<A>(), share)) return false;
    }
    if (wants_gradients && b.sum_grad_conv) merge_columns(partial.as<A>(), static_cast<A*>(b.sum_grad_conv));
    return true;
  }

private:
  static constexpr int64_t kRows = 64, kLane = kLanes<A>, kSumsOfBlock = 3;

  bool is_planes() const { return p_.layout == Layout::channels_first && space_ > 1 && channels_ > 1; }
  int64_t units() const { return p_.norm_groups ? p_.batch : 1; }
  int64_t blocks_of_unit() const { return (unit_pixels_ + kRows - 1) / kRows; }
  int64_t blocks() const { return units() * blocks_of_unit(); }

  // The pixels of a block, and where the vectors of its unit begin.
  struct Range {
    int64_t begin, end, vectors;
  };
  Range range(int64_t block) const {
    const int64_t unit = block / blocks_of_unit(), first = block % blocks_of_unit() * kRows;
    return {unit * unit_pixels_ + first, unit * unit_pixels_ + least(unit_pixels_, first + kRows), unit * channels_};
  }
  T* take_scratch() const { return static_cast<T*>(thread_scratch(3 * kRows * channels_ * sizeof(T))); }

  // Rows [begin, end) of a tensor of the caller's: in place, or brought to `scratch`.
  const T* rows_of(const void* tensor, int64_t begin, int64_t end, T* scratch) const {
    if (!tensor) return nullptr;
    const T* data = static_cast<const T*>(tensor);
    if (!is_planes()) return data + begin * channels_;
    rows_from_planes(data, channels_, space_, begin, end, 0, channels_, scratch, channels_);
    return scratch;
  }

  template <class U>
  PTK_INLINE Vec<A> channel(const void* vector, int64_t c, U otherwise) {
    return vector ? load(static_cast<const A*>(vector) + c) : broadcast(static_cast<A>(otherwise));
  }

  void forward_block(int64_t block, T* scratch) const {
    const auto [begin, end, vectors] = range(block);
    const T* z = static_cast<const T*>(f_.conv) + begin * channels_;
    const T* residual = rows_of(f_.residual, begin, end, scratch);
    T* out = is_planes() ? scratch + kRows * channels_ : static_cast<T*>(f_.out) + begin * channels_;
    const int64_t rows = end - begin, unit = vectors;
    with_activation(p_.activation, [&](auto activation) { forward_rows(activation, z, residual, out, rows, unit); });
    if (is_planes())
      planes_from_rows(out, channels_, static_cast<T*>(f_.out), channels_, space_, begin, end, 0, channels_);
  }

  // In the order of memory, which is what limits; what belongs to channels is read again for every row, from L1.
  template <class Kind>
  void forward_rows(Kind activation, const T* z, const T* residual, T* out, int64_t rows, int64_t vectors) const {
    const A slope = static_cast<A>(p_.slope);
    const auto step = [&](int64_t c, int64_t valid) __attribute__((always_inline)) {
      const int64_t k = vectors + c;
      const Vec<A> centred = load_as_partial(z + c, valid) - channel(f_.mean, k, 0);
      const Vec<A> u = before_activation(centred, channel(f_.scale, k, 1), channel(f_.shift, k, 0),
                                         residual ? residual + c : nullptr, valid);
      store_as_partial(out + c, activate(activation, u, slope), valid);
    };
    for (int64_t r = 0; r < rows; ++r, z += channels_, out += channels_) {
      int64_t c = 0;
      for (; c + kLane <= channels_; c += kLane) step(c, kLane);
      if (c < channels_) step(c, channels_ - c);
      if (residual) residual += channels_;
    }
  }

  // Rows of a block, and where the gradients go. Null: not asked for.
  struct BackwardRows {
    const T *z, *residual, *grad;
    T *grad_conv, *grad_residual;
    int64_t rows, vectors;
  };
  // What grad_conv loses to the statistics, scale * du - offset - centred * slope; one vector per unit.
  struct Shares {
    const A *offset, *slope;
  };

  template <bool kSums, bool kGradients>
  bool backward_pass(const NormalizeBackwardParams& b, A* partial, const Shares& shares) const {
    bool ok = true;
    parallel_items(blocks(), [&](int64_t block) {
      T* scratch = nullptr;
      if (is_planes() && !(scratch = take_scratch())) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      backward_block<kSums, kGradients>(b, block, scratch, shares, partial + block * kSumsOfBlock * channels_);
    });
    return ok;
  }

  template <bool kSums, bool kGradients>
  void backward_block(const NormalizeBackwardParams& b, int64_t block, T* scratch, const Shares& shares,
                      A* sums) const {
    const auto [begin, end, vectors] = range(block);
    const int64_t size = kRows * channels_;
    T* grad_residual = !b.grad_residual || !kGradients ? nullptr
                       : is_planes()                   ? scratch + 2 * size
                                                       : static_cast<T*>(b.grad_residual) + begin * channels_;
    const BackwardRows rows{static_cast<const T*>(f_.conv) + begin * channels_,
                            rows_of(f_.residual, begin, end, scratch),
                            rows_of(b.grad_out, begin, end, scratch + size),
                            b.grad_conv ? static_cast<T*>(b.grad_conv) + begin * channels_ : nullptr,
                            grad_residual,
                            end - begin,
                            vectors};
    with_activation(p_.activation, [&](auto activation) {
      // As many channels as have what belongs to them in registers.
      constexpr int wide = GemmTraits<A>::kMr > 8 ? 4 : 2;
      int64_t c = 0;
      const auto columns = [&]<int V>(int64_t valid) {
        backward_columns<V, kSums, kGradients>(activation, b, rows, shares, c, valid, sums);
      };
      for (; c + wide * kLane <= channels_; c += wide * kLane) columns.template operator()<wide>(kLane);
      for (; c + kLane <= channels_; c += kLane) columns.template operator()<1>(kLane);
      if (c < channels_) columns.template operator()<1>(channels_ - c);
    });
    if (grad_residual && is_planes())
      planes_from_rows(grad_residual, channels_, static_cast<T*>(b.grad_residual), channels_, space_, begin, end, 0,
                       channels_);
  }

  // What belongs to V vectors of channels.
  template <int V>
  struct Columns {
    Vec<A> mean[V], scale[V], shift[V];
  };
  template <int V>
  PTK_INLINE Columns<V> columns_at(const NormalizeParams& f, int64_t c) {
    Columns<V> k;
    for (int v = 0; v < V; ++v) {
      k.mean[v] = channel(f.mean, c + v * kLane, 0);
      k.scale[v] = channel(f.scale, c + v * kLane, 1);
      k.shift[v] = channel(f.shift, c + v * kLane, 0);
    }
    return k;
  }

  // Calls body(row's offset, v, centred, du) for V vectors of every row; `valid` channels of the last one exist.
  template <int V, class Kind, class Body>
  PTK_INLINE void for_gradients(Kind activation, A slope, const Columns<V>& k, const BackwardRows& rows,
                                int64_t channels, int64_t c, int64_t valid, const Body& body) {
    for (int64_t r = 0, at = c; r < rows.rows; ++r, at += channels) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t i = at + v * kLane;
        const Vec<A> centred = load_as_partial(rows.z + i, valid) - k.mean[v];
        const Vec<A> u =
            before_activation(centred, k.scale[v], k.shift[v], rows.residual ? rows.residual + i : nullptr, valid);
        body(i, v, centred, activation_gradient(activation, u, load_as_partial(rows.grad + i, valid), slope));
      }
    }
  }

  // sums[c] = sum of du, sums[channels + c] = sum of du * xhat, sums[2 channels + c] = sum of grad_conv;
  // grad_residual = du, grad_conv = scale * du less the shares of the statistics.
  template <int V, bool kSums, bool kGradients, class Kind>
  void backward_columns(Kind activation, const NormalizeBackwardParams& b, const BackwardRows& rows,
                        [[maybe_unused]] const Shares& shares, int64_t c, int64_t valid, A* sums) const {
    if constexpr (V > 1) valid = kLane;
    const int64_t first = rows.vectors + c;
    const Columns<V> k = columns_at<V>(f_, first);
    Vec<A> offset[V] = {}, slope[V] = {}, sum[V] = {}, sum_centred[V] = {}, sum_grad[V] = {};
    if (kGradients && b.batch_statistics)
      for (int v = 0; v < V; ++v) {
        offset[v] = load(shares.offset + first + v * kLane);
        slope[v] = load(shares.slope + first + v * kLane);
      }
    for_gradients<V>(activation, static_cast<A>(p_.slope), k, rows, channels_, c, valid,
                     [&](int64_t i, int v, Vec<A> centred, Vec<A> du) __attribute__((always_inline)) {
                       if constexpr (kSums) {
                         sum[v] += du;
                         sum_centred[v] += du * centred;
                       }
                       if constexpr (kGradients) {
                         if (rows.grad_residual) store_as_partial(rows.grad_residual + i, du, valid);
                         if (!rows.grad_conv) return;
                         const Vec<A> grad = du * k.scale[v] - offset[v] - centred * slope[v];
                         store_as_partial(rows.grad_conv + i, grad, valid);
                         if (b.sum_grad_conv) sum_grad[v] += grad;
                       }
                     });
    for (int v = 0; v < V; ++v) {
      A* to = sums + c + v * kLane;
      if constexpr (kSums) {
        store_partial(to, sum[v], valid);
        store_partial(to + channels_, sum_centred[v] * channel(b.invstd, first + v * kLane, 1), valid);
      }
      if (kGradients && b.sum_grad_conv) store_partial(to + 2 * channels_, sum_grad[v], valid);
    }
  }

  void merge_sums(const A* partial, const NormalizeBackwardParams& b) const {
    const int64_t count = blocks_of_unit();
    parallel_items(units(), [&](int64_t unit) {
      const A* first = partial + unit * count * kSumsOfBlock * channels_;
      for (int64_t c = 0; c < channels_; ++c) {
        double sum = 0, sum_xhat = 0;
        for (int64_t block = 0; block < count; ++block) {
          sum += static_cast<double>(first[block * kSumsOfBlock * channels_ + c]);
          sum_xhat += static_cast<double>(first[(block * kSumsOfBlock + 1) * channels_ + c]);
        }
        static_cast<A*>(b.sum_du)[unit * channels_ + c] = static_cast<A>(sum);
        static_cast<A*>(b.sum_du_xhat)[unit * channels_ + c] = static_cast<A>(sum_xhat);
      }
    });
  }
  // The sums of grad_conv, over all units.
  void merge_columns(const A* partial, A* to) const {
    for (int64_t c = 0; c < channels_; ++c) {
      double sum = 0;
      for (int64_t block = 0; block < blocks(); ++block)
        sum += static_cast<double>(partial[(block * kSumsOfBlock + 2) * channels_ + c]);
      to[c] = static_cast<A>(sum);
    }
  }

  // Shares: means of scale * du and of scale * du * xhat over what statistics were taken of, the latter times invstd.
  void divide_sums(const NormalizeBackwardParams& b, A* offset, A* slope) const {
    const int64_t groups = p_.norm_groups ? p_.norm_groups : channels_, width = channels_ / groups;
    const A *scale = static_cast<const A*>(f_.scale), *invstd = static_cast<const A*>(b.invstd);
    const A *sum_du = static_cast<const A*>(b.sum_du), *sum_du_xhat = static_cast<const A*>(b.sum_du_xhat);
    const double factor = 1 / static_cast<double>(unit_pixels_ * width);
    for (int64_t group = 0; group < units() * groups; ++group) {
      double sum = 0, sum_xhat = 0;
      for (int64_t c = group * width; c < (group + 1) * width; ++c) {
        sum += static_cast<double>(scale[c]) * static_cast<double>(sum_du[c]);
        sum_xhat += static_cast<double>(scale[c]) * static_cast<double>(sum_du_xhat[c]);
      }
      for (int64_t c = group * width; c < (group + 1) * width; ++c) {
        offset[c] = static_cast<A>(sum * factor);
        slope[c] = static_cast<A>(sum_xhat * factor * static_cast<double>(invstd[c]));
      }
    }
  }

  const NormalizeParams& f_;
  const ConvProblem& p_;
  const int64_t space_ = volume(p_.out), channels_ = p_.out_channels;
  const int64_t unit_pixels_ = p_.norm_groups ? space_ : p_.batch * space_;
};

}  // namespace ptk::PTK_ISA
