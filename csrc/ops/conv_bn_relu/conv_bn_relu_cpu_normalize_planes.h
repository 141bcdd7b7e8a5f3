// Statistics, normalisation, residual and activation of channels-first tensors, and back.
//
//   layout   all tensors [batch, channels, space] as they lie; what belongs to a channel is one number for its planes.
//
//   threads  an item is some channels of one image, or, where sums over the batch are wanted, of all images: what the
//            sums are needed for follows while the planes are in cache.
//
//   numerics sums are taken over kBlock elements at a time and added up in order, in double; statistics as in
//            conv_bn_relu_cpu_normalize.h.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_normalize.h"

namespace ptk::PTK_ISA {

// Elements of a plane that are summed in the type of the sums.
inline constexpr int64_t kPlaneBlock = 1024;

// Calls body(first channel, end) for parts of the channels whose planes, `planes` of `space` elements each, make an
// item worth dealing out.
template <class Body>
static void for_channels(int64_t channels, int64_t planes, int64_t space, const Body& body) {
  constexpr int64_t kElements = 4096;
  const int64_t part =
      most(1, least(kElements / most(1, planes * space), (channels + 4 * num_threads() - 1) / (4 * num_threads())));
  parallel_items((channels + part - 1) / part, [&](int64_t i) { body(i * part, least(channels, (i + 1) * part)); });
}

// Mean and sum of squared differences from it of `count` elements.
template <class T>
static void block_of_plane(const T* x, int64_t count, double& mean, double& m2) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  // Differences from the first: sums of numbers that are large and alike would lose what distinguishes them.
  const A first = load_scalar(x);
  const int64_t whole = count / lanes * lanes;
  Vec<A> sum{}, squares{};
  for (int64_t i = 0; i < whole; i += lanes) sum += load_as(x + i) - first;
  A total = reduce_add<A>(sum);
  for (int64_t i = whole; i < count; ++i) total += load_scalar(x + i) - first;
  const A centre = first + total / static_cast<A>(count);
  for (int64_t i = 0; i < whole; i += lanes) {
    const Vec<A> d = load_as(x + i) - centre;
    squares += d * d;
  }
  total = reduce_add<A>(squares);
  for (int64_t i = whole; i < count; ++i) {
    const A d = load_scalar(x + i) - centre;
    total += d * d;
  }
  mean = static_cast<double>(centre);
  m2 = static_cast<double>(total);
}

template <class T>
static void statistics_of_planes(const T* z, int64_t batch, int64_t channels, int64_t space, Acc<T>* mean,
                                 Acc<T>* variance) {
  for_channels(channels, batch, space, [&](int64_t first, int64_t end) {
    for (int64_t c = first; c < end; ++c) {
      double centre = 0, m2 = 0, seen = 0;
      for (int64_t image = 0; image < batch; ++image)
        for (int64_t begin = 0; begin < space; begin += kPlaneBlock) {
          const int64_t count = least(kPlaneBlock, space - begin);
          double here, here_m2;
          block_of_plane(z + (image * channels + c) * space + begin, count, here, here_m2);
          const double all = seen + static_cast<double>(count), delta = here - centre;
          centre += delta * (static_cast<double>(count) / all);
          m2 += here_m2 + delta * delta * (seen * static_cast<double>(count) / all);
          seen = all;
        }
      mean[c] = static_cast<Acc<T>>(centre);
      variance[c] = static_cast<Acc<T>>(m2 / seen);
    }
  });
}

template <class T>
class NormalizePlanes {
  using A = Acc<T>;

public:
  NormalizePlanes(const NormalizeParams& params) : f_(params), p_(params.problem) {}

  bool run() const {
    for_channels(p_.batch * channels_, 1, space_, [&](int64_t first, int64_t end) {
      with_activation(p_.activation, [&](auto activation) {
        for (int64_t plane = first; plane < end; ++plane) forward_plane(activation, plane);
      });
    });
    return true;
  }

  bool run_backward(const NormalizeBackwardParams& b) const {
    for_channels(channels_, p_.batch, space_, [&](int64_t first, int64_t end) {
      with_activation(p_.activation, [&](auto activation) {
        for (int64_t c = first; c < end; ++c) {
          if (b.batch_statistics) {
            // Gradients depend on the sums.
            backward_channel<true, false>(activation, b, c);
            backward_channel<false, true>(activation, b, c);
          } else {
            backward_channel<true, true>(activation, b, c);
          }
        }
      });
    });
    return true;
  }

private:
  static constexpr int64_t kLane = kLanes<A>;

  static A number(const void* vector, int64_t c, A otherwise) {
    return vector ? static_cast<const A*>(vector)[c] : otherwise;
  }

