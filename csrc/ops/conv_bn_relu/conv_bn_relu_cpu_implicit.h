// Convolution as a matrix product of the engine: rows are positions, columns result channels, depth taps and channels.
//
//   layout   source and result are channels last; weights are packed into the engine's panels. The source
//            of a block of positions is read as lines (conv_bn_relu_cpu_lines.h), or, where lines are too short to be
//            rows of a kernel, gathered one step of depth at a time. A channels-first result leaves through a block of
//            rows and a transposition.
//
//   tiling   about kRows positions x up to kColumns channels per item; sums of all but the last step wait in a buffer
//            in L2, the last step's epilogue scales, shifts, adds the residual, activates and stores.
//
//   threads  items are dealt out by a counter. The order of a sum depends on neither the items' width nor the threads.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_lines.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_result.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_weights.h"

namespace ptk::PTK_ISA {

template <class T>
struct ConvEpilogue {
  using A = Acc<T>;
  static constexpr bool kLarge = true, kStrip = true;
  const A* partial;
  int64_t ld_partial;
  const ConvResult<T>& result;
  int64_t channel;         // of column 0
  const int64_t* offsets;  // of every row in out and residual
  const T* residual;
  T* out;

  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t valid) const {
    const Place place{partial, ld_partial, offsets, residual, out};
    store_one(result, result.at(channel + column), place, static_cast<int>(row), column, sums, valid);
  }

  // Sums of rows [row, row + rows), two vectors to a row. The common activations have a copy each.
  void strip(int rows, int64_t row, int64_t column, int64_t columns, const A* sums) const {
    with_activation(result.activation, [&](auto activation) __attribute__((always_inline)) {
      store_rows(activation, rows, row, column, columns, sums);
    });
  }

private:
  static constexpr int64_t kLane = kLanes<A>;

  inline __attribute__((always_inline)) void store_rows(Activation activation, int rows, int64_t row, int64_t column,
                                                        int64_t columns, const A* sums) const {
    // Of its own, so that no store can be thought to change it.
    ConvResult<T> r = result;
    r.activation = activation;
    const Place place{partial ? partial + row * ld_partial + column : nullptr, ld_partial, offsets + row,
                      residual ? residual + column : nullptr, out + column};
    const typename ConvResult<T>::Vectors left = r.at(channel + column);
    if (columns < 2 * kLane) {
      const int64_t valid = least(columns, kLane);
#pragma GCC unroll 1
      for (int i = 0; i < rows; ++i) store_one(r, left, place, i, 0, load(sums + 2 * i * kLane), valid);
      if (columns <= kLane) return;
      const typename ConvResult<T>::Vectors right = r.at(channel + column + kLane);
#pragma GCC unroll 1
      for (int i = 0; i < rows; ++i)
        store_one(r, right, place, i, kLane, load(sums + (2 * i + 1) * kLane), columns - kLane);
      return;
    }
    const typename ConvResult<T>::Vectors right = r.at(channel + column + kLane);
#pragma GCC unroll 1
    for (int i = 0; i < rows; ++i) {
      const Vec<A> low = finished(r, left, place, i, 0, load(sums + 2 * i * kLane), kLane);
      const Vec<A> high = finished(r, right, place, i, kLane, load(sums + (2 * i + 1) * kLane), kLane);
      store_pair_as(place.out + place.offsets[i], low, high);
    }
  }

  // Where row 0 and column 0 of a strip are.
  struct Place {
    const A* partial;
    int64_t ld_partial;
    const int64_t* offsets;
    const T* residual;
    T* out;
  };
  inline __attribute__((always_inline)) Vec<A> finished(const ConvResult<T>& r,
                                                        const typename ConvResult<T>::Vectors& v, const Place& place,
                                                        int row, int64_t column, Vec<A> sums, int64_t valid) const {
    if (place.partial) sums += load(place.partial + row * place.ld_partial + column);
    return r.finished(sums, v, place.residual ? place.residual + place.offsets[row] + column : nullptr, valid);
  }
  inline __attribute__((always_inline)) void store_one(const ConvResult<T>& r, const typename ConvResult<T>::Vectors& v,
                                                       const Place& place, int row, int64_t column, Vec<A> sums,
                                                       int64_t valid) const {
    store_as_partial(place.out + place.offsets[row] + column, finished(r, v, place, row, column, sums, valid), valid);
  }
};

