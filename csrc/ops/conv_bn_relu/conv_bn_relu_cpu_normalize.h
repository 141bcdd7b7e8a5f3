// Everything between the convolution and the result: statistics, normalisation, residual, activation, and back.
//
//   layout   the convolution's result is rows of channels; residual, out and their gradients are what the caller has,
//   and
//            channels-first ones pass through a block of rows in the thread's scratch.
//   numerics statistics of a block of rows are its mean and its sum of squared differences from that mean; blocks are
//            merged in order, in double (Chan, Golub and LeVeque, 1983). Nothing is squared before it is centred.
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

  bool run_backward(const NormalizeBackwardParams& b) const {
    bool ok = true;
    const SharedBuffer partial(blocks() * 2 * channels_ * static_cast<int64_t>(sizeof(A)));
    if (!partial) return false;
    parallel_items(blocks(), [&](int64_t block) {
      T* scratch = nullptr;
      if (is_planes() && !(scratch = take_scratch())) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      backward_block(b, block, scratch, partial.as<A>(), Pass::sums);
    });
    if (!ok) return false;
    merge_sums(partial.as<A>(), b);
    if (!b.grad_conv && !b.grad_residual) return true;
    parallel_items(blocks(), [&](int64_t block) {
      T* scratch = nullptr;
      if (is_planes() && !(scratch = take_scratch())) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      backward_block(b, block, scratch, nullptr, Pass::gradients);
    });
    return ok;
  }

private:
  static constexpr int64_t kRows = 64;
  enum class Pass { sums, gradients };

  bool is_planes() const { return p_.layout == Layout::channels_first && space_ > 1 && channels_ > 1; }
  int64_t blocks() const { return (pixels_ + kRows - 1) / kRows; }
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

  // u, exactly as forward and backward must agree on it.
  PTK_INLINE Vec<A> before_activation(Vec<A> z, Vec<A> mean, Vec<A> scale, Vec<A> shift, const T* residual,
                                      int64_t valid) {
    Vec<A> u = (z - mean) * scale + shift;
    if (residual) u += load_as_partial(residual, valid);
    return u;
  }

  void forward_block(int64_t block, T* scratch) const {
    const int64_t begin = block * kRows, end = least(pixels_, begin + kRows);
    const T* z = static_cast<const T*>(f_.conv) + begin * channels_;
    const T* residual = rows_of(f_.residual, begin, end, scratch);
    T* out = is_planes() ? scratch + kRows * channels_ : static_cast<T*>(f_.out) + begin * channels_;
    const A slope = static_cast<A>(p_.slope);
    for (int64_t c = 0; c < channels_; c += kLanes<A>) {
      const Vec<A> mean = channel(f_.mean, c, 0), scale = channel(f_.scale, c, 1), shift = channel(f_.shift, c, 0);
      const int64_t valid = channels_ - c;
      for (int64_t r = c; r < (end - begin) * channels_ + c; r += channels_) {
        const Vec<A> u = before_activation(load_as_partial(z + r, valid), mean, scale, shift,
                                           residual ? residual + r : nullptr, valid);
        store_as_partial(out + r, activate(p_.activation, u, slope), valid);
      }
    }
    if (is_planes())
      planes_from_rows(out, channels_, static_cast<T*>(f_.out), channels_, space_, begin, end, 0, channels_);
  }

  void backward_block(const NormalizeBackwardParams& b, int64_t block, T* scratch, A* partial, Pass pass) const {
    const int64_t begin = block * kRows, end = least(pixels_, begin + kRows), size = kRows * channels_;
    const T* z = static_cast<const T*>(f_.conv) + begin * channels_;
    const T* residual = rows_of(f_.residual, begin, end, scratch);
    const T* grad = rows_of(b.grad_out, begin, end, scratch + size);
    T* grad_residual = !b.grad_residual || pass == Pass::sums ? nullptr
                       : is_planes()                          ? scratch + 2 * size
                                                              : static_cast<T*>(b.grad_residual) + begin * channels_;
    T* grad_conv = b.grad_conv ? static_cast<T*>(b.grad_conv) + begin * channels_ : nullptr;
    const A slope = static_cast<A>(p_.slope), inverse = A(1) / static_cast<A>(pixels_);
    for (int64_t c = 0; c < channels_; c += kLanes<A>) {
      const Vec<A> mean = channel(f_.mean, c, 0), scale = channel(f_.scale, c, 1), shift = channel(f_.shift, c, 0);
      const Vec<A> invstd = channel(b.invstd, c, 1);
      const int64_t valid = channels_ - c;
      Vec<A> sum{}, sum_xhat{}, mean_du{}, mean_du_xhat{};
      if (pass == Pass::gradients && b.batch_statistics) {
        mean_du = load_partial(static_cast<const A*>(b.sum_du) + c, valid) * inverse;
        mean_du_xhat = load_partial(static_cast<const A*>(b.sum_du_xhat) + c, valid) * inverse;
      }
      for (int64_t r = c; r < (end - begin) * channels_ + c; r += channels_) {
        const Vec<A> conv = load_as_partial(z + r, valid);
        const Vec<A> u = before_activation(conv, mean, scale, shift, residual ? residual + r : nullptr, valid);
        const Vec<A> du = activation_gradient(p_.activation, u, load_as_partial(grad + r, valid), slope);
        const Vec<A> xhat = (conv - mean) * invstd;
        if (pass == Pass::sums) {
          sum += du;
          sum_xhat += du * xhat;
          continue;
        }
        if (grad_residual) store_as_partial(grad_residual + r, du, valid);
        if (grad_conv) store_as_partial(grad_conv + r, (du - mean_du - xhat * mean_du_xhat) * scale, valid);
      }
      if (pass == Pass::sums) {
        store_partial(partial + block * 2 * channels_ + c, sum, valid);
        store_partial(partial + (block * 2 + 1) * channels_ + c, sum_xhat, valid);
      }
    }
    if (grad_residual && is_planes())
      planes_from_rows(grad_residual, channels_, static_cast<T*>(b.grad_residual), channels_, space_, begin, end, 0,
                       channels_);
  }

  void merge_sums(const A* partial, const NormalizeBackwardParams& b) const {
    for (int64_t c = 0; c < channels_; ++c) {
      double sum = 0, sum_xhat = 0;
      for (int64_t block = 0; block < blocks(); ++block) {
        sum += static_cast<double>(partial[block * 2 * channels_ + c]);
        sum_xhat += static_cast<double>(partial[(block * 2 + 1) * channels_ + c]);
      }
      static_cast<A*>(b.sum_du)[c] = static_cast<A>(sum);
      static_cast<A*>(b.sum_du_xhat)[c] = static_cast<A>(sum_xhat);
    }
  }

  const NormalizeParams& f_;
  const ConvProblem& p_;
  const int64_t space_ = volume(p_.out), pixels_ = p_.batch * space_, channels_ = p_.out_channels;
};

}  // namespace ptk::PTK_ISA