  // What belongs to a channel.
  struct Channel {
    Vec<A> mean, scale, shift;
  };
  Channel channel(int64_t c) const {
    return {broadcast(number(f_.mean, c, 0)), broadcast(number(f_.scale, c, 1)), broadcast(number(f_.shift, c, 0))};
  }

  template <class Kind>
  void forward_plane(Kind activation, int64_t plane) const {
    const Channel k = channel(plane % channels_);
    const A slope = static_cast<A>(p_.slope);
    const T* z = static_cast<const T*>(f_.conv) + plane * space_;
    const T* residual = f_.residual ? static_cast<const T*>(f_.residual) + plane * space_ : nullptr;
    T* out = static_cast<T*>(f_.out) + plane * space_;
    const auto step = [&](int64_t i, int64_t valid) __attribute__((always_inline)) {
      const Vec<A> u = before_activation<T>(load_as_partial(z + i, valid) - k.mean, k.scale, k.shift,
                                            residual ? residual + i : nullptr, valid);
      store_as_partial(out + i, activate(activation, u, slope), valid);
    };
    int64_t i = 0;
    for (; i + kLane <= space_; i += kLane) step(i, kLane);
    if (i < space_) step(i, space_ - i);
  }

  // Calls body(offset, valid, centred, du) for the vectors of elements [begin, end) of a plane.
  template <class Kind, class Body>
  PTK_INLINE void for_gradients(Kind activation, A slope, const Channel& k, const NormalizeBackwardParams& b,
                                int64_t begin, int64_t end, const Body& body) {
    const T *z = static_cast<const T*>(b.forward.conv), *residual = static_cast<const T*>(b.forward.residual),
            *grad = static_cast<const T*>(b.grad_out);
    const auto step = [&](int64_t i, int64_t valid) __attribute__((always_inline)) {
      const Vec<A> centred = load_as_partial(z + i, valid) - k.mean;
      const Vec<A> u = before_activation<T>(centred, k.scale, k.shift, residual ? residual + i : nullptr, valid);
      body(i, valid, centred, activation_gradient(activation, u, load_as_partial(grad + i, valid), slope));
    };
    int64_t i = begin;
    for (; i + kLane <= end; i += kLane) step(i, kLane);
    if (i < end) step(i, end - i);
  }

  // sum_du and sum_du_xhat, grad_conv and grad_residual. What lies behind a plane counts nothing in the sums: its
  // gradient is read as zero.
  template <bool kSums, bool kGradients, class Kind>
  void backward_channel(Kind activation, const NormalizeBackwardParams& b, int64_t c) const {
    const Channel k = channel(c);
    const A invstd = number(b.invstd, c, 1);
    Vec<A> offset{}, slope{};
    if (kGradients && b.batch_statistics) {
      const A factor = number(f_.scale, c, 1) / static_cast<A>(p_.batch * space_);
      offset = broadcast(number(b.sum_du, c, 0) * factor);
      slope = broadcast(number(b.sum_du_xhat, c, 0) * factor * invstd);
    }
    T *grad_conv = static_cast<T*>(b.grad_conv), *grad_residual = static_cast<T*>(b.grad_residual);
    double sum_du = 0, sum_du_xhat = 0;
    for (int64_t image = 0; image < p_.batch; ++image) {
      const int64_t plane = (image * channels_ + c) * space_;
      for (int64_t begin = 0; begin < space_; begin += kPlaneBlock) {
        Vec<A> sum{}, sum_centred{};
        for_gradients(activation, static_cast<A>(p_.slope), k, b, plane + begin,
                      plane + least(space_, begin + kPlaneBlock),
                      [&](int64_t i, int64_t valid, Vec<A> centred, Vec<A> du) __attribute__((always_inline)) {
                        if constexpr (kSums) {
                          sum += du;
                          sum_centred += du * centred;
                        }
                        if constexpr (kGradients) {
                          if (grad_residual) store_as_partial(grad_residual + i, du, valid);
                          if (grad_conv)
                            store_as_partial(grad_conv + i, du * k.scale - offset - centred * slope, valid);
                        }
                      });
        if constexpr (kSums) {
          sum_du += static_cast<double>(reduce_add<A>(sum));
          sum_du_xhat += static_cast<double>(reduce_add<A>(sum_centred) * invstd);
        }
      }
    }
    if constexpr (kSums) {
      static_cast<A*>(b.sum_du)[c] = static_cast<A>(sum_du);
      static_cast<A*>(b.sum_du_xhat)[c] = static_cast<A>(sum_du_xhat);
    }
  }

  const NormalizeParams& f_;
  const ConvProblem& p_;
  const int64_t space_ = volume(p_.out), channels_ = p_.out_channels;
};

}  // namespace ptk::PTK_ISA
