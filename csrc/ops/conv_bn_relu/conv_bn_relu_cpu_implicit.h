// Convolution as a matrix product of the engine: rows are positions, columns result channels, depth taps and channels.
//
//   layout   source and result are channels last; weights are packed into the engine's panels once per call. A block of
//            positions is gathered, one step of depth at a time, into rows in L2; a pointwise convolution reads its
//            source in place. A channels-first result leaves through a block of rows and a transposition.
//
//   tiling   kRows positions x up to kColumns channels per item; sums of all but the last step wait in a buffer in L2,
//   the
//            last step's epilogue scales, shifts, adds the residual, activates and stores.
//
//   threads  items are dealt out by a counter. The order of a sum depends on neither the items' width nor the threads.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_gather.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_normalize.h"

namespace ptk::PTK_ISA {

// The value that storing as T would leave.
template <class T>
PTK_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return widen_bf16(narrow_bf16(v));
  } else if constexpr (std::is_same_v<T, f16>) {
    return widen_f16(narrow_f16(v));
  } else {
    return v;
  }
}

// What becomes of the sums of a convolution.
template <class T>
struct ConvResult {
  T* out = nullptr;
  Layout layout = Layout::channels_last;
  const T* residual = nullptr;  // laid out like out
  const Acc<T>*bias = nullptr, *mean = nullptr, *scale = nullptr, *shift = nullptr;
  Activation activation = Activation::none;
  Acc<T> slope = 0;
  Acc<T>* statistics = nullptr;  // {mean, m2} of every channel per block of kRows positions

  // Stores channels [c, c + valid) of one position at the address of `out`, as Normalize does in a pass of its own.
  inline __attribute__((always_inline)) void finish(Vec<Acc<T>> sums, int64_t c, const T* residual_at, T* out_at,
                                                    int64_t valid) const {
    if (bias) sums += load(bias + c);
    if (mean) sums = (rounded<T>(sums) - load(mean + c)) * load(scale + c) + load(shift + c);
    if (residual_at) sums = (mean ? sums : rounded<T>(sums)) + load_as_partial(residual_at, valid);
    store_as_partial(out_at, activate(activation, mean || residual_at ? sums : rounded<T>(sums), slope), valid);
  }
};

template <class T>
struct ConvEpilogue {
  using A = Acc<T>;
  static constexpr bool kLarge = true;
  const A* partial;
  int64_t ld_partial;
  const ConvResult<T>& result;
  int64_t channel;         // of column 0
  const int64_t* offsets;  // of every row in out and residual
  const T* residual;
  T* out;

  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t valid) const {
    if (partial) sums += load(partial + row * ld_partial + column);
    const int64_t at = offsets[row] + column;
    result.finish(sums, channel + column, residual ? residual + at : nullptr, out + at, valid);
  }
};

template <class T>
class ImplicitConv {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  static constexpr int64_t kDepth = 384, kColumns = 512;

public:
  static constexpr int64_t kRows = detail::kUsesTiles<T> ? 128 : Traits::kMr > 8 ? 8 * Traits::kMr : 16 * Traits::kMr;

  ImplicitConv(const ConvProblem& problem, const Gather& gather, const T* source, const T* weight,
               const ConvResult<T>& result)
      : p_(problem), g_(gather), source_(source), weight_(weight), r_(result), steps_(gather, kDepth) {
    const int64_t wanted = 2 * num_threads(), columns = padded_n<T>(g_.group_result());
    const int64_t parts =
        most((columns + kColumns - 1) / kColumns,
             least(columns / Traits::kNr, (wanted + row_blocks() * g_.groups - 1) / most(1, row_blocks() * g_.groups)));
    columns_ = round_up((columns + parts - 1) / parts, Traits::kNr);
    column_blocks_ = (columns + columns_ - 1) / columns_;
  }

