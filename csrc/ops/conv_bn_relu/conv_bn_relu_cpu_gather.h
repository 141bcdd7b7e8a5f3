// Which elements of its source a convolution multiplies: the geometry shared by forward, input and weight gradients.
//
// Along each axis, position i and tap j of the result meet source element i * step + base + j * delta, or a zero where
// that lies outside. The forward convolution is one such map. The input gradient is one for each residue of the input
// coordinate modulo the stride: of a residue's taps, every one meets a source element, so no product with a stride's
// zeros is ever computed.
//
// Depth (k) runs over taps, then channels. It is divided into steps of about kDepth, so that a block of rows of one
// step stays in L2 and a panel of weights in L1: whole rows of taps where they fit, of all channels or of a part of
// them.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_layout.h"

namespace ptk::PTK_ISA {

struct Axis {
  int64_t count, step, base, delta, taps, source;
  int64_t first_tap, tap_step;            // tap j is element first_tap + j * tap_step of the kernel
  int64_t first_out, out_step, out_size;  // position i is element first_out + i * out_step of the result
};

// Of size 1.
inline constexpr Axis kUnitAxis = {1, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1};

struct Gather {
  Axis axis[3];
  int64_t batch, groups;
  int64_t source_channels, result_channels;         // of all groups
  int64_t weight_source, weight_result, kernel[3];  // strides in the weight tensor; taps are innermost

