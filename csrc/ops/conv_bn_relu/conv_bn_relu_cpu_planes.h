// Convolution of channels-first tensors as they lie: no transposition on the way in or out.
//
//   equation  out[o, p] = sum over k of weight[o, k] * source[channel of k, p moved by the tap of k]
//             rows are result channels, columns positions, depth source channels, then taps: a row of the weight tensor
//
//   layout    A is the weight, copied a block at a time on its way to L2: nothing is kept from call to call. B is
//   packed
//             a step of depth at a time: row k of a panel is kNr positions of one plane, moved by one tap, put together
//             of the runs of positions that lie side by side in the plane. Results leave for their planes from the
//             registers.
//
//   tiling    up to kColumns positions x kRows channels per item; B of one step of depth and a block of A lie in L2;
//             sums of all but the last step wait there too.
//
//   threads   items are dealt out by a counter. The order of a sum depends on neither their size nor the threads.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_result.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_runs.h"

namespace ptk::PTK_ISA {

// Rows of a matrix product are channels, columns positions.
template <class T>
struct PlanesEpilogue {
  using A = Acc<T>;
  static constexpr bool kLarge = true, kStrip = true;
  const A* partial;
  int64_t ld_partial;
  const ConvResult<T>& result;
  int64_t channel;         // of row 0
  int64_t space;           // elements of a plane
  const int64_t* offsets;  // of every position in channel 0

  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t valid) const {
    store_one(result, result.of(channel + row), row, column, sums, valid);
  }

  // Sums of rows [row, row + rows), two vectors to a row. The common activations have a copy each.
  void strip(int rows, int64_t row, int64_t column, int64_t columns, const A* sums) const {
    with_activation(result.activation, [&](auto activation) __attribute__((always_inline)) {
      store_rows(activation, rows, row, column, columns, sums);
    });
  }

private:
  static constexpr int64_t kLane = kLanes<A>;
  using Vectors = typename ConvResult<T>::Vectors;

  bool is_side_by_side(int64_t column, int64_t count) const {
    return offsets[column + count - 1] - offsets[column] == count - 1;
  }

  inline __attribute__((always_inline)) void store_rows(Activation activation, int rows, int64_t row, int64_t column,
                                                        int64_t columns, const A* sums) const {
    // Of its own, so that no store can be thought to change it.
    ConvResult<T> r = result;
    r.activation = activation;
    if (columns >= 2 * kLane && is_side_by_side(column, 2 * kLane)) {
#pragma GCC unroll 1
      for (int64_t i = 0; i < rows; ++i, sums += 2 * kLane) {
        const Vectors v = r.of(channel + row + i);
        const int64_t at = (channel + row + i) * space + offsets[column];
        store_side_by_side(r, v, at, row + i, column, load(sums), kLane);
        store_side_by_side(r, v, at + kLane, row + i, column + kLane, load(sums + kLane), kLane);
      }
      return;
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < rows; ++i, sums += 2 * kLane) {
      const Vectors v = r.of(channel + row + i);
      store_one(r, v, row + i, column, load(sums), least(columns, kLane));
      if (columns > kLane) store_one(r, v, row + i, column + kLane, load(sums + kLane), least(columns - kLane, kLane));
    }
  }

  inline __attribute__((always_inline)) void store_side_by_side(const ConvResult<T>& r, const Vectors& v, int64_t at,
                                                                int64_t row, int64_t column, Vec<A> sums,
                                                                int64_t valid) const {
    if (partial) sums += load(partial + row * ld_partial + column);
    r.finish(sums, v, r.residual ? r.residual + at : nullptr, r.out + at, valid);
  }

  inline __attribute__((always_inline)) void store_one(const ConvResult<T>& r, const Vectors& v, int64_t row,
                                                       int64_t column, Vec<A> sums, int64_t valid) const {
    const int64_t plane = (channel + row) * space;
    if (is_side_by_side(column, valid))
      return store_side_by_side(r, v, plane + offsets[column], row, column, sums, valid);
    // Positions of several images.
    T out[kLane], residual[kLane] = {};
    if (partial) sums += load(partial + row * ld_partial + column);
    if (r.residual)
      for (int64_t i = 0; i < valid; ++i) residual[i] = r.residual[plane + offsets[column + i]];
    r.finish(sums, v, r.residual ? residual : nullptr, out, kLane);
    for (int64_t i = 0; i < valid; ++i) r.out[plane + offsets[column + i]] = out[i];
  }
};

