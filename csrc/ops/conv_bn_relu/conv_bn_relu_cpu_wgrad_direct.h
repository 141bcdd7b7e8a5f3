// Weight gradient whose operands are multiplied as they lie in memory: float32 and float64, whose storage is what the
// arithmetic takes.
//
//   grad_weight[o, tap, c] = sum over positions of grad_conv[position, o] * source[position + tap, c]
//
//   layout   both operands are channels last. Of a line of positions, a tap meets a run of source pixels: one position
//            after the other, a strip of neighbouring output channels are broadcast and two vectors of input channels
//            loaded. Nothing is gathered or transposed; what many products read is first brought together, since rows
//            of many channels lie pages apart: the gradient, and the source where there is one tap. Of few input
//            channels, the taps of a line are neighbours in a copy of the source with zeros at the ends of its lines,
//            and count as channels.
//
//   tiling   an item is a part of the columns (input channels) and a segment of the lines, long ones cut into pieces.
//            Its sums, [tap][output channel][column], stay in L2; a chunk of lines passes by all of them at a time.
//            Where one chunk is all there is, sums of a strip and two vectors go to the weights at once, from L1.
//
//   threads  the segments are a function of the problem alone, and are added up in order.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_gather.h"

namespace ptk::PTK_ISA {

template <class T>
class DirectWeightGradient {
  using V = Vec<T>;
  static constexpr int kMr = GemmTraits<T>::kMr, kLane = kLanes<T>, kNr = 2 * kLane;

public:
  DirectWeightGradient(const Gather& gather, const T* source, const T* grad, T* grad_weight)
      : g_(gather), source_(source), grad_(grad), grad_weight_(grad_weight),
        merges_(gather.groups == 1 && gather.axis[2].taps > 1 && gather.axis[2].delta == 1 &&
                gather.source_channels * gather.axis[2].taps <= 2 * kNr) {
    const Axis& w = g_.axis[2];
    padded_width_ = (w.count - 1) * w.step + w.taps;
    columns_ = g_.group_source() * (merges_ ? w.taps : 1);
    tiles_ = g_.axis[0].taps * g_.axis[1].taps * (merges_ ? 1 : w.taps);
    const int64_t wanted = most(kNr, kSumsBytes / (tiles_ * outputs() * static_cast<int64_t>(sizeof(T))) / kNr * kNr);
    part_ = least(wanted, round_up(columns_, kNr));
    parts_ = (columns_ + part_ - 1) / part_;
    pieces_ = (w.count + kPositions - 1) / kPositions;
    lines_ = g_.batch * g_.axis[0].count * g_.axis[1].count * pieces_;
    chunk_ = most(1, least(kMaxLines, kPositions / w.count));
    const int64_t chunks = (lines_ + chunk_ - 1) / chunk_;
    const int64_t segments = least(chunks, (kItems + parts_ * g_.groups - 1) / (parts_ * g_.groups));
    segment_ = (chunks + segments - 1) / segments * chunk_;
    segments_ = (lines_ + segment_ - 1) / segment_;
    is_single_ = lines_ <= chunk_ && !merges_;
    full_ = kTail < kMr && outputs() % kTail == 0 ? outputs() - outputs() % (kMr / 2 * kTail) : outputs();
    ld_sums_ = is_single_ ? kNr : part_;
    tile_stride_ = is_single_ ? kMr * kNr : outputs() * part_;
  }

