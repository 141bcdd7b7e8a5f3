// Weight gradient: grad_weight[o, tap, c] = sum over positions of grad_conv[position, o] * source[position, tap, c].
//
//   tiling   an item is a range of depth (taps and channels, the columns here) and a segment of the positions. kRows
//            positions at a time, the gathered rows become panels of B and the gradient, transposed, rows of A.
//
//   threads  the segments are a function of the problem alone, and are added up in order.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_gather.h"

namespace ptk::PTK_ISA {

template <class T>
class WeightGradient {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  static constexpr int64_t kDepth = sizeof(E) == 2 ? 512 : 256, kRows = 256;

public:
  WeightGradient(const ConvProblem& problem, const Gather& gather, const T* source, const T* grad, T* grad_weight)
      : p_(problem), g_(gather), source_(source), grad_(grad), grad_weight_(grad_weight), steps_(gather, kDepth) {
    const int64_t chunks = (g_.positions() + kRows - 1) / kRows;
    const int64_t items = most(1, steps_.count() * g_.groups);
    segment_chunks_ = most(1, (chunks * items + kItems - 1) / kItems);
    segments_ = (chunks + segment_chunks_ - 1) / segment_chunks_;
  }

  // False when memory ran out.
  bool run() const {
    if (g_.taps() * g_.group_source() == 0) return true;
    const int64_t items = steps_.count() * g_.groups;
    const SharedBuffer sums((items * segments_ * sums_size() + kLane) * static_cast<int64_t>(sizeof(A)));
    if (!sums) return false;
    bool ok = true;
    parallel_items(items * segments_, [&](int64_t i) {
      if (!item(i / segments_, i % segments_, sums.as<A>() + i * sums_size()))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    if (!ok) return false;
    parallel_items(items, [&](int64_t i) { finish(i, sums.as<A>() + i * segments_ * sums_size()); });
    return true;
  }

private:
  // Enough items for many cores, few enough that their sums stay small.
  static constexpr int64_t kItems = 16;
  static constexpr int64_t kLane = kLanes<A>;

  int64_t outputs() const { return g_.group_result(); }
  int64_t ld_sums() const { return padded_n<T>(steps_.largest().depth()); }
  int64_t sums_size() const { return outputs() * ld_sums(); }
  static constexpr int64_t kLdRows = kRows + 64 / static_cast<int64_t>(sizeof(E));

  struct Scratch {
    T *rows, *transposed;
    E *panels, *grad;
    Position* positions;
  };
  Scratch carve(Carver& carver) const {
    Scratch s;
    s.rows = carver.take<T>(kRows * steps_.largest().depth());
    s.panels = carver.take<E>(padded_k<T>(kRows) * ld_sums());
    s.transposed = carver.take<T>(std::is_same_v<E, T> ? 0 : outputs() * kRows);
    s.grad = carver.take<E>(round_up(outputs(), 32) * kLdRows);
    s.positions = carver.take<Position>(kRows);
    return s;
  }

  bool item(int64_t which, int64_t segment, A* sums) const {
    const int64_t group = which / steps_.count();
    const DepthStep step = steps_.at(which % steps_.count());
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    const int64_t first = segment * segment_chunks_ * kRows;
    const int64_t end = least(g_.positions(), first + segment_chunks_ * kRows), columns = step.depth();
    for (int64_t begin = first; begin < end; begin += kRows) {
      const int64_t rows = least(kRows, end - begin), padded = padded_k<T>(rows);
      locate(g_, begin, rows, s.positions);
      gather_rows(g_, source_, group, step, s.positions, rows, s.rows, columns, columns);
      pack_b<T>(s.rows, columns, 1, rows, columns, s.panels, padded);
      transpose_gradient(s, group, begin, rows, padded);
      if (begin == first) {
        gemm<T>(outputs(), columns, rows, s.grad, kLdRows, s.panels, padded * Traits::kNr,
                StoreSums<A>{sums, ld_sums()});
      } else {
        gemm<T>(outputs(), columns, rows, s.grad, kLdRows, s.panels, padded * Traits::kNr, AddSums<A>{sums, ld_sums()});
      }
    }
    release_large_scratch();
    return true;
  }

  void transpose_gradient(const Scratch& s, int64_t group, int64_t begin, int64_t rows, int64_t padded) const {
    const T* grad = grad_ + begin * g_.result_channels + group * outputs();
    if constexpr (std::is_same_v<E, T>) {
      transpose_block(grad, g_.result_channels, s.grad, kLdRows, rows, outputs());
      if (padded > rows)
        for (int64_t o = 0; o < outputs(); ++o)
          std::memset(s.grad + o * kLdRows + rows, 0, (padded - rows) * sizeof(E));
    } else {
      transpose_block(grad, g_.result_channels, s.transposed, kRows, rows, outputs());
      pack_a<T>(s.transposed, kRows, 1, outputs(), rows, s.grad, kLdRows);
    }
  }

  // Adds the segments and writes the taps and channels of one item where they belong.
  void finish(int64_t which, const A* sums) const {
    const int64_t group = which / steps_.count();
    const DepthStep step = steps_.at(which % steps_.count());
    T* weight = grad_weight_ + weight_offset(p_, group);
    for (int64_t o = 0; o < outputs(); ++o) {
      const A* row = sums + o * ld_sums();
      for (int64_t r = step.row; r < step.row + step.rows; ++r)
        for (int64_t t = step.tap; t < step.tap + step.taps; ++t) {
          T* to = weight + o * g_.weight_result + tap_offset(g_, r / g_.axis[1].taps, r % g_.axis[1].taps, t);
          for (int64_t c = 0; c < step.channels; c += kLane) {
            Vec<A> sum = load(row + c);  // behind the last column there is padding, or the next taps
            for (int64_t s = 1; s < segments_; ++s) sum += load(row + c + s * sums_size());
            A lanes[kLane];
            store(lanes, sum);
            const int64_t valid = least(kLane, step.channels - c);
            for (int64_t i = 0; i < valid; ++i) to[(step.channel + c + i) * g_.weight_source] = round_to<T>(lanes[i]);
          }
          row += step.channels;
        }
    }
  }

  const ConvProblem& p_;
  const Gather& g_;
  const T *source_, *grad_;
  T* grad_weight_;
  const DepthSteps steps_;
  int64_t segment_chunks_ = 0, segments_ = 0;
};

}  // namespace ptk::PTK_ISA