// `Out`: T, or Acc<T> for sums that are not rounded.
template <class T, class Out = T>
class PlanesConv {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  static constexpr int64_t kDepth = 384, kColumns = 4 * Traits::kNr, kRows = 512;
  static constexpr int64_t kBlockRows = round_up(112, Traits::kMr);

public:
  PlanesConv(const ConvProblem& problem, const Gather& gather, const T* source, const T* weight,
             const ConvResult<Out>& result)
      : p_(problem), g_(gather), source_(source), weight_(weight), r_(result), taps_(gather.taps()),
        plane_(gather.axis[0].source * gather.axis[1].source * gather.axis[2].source),
        space_(gather.axis[0].out_size * gather.axis[1].out_size * gather.axis[2].out_size) {
    const int64_t even = Traits::kKStep;
    step_channels_ = least(g_.group_source(), most(even, kDepth / most(1, taps_) / even * even));
    // A convolution whose window no tap reaches still has a result.
    steps_ = most(1, (g_.group_source() + most(1, step_channels_) - 1) / most(1, step_channels_));
    share_out();
  }

  // With taps, every position is copied once for each of them. That costs less than a transposition and the padding of
  // channels to vectors where there are few, and less than to rearrange the weights where those are few positions.
  static bool pays(const ConvProblem& p) {
    const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
    return volume(p.kernel) == 1 || has_few_positions(p) || 2 * round_up(out, Traits::kNr) >= 3 * out ||
           (sizeof(T) == 2 && in < 16);
  }

  static bool packs_on_the_way() { return true; }
  static int64_t packed_kind() { return 0; }
  static int64_t packed_bytes() { return 0; }
  static bool pack(void*) { return true; }