// The same convolution over one long line, where it is a plain matrix product.
static inline Gather flattened(Gather g) {
  if (!g.is_pointwise()) return g;
  const int64_t positions = g.positions();
  g.batch = 1;
  for (Axis& a : g.axis) a = kUnitAxis;
  g.axis[2].count = g.axis[2].source = g.axis[2].out_size = positions;
  return g;
}

template <class T>
class ImplicitConv {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  static constexpr int64_t kDepth = 384, kColumns = 512;
  static constexpr int64_t kRows = detail::kUsesTiles<T> ? 128 : Traits::kMr > 8 ? 8 * Traits::kMr : 16 * Traits::kMr;
  static constexpr int64_t kMostRows = 2 * kRows;  // in one block, so that it is the only one
  // Panels that an item packs for itself, in half of L2.
  static constexpr int64_t kPanelBytes = 256 * 1024;

public:
  ImplicitConv(const ConvProblem& problem, const Gather& gather, const T* source, const T* weight,
               const ConvResult<T>& result)
      : p_(problem), g_(flattened(gather)), source_(source), weight_(weight), r_(result), steps_(g_, kDepth),
        lines_(g_, steps_, line_blocks(g_)), blocks_(lines_.is_used() ? line_blocks(g_) : even_blocks(g_)),
        space_(gather.axis[0].out_size * gather.axis[1].out_size * gather.axis[2].out_size) {
    // As many panels to an item as let the threads finish together; every item reads its rows again.
    const int64_t panels = padded_n<T>(g_.group_result()) / Traits::kNr, threads = num_threads();
    const int64_t fitting = packs_on_the_way() ? most(1, kPanelBytes / most(1, panel_bytes())) : panels;
    double least_time = 0;
    for (int64_t width = least(least(panels, fitting), kColumns / Traits::kNr); width >= 1; --width) {
      const int64_t parts = (panels + width - 1) / width;
      const int64_t turns = (most(1, blocks_.count() * g_.groups * parts) + threads - 1) / threads;
      const double time = static_cast<double>(turns) * (static_cast<double>(width) + 0.5);
      if (columns_ > 0 && time >= least_time) continue;
      least_time = time;
      columns_ = width * Traits::kNr;
      column_blocks_ = parts;
    }
  }

  int64_t packed_kind() const { return lines_.is_used() ? 3 : 2; }
  int64_t packed_bytes() const { return g_.groups * group_stride() * static_cast<int64_t>(sizeof(E)); }

  // Where one item meets every weight, it can pack its own in cache: run() then takes null.
  bool packs_on_the_way() const { return blocks_.count() == 1; }

  // False when memory ran out, as for run().
  bool pack(void* to) const {
    E* packed = static_cast<E*>(to);
    const int64_t panels = padded_n<T>(g_.group_result()) / Traits::kNr;
    if (pads_depth()) std::memset(packed, 0, packed_bytes());
    bool ok = true;
    parallel_items(g_.groups * panels * chunks(), [&](int64_t i) {
      const int64_t rest = i / chunks(), group = rest / panels, panel = rest % panels;
      A* loose = static_cast<A*>(thread_scratch(loose_size() * sizeof(A)));
      E* base = packed + group * group_stride() + panel * panel_stride();
      if (loose) {
        pack_panel(base, step_stride(), group, panel, i % chunks() * kPackedChannels, loose);
      } else {
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      }
      release_large_scratch();
    });
    return ok;
  }

