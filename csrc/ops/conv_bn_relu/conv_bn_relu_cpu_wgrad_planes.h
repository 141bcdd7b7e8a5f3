// Weight gradient of pointwise convolutions of channels-first tensors.
//
//   grad_weight[o, c] = sum over images and positions of grad_conv[o, position] * source[c, position]
//
//   layout   depth is positions, which are contiguous in both operands: A is packed as it lies, B transposed on its way
//            into panels.
//
//   tiling   an item is up to kRows x kColumns of the weight and a segment of the steps of depth, each of several small
//            images or of a part of a large one.
//
//   threads  the segments are a function of the problem alone, and are added up in order.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_gather.h"

namespace ptk::PTK_ISA {

template <class T>
class PlanesWeightGradient {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  static constexpr int64_t kDepth = 384, kRows = round_up(224, Traits::kMr), kColumns = 128, kItems = 16;

public:
  PlanesWeightGradient(const ConvProblem& problem, const T* source, const T* grad, T* grad_weight)
      : source_(source), grad_(grad), grad_weight_(grad_weight), batch_(problem.batch), space_(volume(problem.out)),
        outputs_(problem.out_channels), inputs_(problem.in_channels) {
    // Whole images, each filled up to what the engine takes a step of, or parts of one.
    images_ = most(1, least(batch_, kDepth / padded_k<T>(space_)));
    parts_ = (space_ + kDepth - 1) / kDepth;
    part_ = round_up((space_ + parts_ - 1) / parts_, Traits::kKStep);
    steps_ = (batch_ + images_ - 1) / images_ * parts_;
    const int64_t segments = least(steps_, (kItems + tiles() - 1) / tiles());
    segment_ = (steps_ + segments - 1) / segments;
    segments_ = (steps_ + segment_ - 1) / segment_;
  }

  // False when memory ran out.
  bool run() const {
    const bool direct = segments_ == 1 && std::is_same_v<A, T>;
    const SharedBuffer sums(direct ? 0 : segments_ * size() * static_cast<int64_t>(sizeof(A)));
    if (!sums) return false;
    bool ok = true;
    parallel_items(tiles() * segments_, [&](int64_t i) {
      A* to = sums.as<A>() + i % segments_ * size();
      if constexpr (std::is_same_v<A, T>)
        if (direct) to = grad_weight_;
      const int64_t tile = i / segments_;
      if (!item(tile / column_tiles() * kRows, tile % column_tiles() * kColumns, i % segments_, to))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    if (ok && !direct) parallel_items(outputs_, [&](int64_t o) { add_segments(sums.as<A>(), o); });
    return ok;
  }

private:
  int64_t size() const { return outputs_ * inputs_; }
  int64_t column_tiles() const { return (inputs_ + kColumns - 1) / kColumns; }
  int64_t tiles() const { return (outputs_ + kRows - 1) / kRows * column_tiles(); }
  int64_t largest_depth() const { return parts_ > 1 ? part_ : images_ * padded_k<T>(space_); }
  int64_t lda() const { return largest_depth() + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t panel_stride() const { return largest_depth() * Traits::kNr; }

  bool item(int64_t row, int64_t column, int64_t segment, A* sums) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    const int64_t rows = least(kRows, outputs_ - row), columns = least(kColumns, inputs_ - column);
    A* to = sums + row * inputs_ + column;
    for (int64_t i = segment * segment_; i < least(steps_, (segment + 1) * segment_); ++i) {
      const int64_t depth = pack(i, row, rows, column, columns, s);
      if (i == segment * segment_) {
        gemm<T>(rows, columns, depth, s.a, lda(), s.b, panel_stride(), StoreSums<A>{to, inputs_});
      } else {
        gemm<T>(rows, columns, depth, s.a, lda(), s.b, panel_stride(), AddSums<A>{to, inputs_});
      }
    }
    release_large_scratch();
    return true;
  }

  struct Scratch {
    E *a, *b;
  };
  Scratch carve(Carver& carver) const {
    Scratch s;
    s.a = carver.take<E>(round_up(kRows, 32) * lda());
    s.b = carver.take<E>(round_up(kColumns, Traits::kNr) / Traits::kNr * panel_stride());
    return s;
  }

  // Operands of a step. Returns its depth.
  int64_t pack(int64_t step, int64_t row, int64_t rows, int64_t column, int64_t columns, const Scratch& s) const {
    const int64_t first = step / parts_ * images_, begin = step % parts_ * part_;
    const int64_t length = parts_ > 1 ? least(part_, space_ - begin) : space_;
    int64_t depth = 0;
    for (int64_t image = first; image < least(batch_, first + images_); ++image, depth += padded_k<T>(length)) {
      pack_a<T>(grad_ + (image * outputs_ + row) * space_ + begin, space_, 1, rows, length, s.a + depth, lda());
      for (int64_t n = 0; n < columns; n += Traits::kNr)
        pack_b_panel<T>(source_ + (image * inputs_ + column + n) * space_ + begin, 1, space_, length,
                        least(Traits::kNr, columns - n), s.b + n / Traits::kNr * panel_stride() + depth * Traits::kNr,
                        padded_k<T>(length));
    }
    return depth;
  }

  void add_segments(const A* sums, int64_t row) const {
    T* to = grad_weight_ + row * inputs_;
    for (int64_t c = 0; c < inputs_; c += kLanes<A>) {
      const int64_t valid = inputs_ - c;
      const A* from = sums + row * inputs_ + c;
      Vec<A> sum = load_partial(from, valid);
      for (int64_t s = 1; s < segments_; ++s) sum += load_partial(from + s * size(), valid);
      store_as_partial(to + c, sum, valid);
    }
  }

  const T *source_, *grad_;
  T* grad_weight_;
  const int64_t batch_, space_, outputs_, inputs_;
  int64_t images_, parts_, part_, steps_, segment_, segments_;
};

}  // namespace ptk::PTK_ISA