  // False when memory ran out.
  bool run() const {
    if (tiles_ * columns_ == 0) return true;
    const int64_t items = parts_ * g_.groups;
    const int64_t sums_count = is_single_ ? 0 : items * segments_ * sums_size();
    const SharedBuffer sums(sums_count * static_cast<int64_t>(sizeof(T)));
    const SharedBuffer padded(merges_ ? (padded_size() + kNr) * static_cast<int64_t>(sizeof(T)) : 0);
    if (!sums || !padded) return false;
    if (merges_) pad(padded.as<T>());
    bool ok = true;
    parallel_items(items * segments_, [&](int64_t i) {
      const T* source = merges_ ? padded.as<T>() : source_;
      if (!item(source, i / segments_, i % segments_, sums.as<T>() + i * sums_size()))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    if (!ok || is_single_) return ok;
    parallel_items(g_.result_channels, [&](int64_t o) { finish(o, sums.as<T>()); });
    return true;
  }

private:
  // Enough items for many cores, few enough that their sums stay small.
  static constexpr int64_t kItems = 16, kMaxLines = 16, kPositions = 128;
  static constexpr int64_t kSumsBytes = PTK_ISA_LEVEL >= 2 ? 768 * 1024 : 256 * 1024;

  int64_t outputs() const { return g_.group_result(); }
  int64_t sums_size() const { return tiles_ * outputs() * part_; }
  int64_t padded_size() const { return g_.batch * g_.axis[0].source * g_.axis[1].source * padded_width_ * channels(); }
  int64_t channels() const { return g_.source_channels; }

  // The source with its lines cut and filled up to what the taps meet.
  void pad(T* to) const {
    const Axis& w = g_.axis[2];
    const int64_t before = most(0, -w.base), skipped = most(0, w.base);
    const int64_t kept = most(0, least(padded_width_ - before, w.source - skipped));
    parallel_items(g_.batch * g_.axis[0].source * g_.axis[1].source, [&](int64_t i) {
      T* line = to + i * padded_width_ * channels();
      std::memset(line, 0, padded_width_ * channels() * sizeof(T));
      if (kept > 0)
        std::memcpy(line + least(before, padded_width_) * channels(), source_ + (i * w.source + skipped) * channels(),
                    kept * channels() * sizeof(T));
    });
  }

  // Strips of kMr output channels up to full_, of kTail behind it: so that a strip of one or two, whose sums would wait
  // for one another, is not left.
  static constexpr int kTail = kMr == 14 ? 8 : kMr;
  int64_t strip(int64_t o) const { return o < full_ ? o / kMr : full_ / kMr + (o - full_) / kTail; }
  int64_t strip_rows(int64_t o) const { return least(o < full_ ? kMr : kTail, outputs() - o); }

  // Neighbouring positions of a line and the source pixels that one tap meets at them.
  struct Run {
    int64_t row;  // of the chunk's gradient
    const T* source;
    int64_t positions;
  };
  struct Runs {
    int64_t count;
    Run list[kMaxLines];
  };

  // Runs of a tile of sums, a row of taps and one of its taps, at lines [begin, end), or pieces of lines.
  void find_runs(const T* source, int64_t tile, int64_t begin, int64_t end, Runs& runs) const {
    const Axis &d = g_.axis[0], &h = g_.axis[1], &w = g_.axis[2];
    const int64_t row = merges_ ? tile : tile / w.taps, tap = merges_ ? 0 : tile % w.taps;
    const int64_t td = row / h.taps, th = row % h.taps, width = merges_ ? padded_width_ : w.source;
    const int64_t offset = merges_ ? 0 : w.base + tap * w.delta, last = w.source - 1 - offset;
    const int64_t low = offset >= 0 ? 0 : least(w.count, (-offset + w.step - 1) / w.step);
    const int64_t high = merges_ ? w.count : last < 0 ? 0 : least(w.count, last / w.step + 1);
    runs.count = 0;
    if (low >= high) return;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t line = piece / pieces_, start = piece % pieces_ * kPositions;
      const int64_t from = most(low, start), to = least(high, start + kPositions);
      if (from >= to) continue;
      const int64_t y = line % h.count * h.step + h.base + th * h.delta, rest = line / h.count;
      const int64_t z = rest % d.count * d.step + d.base + td * d.delta, image = rest / d.count;
      if (y < 0 || y >= h.source || z < 0 || z >= d.source) continue;
      const int64_t pixel = ((image * d.source + z) * h.source + y) * width + from * w.step + offset;
      const int64_t row = (line - begin / pieces_) * w.count + from - begin % pieces_ * kPositions;
      runs.list[runs.count++] = {row, source + pixel * channels(), to - from};
    }
  }

  bool item(const T* source, int64_t which, int64_t segment, T* sums) const {
    const int64_t group = which / parts_, first = which % parts_ * part_, columns = least(part_, columns_ - first);
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    const int64_t start = segment * segment_, end = least(lines_, start + segment_);
    for (int64_t begin = start; begin < end; begin += chunk_) {
      const int64_t stop = least(end, begin + chunk_);
      bring_gradient(group, begin, stop, s.grad);
      for (int64_t tile = 0; tile < tiles_; ++tile) find_runs(source, tile, begin, stop, s.runs[tile]);
      for (int64_t c = 0; c < columns; c += kNr) {
        const int64_t channel = group * g_.group_source() + first + c, valid = least(kNr, columns - c);
        if (brings_source()) bring_source(s.runs[0], channel, valid, s.source);
        for (int64_t o = 0, rows; o < outputs(); o += rows) {
          rows = strip_rows(o);
          T* to = is_single_ ? s.sums : sums + o * part_ + c;
          for (int64_t tile = 0; tile < tiles_; ++tile) {
            T* tile_sums = to + tile * tile_stride_;
            if (begin == start)
              for (int64_t m = 0; m < rows; ++m) std::memset(tile_sums + m * ld_sums_, 0, kNr * sizeof(T));
            add_rows(s.runs[tile], s.grad + strip(o) * kPositions * kLd, rows, brings_source() ? s.source : nullptr,
                     channel, valid, tile_sums);
          }
          if (is_single_) write_rows(to, rows, valid, group * outputs() + o, first + c);
        }
      }
    }
    release_large_scratch();
    return true;
  }

  // A row of kMr numbers, padded so that it lies in as few cache lines as can be.
  static constexpr int64_t kLd = kMr > 8 ? 16 : 8;
  bool brings_source() const { return tiles_ == 1 && outputs() > kMr && !merges_; }

  struct Scratch {
    Runs* runs;
    T *grad, *source, *sums;
  };
  Scratch carve(Carver& carver) const {
    Scratch s;
    s.runs = carver.take<Runs>(tiles_);
    s.grad = carver.take<T>((strip(outputs() - 1) + 1) * kPositions * kLd + kLd);
    s.source = carver.take<T>(brings_source() ? kPositions * kNr : 0);
    s.sums = carver.take<T>(is_single_ ? tiles_ * tile_stride_ : 0);
    return s;
  }

  // grad[strip of kMr output channels][position][channel]
  void bring_gradient(int64_t group, int64_t begin, int64_t end, T* grad) const {
    const int64_t width = g_.axis[2].count;
    const auto first_position = [&](int64_t piece) {
      return piece / pieces_ * width + least(width, piece % pieces_ * kPositions);
    };
    const int64_t first = first_position(begin), rows = first_position(end) - first;
    const T* from = grad_ + first * g_.result_channels + group * outputs();
    for (int64_t o = 0, channels; o < outputs(); o += channels) {
      T* to = grad + strip(o) * kPositions * kLd;
      channels = strip_rows(o);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(to + r * kLd, from + r * g_.result_channels + o, channels * sizeof(T));
    }
  }

  // source[position of the runs][column], zeros behind the columns.
  void bring_source(const Runs& runs, int64_t channel, int64_t columns, T* to) const {
    const int64_t step = g_.axis[2].step * channels();
    for (int64_t r = 0; r < runs.count; ++r) {
      const T* from = runs.list[r].source + channel;
      for (int64_t i = 0; i < runs.list[r].positions; ++i, from += step, to += kNr) {
        store(to, load_partial(from, columns));
        store(to + kLane, columns > kLane ? load_partial(from + kLane, columns - kLane) : V{});
      }
    }
  }

  // Full strips of rows, or binary steps of what is left. `source`: brought together, or null.
  void add_rows(const Runs& runs, const T* grad, int64_t rows, const T* source, int64_t c, int64_t columns,
                T* sums) const {
    if (rows == kMr) return add_columns<kMr>(runs, grad, source, c, columns, sums);
    const auto step = [&]<int M>() {
      if (rows < M) return;
      add_columns<M>(runs, grad, source, c, columns, sums);
      grad += M, rows -= M, sums += M * ld_sums_;
    };
    if constexpr (kMr > 8) step.template operator()<8>();
    step.template operator()<4>();
    step.template operator()<2>();
    step.template operator()<1>();
  }

  template <int M>
  void add_columns(const Runs& runs, const T* grad, const T* source, int64_t c, int64_t columns, T* sums) const {
    // Copies of the source have room behind the last column; the source itself does not.
    const bool whole = source || merges_;
    if (columns == kNr || (whole && columns > kLane)) return add<M, 2>(runs, grad, source, c, kLane, sums);
    if (columns > kLane) {
      add<M, 1>(runs, grad, source, c, kLane, sums);
      return add<M, 1>(runs, grad, source, c + kLane, columns - kLane, sums + kLane);
    }
    add<M, 1>(runs, grad, source, c, whole ? kLane : columns, sums);
  }

  // sums[m][column] += over the runs; `valid` columns of the last vector exist.
  template <int M, int N>
  void add(const Runs& runs, const T* grad, const T* brought, int64_t c, int64_t valid, T* sums) const {
    const int64_t step = brought ? kNr : g_.axis[2].step * channels();
    V sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] = load(sums + m * ld_sums_ + n * kLane);
    const T* source = brought;
    for (int64_t r = 0; r < runs.count; ++r) {
      const T* rows = grad + runs.list[r].row * kLd;
      if (!brought) source = runs.list[r].source + c;
      if (valid >= kLane) {
#pragma GCC unroll 1
        for (int64_t i = 0; i < runs.list[r].positions; ++i, rows += kLd, source += step)
          multiply<M, N>(sum, rows, source, kLane);
      } else {
#pragma GCC unroll 1
        for (int64_t i = 0; i < runs.list[r].positions; ++i, rows += kLd, source += step)
          multiply<M, N>(sum, rows, source, valid);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) store(sums + m * ld_sums_ + n * kLane, sum[m][n]);
  }

  template <int M, int N>
  PTK_INLINE void multiply(V (&sum)[M][N], const T* grad, const T* source, int64_t valid) {
    V x[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) x[n] = load_partial(source + n * kLane, valid);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V factor = broadcast(grad[m]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += factor * x[n];
    }
  }

  // Adds the segments of one output channel and writes its weights where they belong.
  void finish(int64_t channel, const T* sums) const {
    const int64_t group = channel / outputs(), o = channel % outputs(), taps = g_.taps();
    T* weight = grad_weight_ + channel * g_.group_source() * taps;
    for (int64_t part = 0; part < parts_; ++part) {
      const int64_t first = part * part_, columns = least(part_, columns_ - first);
      const T* from = sums + (group * parts_ + part) * segments_ * sums_size() + o * part_;
      for (int64_t c = 0; c < columns; c += kLane) {
        const int64_t valid = least(kLane, columns - c);
        if (merges_) {
          for (int64_t tile = 0; tile < tiles_; ++tile) {
            T lanes[kLane];
            store(lanes, total(from + tile * tile_stride_ + c));
            for (int64_t i = 0; i < valid; ++i) {
              const int64_t column = first + c + i;
              weight[column % channels() * taps + tile * g_.axis[2].taps + column / channels()] = lanes[i];
            }
          }
        } else {
          write_taps(from + c, valid, weight + (first + c) * taps);
        }
      }
    }
  }

  // Sums of a strip of output channels, complete, to the weights of input channels from `column`.
  void write_rows(const T* sums, int64_t rows, int64_t columns, int64_t channel, int64_t column) const {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t c = 0; c < columns; c += kLane)
        write_taps(sums + m * kNr + c, least(kLane, columns - c),
                   grad_weight_ + ((channel + m) * g_.group_source() + column + c) * tiles_);
  }

  V total(const T* sums) const {
    V sum = load(sums);
    for (int64_t s = 1; s < segments_; ++s) sum += load(sums + s * sums_size());
    return sum;
  }

  // weight[channel][tap] of up to a vector of channels from vectors of channels for each tap.
  void write_taps(const T* sums, int64_t valid, T* weight) const {
    const int64_t taps = tiles_;
    if (taps == 1) return store_partial(weight, total(sums), valid);
    for (int64_t first = 0; first < taps; first += kLane) {
      const int64_t count = least(kLane, taps - first);
      V rows[kLane];
      for (int64_t i = 0; i < kLane; ++i) rows[i] = i < count ? total(sums + (first + i) * tile_stride_) : V{};
      transpose<T>(rows);
      for (int64_t i = 0; i < valid; ++i) store_partial(weight + i * taps + first, rows[i], count);
    }
  }

  const Gather g_;
  const T *source_, *grad_;
  T* grad_weight_;
  const bool merges_;
  bool is_single_;  // one chunk of lines is all there is
  int64_t padded_width_, pieces_, columns_, tiles_, part_, parts_, lines_, chunk_, segment_, segments_;
  int64_t ld_sums_, tile_stride_, full_;
};

}  // namespace ptk::PTK_ISA