  bool run(const void* packed) const {
    bool ok = true;
    parallel_items(blocks_.count() * column_blocks_ * g_.groups, [&](int64_t i) {
      const int64_t column = i % column_blocks_ * columns_, rest = i / column_blocks_;
      if (!item(static_cast<const E*>(packed), rest % g_.groups, rest / g_.groups, column))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

  const Blocks& blocks() const { return blocks_; }

private:
  static Blocks even_blocks(const Gather& g) {
    const int64_t rows = g.positions() <= kMostRows ? most(1, g.positions()) : kRows;
    return {rows, most(1, g.positions()), g.positions()};
  }
  // Whole lines, or equal parts of a long one.
  static Blocks line_blocks(const Gather& g) {
    const int64_t width = most(1, g.axis[2].count);
    if (width <= kRows) return {kRows / width * width, most(1, g.positions()), g.positions()};
    const int64_t parts = (width + kRows - 1) / kRows;
    return {round_up((width + parts - 1) / parts, Traits::kMr), width, g.positions()};
  }

  // Elements of depth that a tap of the step takes.
  int64_t pitch(const DepthStep& step) const {
    return lines_.is_used() ? Lines<T>::pitch(step.channels) : step.channels;
  }
  int64_t padded_depth(const DepthStep& step) const { return padded_k<T>(step.rows * step.taps * pitch(step)); }
  int64_t chunks() const { return most(1, (g_.group_source() + kPackedChannels - 1) / kPackedChannels); }
  int64_t loose_size() const { return kPackedChannels * volume(g_.kernel) * Traits::kNr; }
  int64_t panel_bytes() const { return panel_stride() * steps_.count() * static_cast<int64_t>(sizeof(E)); }
  int64_t panel_stride() const { return padded_depth(steps_.largest()) * Traits::kNr; }
  int64_t step_stride() const { return panel_stride() * (padded_n<T>(g_.group_result()) / Traits::kNr); }
  int64_t group_stride() const { return most(64, step_stride() * steps_.count()); }

  bool pads_depth() const {
    for (int64_t i = 0; i < steps_.count(); ++i)
      if (const DepthStep step = steps_.at(i); padded_depth(step) != step.depth()) return true;
    return false;
  }

  // Channels [first, first + kPackedChannels) of one panel, whose steps lie `stride` apart. They are read in the order
  // in which they lie in memory into loose[channel][tap][column], in cache, and go from there to their steps.
  void pack_panel(E* panel, int64_t stride, int64_t group, int64_t index, int64_t first, A* loose) const {
    constexpr int64_t nr = Traits::kNr, unit = Traits::kPack;
    const int64_t n0 = index * nr, columns = least(nr, g_.group_result() - n0), taps = volume(g_.kernel);
    const int64_t end = least(g_.group_source(), first + kPackedChannels);
    load_weights(g_, weight_ + weight_offset(p_, group), n0, columns, first, end - first, loose);
    for (int64_t row = 0; row < g_.axis[0].taps * g_.axis[1].taps; ++row)
      for (int64_t tap = 0; tap < g_.axis[2].taps; ++tap) {
        const A* from = loose + tap_offset(g_, row / g_.axis[1].taps, row % g_.axis[1].taps, tap) * nr;
        for (int64_t c = first; c < end;) {
          const int64_t i = steps_.find(row, tap, c);
          const DepthStep step = steps_.at(i);
          const int64_t stop = least(end, step.channel + step.channels);
          int64_t k = ((row - step.row) * step.taps + tap - step.tap) * pitch(step) + c - step.channel;
          E* to = panel + i * stride;
          while (c < stop) {
            const A* one = from + (c - first) * taps * nr;
            if (unit == 2 && k % 2 == 0 && c + 1 < stop) {
              pack_pairs(one, one + taps * nr, to + k * nr);
              c += 2, k += 2;
            } else {
              E* units = to + k / unit * nr * unit + k % unit;
              for (int64_t n = 0; n < nr; ++n) units[n * unit] = round_to<E>(one[n]);
              ++c, ++k;
            }
          }
        }
      }
  }

  static void pack_pairs([[maybe_unused]] const A* even, [[maybe_unused]] const A* odd, [[maybe_unused]] E* to) {
    if constexpr (std::is_same_v<E, bf16>) {
      for (int64_t n = 0; n < Traits::kNr; n += kLanes<float>) {
        const Vec<uint32_t> low = bit_cast<Vec<uint32_t>>(load(even + n)),
                            high = bit_cast<Vec<uint32_t>>(load(odd + n));
        store(reinterpret_cast<uint32_t*>(to) + n, (low >> 16) | high);
      }
    }
  }

  int64_t item_step_stride() const { return columns_ / Traits::kNr * panel_stride(); }

  struct Scratch {
    E* rows;  // gathered rows, or copied lines
    E* weights;
    A *partial, *loose;
    T *out, *residual;
    Position* positions;
    int64_t* offsets;
  };
  int64_t ld_rows() const { return padded_depth(steps_.largest()) + 64 / static_cast<int64_t>(sizeof(E)); }
  bool is_transposed() const { return r_.layout == Layout::channels_first && space_ > 1 && g_.result_channels > 1; }

  Scratch carve(Carver& carver, bool packs) const {
    Scratch s;
    const int64_t lines = lines_.bytes() / static_cast<int64_t>(sizeof(E));
    s.rows = carver.take<E>(lines_.is_used() ? lines : round_up(blocks_.rows, 32) * ld_rows());
    s.weights = carver.take<E>(packs ? item_step_stride() * steps_.count() : 0);
    s.loose = carver.take<A>(packs ? loose_size() : 0);
    s.partial = carver.take<A>(blocks_.rows * columns_);
    s.out = carver.take<T>(is_transposed() ? blocks_.rows * columns_ : 0);
    s.residual = carver.take<T>(is_transposed() && r_.residual ? blocks_.rows * columns_ : 0);
    s.positions = carver.take<Position>(blocks_.rows);
    s.offsets = carver.take<int64_t>(blocks_.rows);
    return s;
  }

  // The panels of an item, packed in its own memory.
  void pack_columns(const Scratch& s, int64_t group, int64_t column, int64_t columns) const {
    const int64_t first = column / Traits::kNr, panels = (columns + Traits::kNr - 1) / Traits::kNr;
    if (pads_depth()) std::memset(s.weights, 0, columns_ / Traits::kNr * panel_bytes());
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t i = 0; i < chunks(); ++i)
        pack_panel(s.weights + panel * panel_stride(), item_step_stride(), group, first + panel, i * kPackedChannels,
                   s.loose);
  }

  bool item(const E* packed, int64_t group, int64_t block, int64_t column) const {
    Carver count;
    carve(count, !packed);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver, !packed);
    TileScope tiles;
    const int64_t begin = blocks_.begin(block), rows = blocks_.size(block);
    const int64_t channel = group * g_.group_result() + column, columns = least(columns_, g_.group_result() - column);
    const bool transposed = is_transposed();
    locate(g_, begin, rows, s.positions);
    for (int64_t r = 0; r < rows; ++r)
      s.offsets[r] = transposed ? r * columns_ : s.positions[r].out * g_.result_channels + channel;
    const T* residual = r_.residual;
    if (transposed && residual) {
      rows_from_planes(residual, g_.result_channels, space_, begin, begin + rows, channel, columns, s.residual,
                       columns_);
      residual = s.residual;
    }
    T* out = transposed ? s.out : r_.out;
    const ConvEpilogue<T> epilogue{
        steps_.count() > 1 ? s.partial : nullptr, columns_, r_, channel, s.offsets, residual, out};
    if (packed) {
      const E* panels = packed + group * group_stride() + column / Traits::kNr * panel_stride();
      multiply(s, panels, step_stride(), group, begin, rows, columns, epilogue);
    } else {
      pack_columns(s, group, column, columns);
      multiply(s, s.weights, item_step_stride(), group, begin, rows, columns, epilogue);
    }
    if (transposed)
      planes_from_rows(s.out, columns_, r_.out, g_.result_channels, space_, begin, begin + rows, channel, columns);
    if (r_.statistics) {
      A* to = r_.statistics + block * 2 * g_.result_channels + channel;
      block_statistics(r_.out + begin * g_.result_channels + channel, g_.result_channels, rows, columns, to,
                       to + g_.result_channels);
    }
    release_large_scratch();
    return true;
  }

  void multiply(const Scratch& s, const E* panels, int64_t stride, int64_t group, int64_t begin, int64_t rows,
                int64_t columns, const ConvEpilogue<T>& epilogue) const {
    typename Lines<T>::Block lines{};
    for (int64_t i = 0, part = -1; i < steps_.count(); ++i) {
      const DepthStep step = steps_.at(i);
      const E* weights = panels + i * stride;
      GemmBlock<T> pairs[kMaxGemmBlocks];
      int64_t count = 1, depth = step.depth(), lda = ld_rows();
      if (lines_.is_used()) {
        if (step.channel != part)
          lines_.take(source_, group * g_.group_source() + step.channel, step.channels, begin, rows, s.rows, lines);
        part = step.channel;
        count = lines_.operands(step, lines, weights, pairs);
        depth = lines_.depth(step);
        lda = lines_.row_stride(step);
      } else {
        gather_rows(g_, source_, group, step, s.positions, rows, s.rows, lda, padded_k<T>(depth));
        lines = {1, rows, {0}, s.rows};
        pairs[0] = {s.rows, weights};
      }
      const auto run = [&](const auto& e) {
        gemm_runs<T>(lines.runs, lines.length, lines.starts, columns, depth, pairs, count, lda, panel_stride(), e);
      };
      if (i + 1 == steps_.count()) {
        run(epilogue);
      } else if (i == 0) {
        run(StoreSums<A>{s.partial, columns_});
      } else {
        run(AddSums<A>{s.partial, columns_});
      }
    }
  }

  const ConvProblem& p_;
  const Gather g_;
  const T *source_, *weight_;
  const ConvResult<T>& r_;
  const DepthSteps steps_;
  const Lines<T> lines_;
  const Blocks blocks_;
  const int64_t space_;
  int64_t columns_ = 0, column_blocks_ = 0;
};

}  // namespace ptk::PTK_ISA