  bool run(const void*) const {
    bool ok = true;
    const int64_t columns = column_blocks(), rows = row_blocks();
    parallel_items(items(), [&](int64_t i) {
      if (!item(i / (columns * rows), i / columns % rows * rows_, i % columns * columns_))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  // Items that let the threads finish together. Times are in panels of columns that meet one row: packing a panel costs
  // as much as some rows that meet it.
  void share_out() {
    constexpr double kPacking = 16;
    const int64_t panels = most(1, (g_.positions() + Traits::kNr - 1) / Traits::kNr), outputs = g_.group_result();
    const int64_t threads = num_threads(), fewest = (outputs + kRows - 1) / kRows;
    double least_time = 0;
    for (int64_t width = least(panels, kColumns / Traits::kNr); width >= 1; --width)
      for (int64_t parts = fewest; parts < fewest + 2 * threads; ++parts) {
        const int64_t rows = round_up((outputs + parts - 1) / parts, Traits::kMr);
        const int64_t count = g_.groups * ((panels + width - 1) / width) * ((outputs + rows - 1) / rows);
        const int64_t turns = (count + threads - 1) / threads;
        const double time = static_cast<double>(turns * width) * (static_cast<double>(least(rows, outputs)) + kPacking);
        if (columns_ > 0 && time >= least_time) continue;
        least_time = time;
        columns_ = width * Traits::kNr;
        rows_ = rows;
      }
  }

  int64_t column_blocks() const { return (g_.positions() + columns_ - 1) / columns_; }
  int64_t row_blocks() const { return (g_.group_result() + rows_ - 1) / rows_; }
  int64_t items() const { return g_.groups * column_blocks() * row_blocks(); }
  int64_t step_depth() const { return step_channels_ * taps_; }
  int64_t panel_stride() const { return padded_k<T>(step_depth()) * Traits::kNr; }
  // Not a power of two, or rows would meet in one set of the cache.
  int64_t lda() const { return padded_k<T>(step_depth()) + 64 / static_cast<int64_t>(sizeof(E)); }

  struct Scratch {
    E *a, *b;
    A* partial;
    T* loose;
    Position* positions;
    int64_t* offsets;
    Run* runs;
    TapRuns* taps;
  };
  Scratch carve(Carver& carver) const {
    Scratch s;
    s.a = carver.take<E>(round_up(kBlockRows, 32) * lda());
    s.b = carver.take<E>(columns_ / Traits::kNr * panel_stride());
    s.partial = carver.take<A>(steps_ > 1 ? rows_ * columns_ : 0);
    s.loose = carver.take<T>(kCopiesRows ? step_depth() * Traits::kNr : 0);
    s.positions = carver.take<Position>(columns_);
    s.offsets = carver.take<int64_t>(columns_);
    s.runs = carver.take<Run>(taps_ * Traits::kNr);
    s.taps = carver.take<TapRuns>(taps_);
    return s;
  }

  bool item(int64_t group, int64_t row, int64_t column) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    const int64_t columns = least(columns_, g_.positions() - column), rows = least(rows_, g_.group_result() - row);
    locate(g_, column, columns, s.positions);
    // `out` counts pixels of the batch.
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t image = s.positions[i].image;
      s.offsets[i] = s.positions[i].out + image * (g_.result_channels - 1) * space_;
    }
    for (int64_t i = 0; i < steps_; ++i) {
      const int64_t channel = i * step_channels_, channels = least(step_channels_, g_.group_source() - channel);
      pack_columns(s, group * g_.group_source() + channel, channels, columns);
      for (int64_t r = 0; r < rows; r += kBlockRows)
        multiply(s, group, row + r, least(kBlockRows, rows - r), columns, i, s.partial + r * columns_);
    }
    release_large_scratch();
    return true;
  }

  void multiply(const Scratch& s, int64_t group, int64_t row, int64_t rows, int64_t columns, int64_t step,
                A* partial) const {
    const int64_t channel = step * step_channels_, channels = least(step_channels_, g_.group_source() - channel);
    const int64_t k = channels * taps_;
    const T* weight = weight_ + weight_offset(p_, group) + row * g_.weight_result + channel * g_.weight_source;
    // Of one tap, also the transpose of the weight: input gradients.
    pack_a<T>(weight, g_.weight_result, taps_ == 1 ? g_.weight_source : 1, rows, k, s.a, lda());
    const auto run = [&](const auto& epilogue) {
      gemm<T>(rows, columns, k, s.a, lda(), s.b, panel_stride(), epilogue);
    };
    if (step + 1 == steps_) {
      run(PlanesEpilogue<Out>{step ? partial : nullptr, columns_, r_, group * g_.group_result() + row, space_,
                              s.offsets});
    } else if (step == 0) {
      run(StoreSums<A>{partial, columns_});
    } else {
      run(AddSums<A>{partial, columns_});
    }
  }

  // Rows that the engine takes as they lie need no second copy.
  static constexpr bool kCopiesRows = !std::is_same_v<E, T> || Traits::kPack > 1;

  // Depth of one step, for `columns` positions.
  void pack_columns(const Scratch& s, int64_t channel, int64_t channels, int64_t columns) const {
    constexpr int64_t nr = Traits::kNr;
    const int64_t k = channels * taps_;
    const T* planes = source_ + channel * plane_;
    int64_t n = 0;
    if (g_.is_pointwise()) {
      const int64_t image = s.positions[0].image;
      while (n + nr <= columns && s.positions[n + nr - 1].image == image) n += nr;
      const T* from = planes + image * (g_.source_channels - 1) * plane_ + s.positions[0].out;
      pack_side_by_side(from, k, n, s.b);
    }
    for (; n < columns; n += nr) {
      E* panel = s.b + n / nr * panel_stride();
      find_runs<nr>(g_, s.positions + n, least(nr, columns - n), s.runs, s.taps);
      if constexpr (kCopiesRows) {
        copy_runs(planes, plane_, channels, taps_, g_.axis[2].step, s.runs, s.taps, s.loose, nr);
        pack_b_panel<T>(s.loose, nr, 1, k, nr, panel, padded_k<T>(k));
      } else {
        copy_runs(planes, plane_, channels, taps_, g_.axis[2].step, s.runs, s.taps, panel, nr);
      }
    }
  }

  // Whole panels of positions that follow each other in every plane: a few channels at a time, so that a plane is read
  // once, and those that come next are on their way.
  void pack_side_by_side(const T* from, int64_t k, int64_t columns, E* to) const {
    constexpr int64_t nr = Traits::kNr, few = most(8, Traits::kKStep), line = 64 / sizeof(T);
    for (int64_t i = 0; i < k; i += few) {
      const int64_t depth = least(few, k - i);
      for (int64_t next = i + few; next < least(k, i + 2 * few); ++next)
        for (int64_t n = 0; n < columns; n += line) __builtin_prefetch(from + next * plane_ + n);
      for (int64_t n = 0; n < columns; n += nr)
        pack_b_panel<T>(from + i * plane_ + n, plane_, 1, depth, nr, to + n / nr * panel_stride() + i * nr,
                        padded_k<T>(depth));
    }
  }

  const ConvProblem& p_;
  const Gather g_;
  const T *source_, *weight_;
  const ConvResult<Out>& r_;
  const int64_t taps_, plane_, space_;
  int64_t step_channels_ = 0, steps_ = 1, columns_ = 0, rows_ = 0;
};

}  // namespace ptk::PTK_ISA