  int64_t positions() const { return batch * axis[0].count * axis[1].count * axis[2].count; }
  int64_t taps() const { return axis[0].taps * axis[1].taps * axis[2].taps; }
  int64_t group_source() const { return source_channels / groups; }
  int64_t group_result() const { return result_channels / groups; }
  // Every position is its own and only source: a plain matrix product.
  bool is_pointwise() const {
    bool plain = taps() == 1;
    for (const Axis& a : axis) plain = plain && a.step == 1 && a.base == 0 && a.count == a.source && a.out_step == 1;
    return plain;
  }
  bool is_dense() const { return axis[0].out_step == 1 && axis[1].out_step == 1 && axis[2].out_step == 1; }
};

static inline Gather forward_gather(const ConvProblem& p) {
  Gather g{};
  for (int d = 0; d < 3; ++d)
    g.axis[d] = {p.out[d], p.stride[d], -p.padding[d], p.dilation[d], p.kernel[d], p.in[d], 0, 1, 0, 1, p.out[d]};
  g.batch = p.batch;
  g.groups = p.groups;
  g.source_channels = p.in_channels;
  g.result_channels = p.out_channels;
  for (int d = 0; d < 3; ++d) g.kernel[d] = p.kernel[d];
  g.weight_source = volume(p.kernel);
  g.weight_result = g.weight_source * (p.in_channels / p.groups);
  return g;
}

// Input coordinates phase + i * stride along one axis.
static inline Axis input_gradient_axis(const ConvProblem& p, int d, int64_t phase) {
  const int64_t stride = p.stride[d], dilation = p.dilation[d];
  Axis a{(p.in[d] - phase + stride - 1) / stride, 1, 0, 0, 0, p.out[d], 0, 1, phase, stride, p.in[d]};
  for (int64_t k = 0; k < p.kernel[d]; ++k) {
    const int64_t reach = phase + p.padding[d] - k * dilation;
    if (reach % stride) continue;
    if (a.taps == 0) {
      a.first_tap = k;
      a.base = reach / stride;
    } else if (a.taps == 1) {
      a.tap_step = k - a.first_tap;
      a.delta = reach / stride - a.base;
    }
    ++a.taps;
  }
  // Ascending in the source, as in the forward convolution: neighbouring taps then lie side by side in memory.
  if (a.taps > 1) {
    a.base += (a.taps - 1) * a.delta;
    a.delta = -a.delta;
    a.first_tap += (a.taps - 1) * a.tap_step;
    a.tap_step = -a.tap_step;
  }
  return a;
}

static inline Gather input_gradient_gather(const ConvProblem& p, const int64_t (&phase)[3]) {
  Gather g = forward_gather(p);
  for (int d = 0; d < 3; ++d) g.axis[d] = input_gradient_axis(p, d, phase[d]);
  g.source_channels = p.out_channels;
  g.result_channels = p.in_channels;
  const int64_t weight_out = g.weight_result;
  g.weight_result = g.weight_source;
  g.weight_source = weight_out;
  return g;
}

// So few positions to a weight that it costs about as much to rearrange a weight as to multiply by it.
static inline bool has_few_positions(const ConvProblem& p) {
  return p.groups == 1 && volume(p.kernel) > 1 && p.batch * volume(p.out) <= 128;
}

// Where the weight of a group begins.
static inline int64_t weight_offset(const ConvProblem& p, int64_t group) {
  return group * (p.out_channels / p.groups) * (p.in_channels / p.groups) * volume(p.kernel);
}

// Offset of tap (td, th, tw) of the gather in the weight tensor.
static inline int64_t tap_offset(const Gather& g, int64_t td, int64_t th, int64_t tw) {
  const Axis *d = &g.axis[0], *h = &g.axis[1], *w = &g.axis[2];
  return ((d->first_tap + td * d->tap_step) * g.kernel[1] + h->first_tap + th * h->tap_step) * g.kernel[2] +
         w->first_tap + tw * w->tap_step;
}

// A few bytes, for which a call of memcpy or memset would take longer than they do.
PTK_INLINE void copy_few(void* to, const void* from, int64_t bytes) {
#if PTK_X86_AVX512
  for (int64_t i = 0; i < bytes; i += 64) {
    const __mmask64 mask = bytes - i >= 64 ? ~0ull : (1ull << (bytes - i)) - 1;
    _mm512_mask_storeu_epi8(static_cast<char*>(to) + i, mask,
                            _mm512_maskz_loadu_epi8(mask, static_cast<const char*>(from) + i));
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

PTK_INLINE void clear_few(void* to, int64_t bytes) {
#if PTK_X86_AVX512
  for (int64_t i = 0; i < bytes; i += 64) {
    const __mmask64 mask = bytes - i >= 64 ? ~0ull : (1ull << (bytes - i)) - 1;
    _mm512_mask_storeu_epi8(static_cast<char*>(to) + i, mask, _mm512_setzero_si512());
  }
#else
  std::memset(to, 0, bytes);
#endif
}

// A range of depth: rows of taps, taps of each, and channels.
struct DepthStep {
  int64_t row, rows, tap, taps, channel, channels;
  int64_t depth() const { return rows * taps * channels; }
};

// Channels are divided first: a block of lines then holds one part of them for all taps.
class DepthSteps {
public:
  DepthSteps(const Gather& g, int64_t limit)
      : rows_(g.axis[0].taps * g.axis[1].taps), taps_(g.axis[2].taps), channels_(g.group_source()) {
    if (rows_ * taps_ * channels_ == 0) return;
    const int64_t least_channels = least(channels_, 16);
    tap_part_ = most(1, least(taps_, limit / least_channels));
    const int64_t parts = (tap_part_ * channels_ + limit - 1) / limit;
    part_ = least(channels_, round_up((channels_ + parts - 1) / parts, 16));
    row_part_ = tap_part_ < taps_ ? 1 : most(1, least(least(rows_, kMaxRows), limit / (tap_part_ * part_)));
    parts_ = (channels_ + part_ - 1) / part_;
    row_steps_ = (rows_ + row_part_ - 1) / row_part_;
    tap_steps_ = (taps_ + tap_part_ - 1) / tap_part_;
  }
  // A convolution whose window no tap reaches still has a result, zero.
  int64_t count() const { return most(1, parts_ * row_steps_ * tap_steps_); }
  DepthStep at(int64_t i) const {
    if (parts_ == 0) return {0, 0, 0, 0, 0, 0};
    const int64_t tap = i % tap_steps_ * tap_part_, row = i / tap_steps_ % row_steps_ * row_part_;
    const int64_t channel = i / (tap_steps_ * row_steps_) * part_;
    return {row,     least(row_part_, rows_ - row),    tap, least(tap_part_, taps_ - tap),
            channel, least(part_, channels_ - channel)};
  }
  // The step of an element of depth, and the step's first.
  int64_t find(int64_t row, int64_t tap, int64_t channel) const {
    return (channel / part_ * row_steps_ + row / row_part_) * tap_steps_ + tap / tap_part_;
  }
  DepthStep largest() const { return at(0); }

private:
  static constexpr int64_t kMaxRows = 16;
  int64_t rows_, taps_, channels_;
  int64_t row_part_ = 1, tap_part_ = 1, part_ = 1, parts_ = 0, row_steps_ = 1, tap_steps_ = 1;
};

// The source coordinates at tap 0 of consecutive positions.
struct Position {
  int64_t source[3];
  int64_t image;
  int64_t out;  // index of the position among all pixels of the result
};

static inline void locate(const Gather& g, int64_t begin, int64_t rows, Position* positions) {
  const Axis* a = g.axis;
  int64_t i[3], rest = begin;
  for (int d = 2; d >= 0; --d) {
    i[d] = rest % a[d].count;
    rest /= a[d].count;
  }
  int64_t image = rest;
  for (int64_t r = 0; r < rows; ++r) {
    Position& p = positions[r];
    p.image = image;
    p.out = image;
    for (int d = 0; d < 3; ++d) {
      p.source[d] = i[d] * a[d].step + a[d].base;
      p.out = p.out * a[d].out_size + a[d].first_out + i[d] * a[d].out_step;
    }
    for (int d = 2; d >= 0 && ++i[d] == a[d].count; --d) {
      i[d] = 0;
      if (d == 0) ++image;
    }
  }
}

#if PTK_X86_AVX512
// As gather_rows(), where a row takes one vector of bytes and neighbouring taps lie side by side: every row of taps is
// loaded to where it belongs in the vector, which is stored once.
template <class T>
static void gather_short_rows(const Gather& g, const T* source, const DepthStep& step, const Position* positions,
                              int64_t count, T* rows, int64_t ld) {
  const Axis *ad = &g.axis[0], *ah = &g.axis[1], *aw = &g.axis[2];
  const int64_t channels = g.source_channels, pixel = channels * static_cast<int64_t>(sizeof(T));
  const int64_t taps = step.taps * pixel;
  const auto below = [](int64_t bytes) { return bytes < 64 ? (1ull << bytes) - 1 : ~0ull; };
  // From the source coordinates of tap 0 to those of a row of taps, and from the first byte of the one to that which
  // comes first in the vector.
  struct TapRow {
    int64_t d, h, bytes;
  } tap_rows[64];
  for (int64_t i = 0; i < step.rows; ++i) {
    const int64_t d = (step.row + i) / ah->taps * ad->delta, h = (step.row + i) % ah->taps * ah->delta;
    tap_rows[i] = {d, h, (d * ah->source + h) * aw->source * pixel - i * taps};
  }
  for (int64_t r = 0; r < count; ++r) {
    const auto& [from, image, out] = positions[r];
    const int64_t w = from[2] + step.tap, first = most(0, -w), end = least(step.taps, aw->source - w);
    const uint64_t inside = end > first ? below(end * pixel) & ~below(first * pixel) : 0;
    const char* tap0 = reinterpret_cast<const char*>(source) +
                       (((image * ad->source + from[0]) * ah->source + from[1]) * aw->source + w) * pixel;
    __m512i row = _mm512_setzero_si512();
    for (int64_t i = 0; i < step.rows; ++i) {
      const auto d = static_cast<uint64_t>(from[0] + tap_rows[i].d), h = static_cast<uint64_t>(from[1] + tap_rows[i].h);
      // Only the bytes of the mask are read.
      if (d < static_cast<uint64_t>(ad->source) && h < static_cast<uint64_t>(ah->source))
        row = _mm512_or_si512(row, _mm512_maskz_loadu_epi8(inside << i * taps, tap0 + tap_rows[i].bytes));
    }
    _mm512_storeu_si512(rows + r * ld, row);
  }
}
#endif

// rows[r * ld + k] for one step of depth: the source elements that position r's taps meet, zeros outside and up to
// `padded` depth.
template <class T, class To>
static void gather_rows(const Gather& g, const T* source, int64_t group, const DepthStep& step,
                        const Position* positions, int64_t count, To* rows, int64_t ld, int64_t padded) {
  const Axis *ad = &g.axis[0], *ah = &g.axis[1], *aw = &g.axis[2];
  const int64_t channels = g.source_channels, first_channel = group * g.group_source() + step.channel;
  // Neighbouring taps lie side by side in memory.
  const bool merges = aw->delta == 1 && step.channels == channels;
  const int64_t width = step.taps * step.channels, depth = step.depth();
#if PTK_X86_AVX512
  if constexpr (std::is_same_v<T, To>) {
    constexpr int64_t vector = 64 / static_cast<int64_t>(sizeof(T));
    if (merges && padded <= vector && ld >= vector)
      return gather_short_rows(g, source, step, positions, count, rows, ld);
  }
#endif
  const auto copy = [&](const T* from, int64_t n, To* to) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<T, To>) {
      copy_few(to, from, n * static_cast<int64_t>(sizeof(To)));
    } else {
      pack_row(from, 1, n, n, to);
    }
  };
  const auto clear = [](To* to, int64_t n)
                         __attribute__((always_inline)) { clear_few(to, n * static_cast<int64_t>(sizeof(To))); };
  // Rows of taps outermost: which of them is at hand takes divisions.
  for (int64_t i = 0; i < step.rows; ++i) {
    const int64_t row = step.row + i, delta_d = row / ah->taps * ad->delta, delta_h = row % ah->taps * ah->delta;
    for (int64_t r = 0; r < count; ++r) {
      const Position& p = positions[r];
      To* to = rows + r * ld + i * width;
      const int64_t d = p.source[0] + delta_d, h = p.source[1] + delta_h;
      if (d < 0 || d >= ad->source || h < 0 || h >= ah->source) {
        clear(to, width);
        continue;
      }
      const T* line = source + ((p.image * ad->source + d) * ah->source + h) * aw->source * channels + first_channel;
      const int64_t w = p.source[2] + step.tap * aw->delta;
      if (merges) {
        const int64_t low = least(step.taps, most(0, -w)), high = most(low, least(step.taps, aw->source - w));
        clear(to, low * channels);
        copy(line + (w + low) * channels, (high - low) * channels, to + low * channels);
        clear(to + high * channels, (step.taps - high) * channels);
        continue;
      }
      for (int64_t t = 0; t < step.taps; ++t) {
        const int64_t at = w + t * aw->delta;
        if (at < 0 || at >= aw->source) {
          clear(to + t * step.channels, step.channels);
        } else {
          copy(line + at * channels, step.channels, to + t * step.channels);
        }
      }
    }
  }
  for (int64_t r = 0; padded > depth && r < count; ++r) clear(rows + r * ld + depth, padded - depth);
}

}  // namespace ptk::PTK_ISA