  // False when memory ran out.
  bool run() const {
    const SharedBuffer packed(g_.groups * group_stride() * static_cast<int64_t>(sizeof(E)));
    if (!packed) return false;
    const int64_t panels = padded_n<T>(g_.group_result()) / Traits::kNr;
    parallel_items(g_.groups * panels, [&](int64_t i) { pack_panel(packed.as<E>(), i / panels, i % panels); });
    bool ok = true;
    parallel_items(row_blocks() * column_blocks_ * g_.groups, [&](int64_t i) {
      const int64_t column = i % column_blocks_ * columns_, rest = i / column_blocks_;
      if (!item(packed.as<E>(), rest % g_.groups, rest / g_.groups, column))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

  int64_t row_blocks() const { return (g_.positions() + kRows - 1) / kRows; }

private:
  int64_t step_stride() const { return padded_k<T>(steps_.largest()) * padded_n<T>(g_.group_result()); }
  int64_t panel_stride() const { return padded_k<T>(steps_.largest()) * Traits::kNr; }
  int64_t group_stride() const { return most(64, step_stride() * steps_.count()); }

  void pack_panel(E* packed, int64_t group, int64_t panel) const {
    constexpr int pack = Traits::kPack, nr = Traits::kNr;
    const int64_t n0 = panel * nr, columns = least(nr, g_.group_result() - n0);
    const T* weight = weight_ + weight_offset(p_, group) + n0 * g_.weight_result;
    for (int64_t i = 0; i < steps_.count(); ++i) {
      const DepthStep step = steps_.at(i);
      E* to = packed + group * group_stride() + i * step_stride() + panel * panel_stride();
      int64_t k = 0;
      const auto row = [&](const T* from) {
        E* units = to + k / pack * nr * pack + k % pack;
        for (int64_t n = 0; n < columns; ++n) units[n * pack] = convert_element<T, E>(from[n * g_.weight_result]);
        for (int64_t n = columns; n < nr; ++n) units[n * pack] = E{};
        ++k;
      };
      for (int64_t r = step.row; r < step.row + step.rows; ++r)
        for (int64_t t = step.tap; t < step.tap + step.taps; ++t) {
          const T* tap = weight + tap_offset(g_, r / g_.axis[1].taps, r % g_.axis[1].taps, t);
          for (int64_t c = step.channel; c < step.channel + step.channels; ++c) row(tap + c * g_.weight_source);
        }
      for (const int64_t end = padded_k<T>(k); k < end; ++k)
        for (int64_t n = 0; n < nr; ++n) to[k / pack * nr * pack + k % pack + n * pack] = E{};
    }
  }

  struct Scratch {
    E* rows;
    A* partial;
    T *out, *residual;
    Position* positions;
    int64_t* offsets;
  };
  int64_t ld_rows() const { return padded_k<T>(steps_.largest()) + 64 / static_cast<int64_t>(sizeof(E)); }
  bool is_in_place() const { return std::is_same_v<E, T> && Traits::kKStep == 1 && g_.is_pointwise(); }
  bool is_transposed() const {
    const int64_t space = g_.axis[0].out_size * g_.axis[1].out_size * g_.axis[2].out_size;
    return r_.layout == Layout::channels_first && space > 1 && g_.result_channels > 1;
  }

  Scratch carve(Carver& carver) const {
    Scratch s;
    s.rows = carver.take<E>(is_in_place() ? 0 : round_up(kRows, 32) * ld_rows());
    s.partial = carver.take<A>(kRows * columns_);
    s.out = carver.take<T>(is_transposed() ? kRows * columns_ : 0);
    s.residual = carver.take<T>(is_transposed() && r_.residual ? kRows * columns_ : 0);
    s.positions = carver.take<Position>(kRows);
    s.offsets = carver.take<int64_t>(kRows);
    return s;
  }

  bool item(const E* packed, int64_t group, int64_t block, int64_t column) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    const int64_t begin = block * kRows, rows = least(kRows, g_.positions() - begin);
    const int64_t channel = group * g_.group_result() + column, columns = least(columns_, g_.group_result() - column);
    const int64_t space = g_.axis[0].out_size * g_.axis[1].out_size * g_.axis[2].out_size;
    const bool transposed = is_transposed();
    locate(g_, begin, rows, s.positions);
    for (int64_t r = 0; r < rows; ++r)
      s.offsets[r] = transposed ? r * columns_ : s.positions[r].out * g_.result_channels + channel;
    const T* residual = r_.residual;
    if (transposed && residual) {
      rows_from_planes(residual, g_.result_channels, space, begin, begin + rows, channel, columns, s.residual,
                       columns_);
      residual = s.residual;
    }
    T* out = transposed ? s.out : r_.out;
    const ConvEpilogue<T> epilogue{
        steps_.count() > 1 ? s.partial : nullptr, columns_, r_, channel, s.offsets, residual, out};
    multiply(s, packed + group * group_stride() + column / Traits::kNr * panel_stride(), group, begin, rows, columns,
             epilogue);
    if (transposed)
      planes_from_rows(s.out, columns_, r_.out, g_.result_channels, space, begin, begin + rows, channel, columns);
    if (r_.statistics) {
      A* to = r_.statistics + block * 2 * g_.result_channels + channel;
      block_statistics(r_.out + begin * g_.result_channels + channel, g_.result_channels, rows, columns, to,
                       to + g_.result_channels);
    }
    release_large_scratch();
    return true;
  }

  void multiply(const Scratch& s, const E* packed, int64_t group, int64_t begin, int64_t rows, int64_t columns,
                const ConvEpilogue<T>& epilogue) const {
    for (int64_t i = 0; i < steps_.count(); ++i) {
      const DepthStep step = steps_.at(i);
      const E* a = s.rows;
      int64_t lda = ld_rows();
      if (is_in_place()) {
        if constexpr (std::is_same_v<E, T>)
          a = source_ + begin * g_.source_channels + group * g_.group_source() + step.channel;
        lda = g_.source_channels;
      } else {
        gather_rows(g_, source_, group, step, s.positions, rows, s.rows, lda, padded_k<T>(step.depth()));
      }
      const E* b = packed + i * step_stride();
      if (i + 1 == steps_.count()) {
        gemm<T>(rows, columns, step.depth(), a, lda, b, panel_stride(), epilogue);
      } else if (i == 0) {
        gemm<T>(rows, columns, step.depth(), a, lda, b, panel_stride(), StoreSums<A>{s.partial, columns_});
      } else {
        gemm<T>(rows, columns, step.depth(), a, lda, b, panel_stride(), AddSums<A>{s.partial, columns_});
      }
    }
  }

  const ConvProblem& p_;
  const Gather& g_;
  const T *source_, *weight_;
  const ConvResult<T>& r_;
  const DepthSteps steps_;
  int64_t columns_ = 0, column_blocks_ = 0;
};

}  // namespace ptk::PTK_ISA
