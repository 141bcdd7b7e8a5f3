// Positions of a channels-first tensor, moved by the taps of a window, as runs of elements that lie in one line of a
// plane: found once for a panel of positions, copied for every channel.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_gather.h"

namespace ptk::PTK_ISA {

// `length` positions from column `at`, whose first source element lies `source` elements into the first image's plane.
struct Run {
  int64_t source;
  int32_t at, length;
};
// Runs of one tap; `full` where they leave no column out.
struct TapRuns {
  int32_t begin, end;
  bool full;
};

// Rounded up. Strides are 1 or 2 but for the rarest, and a division takes longer than what it is for.
PTK_INLINE int64_t divide_up(int64_t x, int64_t step) {
  return step == 1 ? x : step == 2 ? (x + 1) >> 1 : (x + step - 1) / step;
}

// Runs of `columns` <= kNr positions for every tap, in the order of taps in the weight tensor. `runs` has room for kNr
// of each tap.
template <int kNr>
static void find_runs(const Gather& g, const Position* positions, int64_t columns, Run* runs, TapRuns* taps) {
  const Axis &d = g.axis[0], &h = g.axis[1], &w = g.axis[2];
  // Positions of one line of the result.
  struct Piece {
    int64_t at, length;
  };
  Piece pieces[kNr];
  int64_t count = 0, lines = 0;
  for (int64_t n = 0; n < columns; n += pieces[lines++].length) {
    const int64_t left = divide_up((w.count - 1) * w.step + w.base - positions[n].source[2], w.step) + 1;
    pieces[lines] = {n, least(columns - n, left)};
  }
  for (int64_t z = 0; z < d.taps; ++z)
    for (int64_t y = 0; y < h.taps; ++y)
      for (int64_t x = 0; x < w.taps; ++x, ++taps) {
        taps->begin = static_cast<int32_t>(count);
        int64_t covered = 0;
        for (int64_t i = 0; i < lines; ++i) {
          const Position& p = positions[pieces[i].at];
          const int64_t plane = p.source[0] + z * d.delta, line = p.source[1] + y * h.delta;
          if (plane < 0 || plane >= d.source || line < 0 || line >= h.source) continue;
          const int64_t from = p.source[2] + x * w.delta;
          const int64_t low = from >= 0 ? 0 : divide_up(-from, w.step);
          const int64_t high = least(pieces[i].length, divide_up(w.source - from, w.step));
          if (low >= high) continue;
          const int64_t first = ((p.image * g.source_channels * d.source + plane) * h.source + line) * w.source;
          runs[count++] = {first + from + low * w.step, static_cast<int32_t>(pieces[i].at + low),
                           static_cast<int32_t>(high - low)};
          covered += high - low;
        }
        taps->end = static_cast<int32_t>(count);
        taps->full = covered == kNr;
      }
}

template <int Bytes>
PTK_INLINE void copy_fixed(char* to, const char* from) {
  typedef char Block __attribute__((vector_size(Bytes), aligned(1), may_alias));
  *reinterpret_cast<Block*>(to) = *reinterpret_cast<const Block*>(from);
}

// Neighbouring elements, without a call or a loop over elements.
template <class T>
PTK_INLINE void copy_elements(const T* source, int64_t length, T* target) {
  const char* from = reinterpret_cast<const char*>(source);
  char* to = reinterpret_cast<char*>(target);
  int64_t bytes = length * static_cast<int64_t>(sizeof(T));
  for (; bytes >= kVectorBytes; bytes -= kVectorBytes, from += kVectorBytes, to += kVectorBytes)
    copy_fixed<kVectorBytes>(to, from);
  if (kVectorBytes > 32 && bytes & 32) copy_fixed<32>(to, from), from += 32, to += 32;
  if (kVectorBytes > 16 && bytes & 16) copy_fixed<16>(to, from), from += 16, to += 16;
  if (bytes & 8) copy_fixed<8>(to, from), from += 8, to += 8;
  if (sizeof(T) < 8 && bytes & 4) copy_fixed<4>(to, from), from += 4, to += 4;
  if (sizeof(T) < 4 && bytes & 2) copy_fixed<2>(to, from);
}

template <class V, int... I>
PTK_INLINE V even_lanes(V low, V high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(low, high, (2 * I)...);
}

// Every other element, in whole vectors of N, as long as more follow, so that nothing behind the last is read. Returns
// how far it came.
template <int N, class T>
PTK_INLINE int64_t copy_even_vectors(const T* source, int64_t i, int64_t length, T* target) {
  using U = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  typedef U Block __attribute__((vector_size(N * sizeof(U)), aligned(1), may_alias));
  for (; i + N < length; i += N) {
    const Block low = *reinterpret_cast<const Block*>(source + 2 * i),
                high = *reinterpret_cast<const Block*>(source + 2 * i + N);
    *reinterpret_cast<Block*>(target + i) = even_lanes(low, high, std::make_integer_sequence<int, N>{});
  }
  return i;
}
template <class T>
PTK_INLINE void copy_even_elements(const T* source, int64_t length, T* target) {
  int64_t i = copy_even_vectors<kVectorBytes / static_cast<int>(sizeof(T))>(source, 0, length, target);
  for (i = copy_even_vectors<4>(source, i, length, target); i < length; ++i) target[i] = source[2 * i];
}

// Elements `step` apart.
template <class T>
PTK_INLINE void copy_spaced(const T* source, int64_t step, int64_t length, T* target) {
  if (step == 1) {
    copy_elements(source, length, target);
  } else if (step == 2) {
    copy_even_elements(source, length, target);
  } else {
    for (int64_t i = 0; i < length; ++i) target[i] = source[i * step];
  }
}

// rows[(channel * taps + tap) * nr + column] of `channels` planes, zeros where there is no run.
template <class T>
static void copy_runs(const T* planes, int64_t plane, int64_t channels, int64_t taps, int64_t step, const Run* runs,
                      const TapRuns* of_tap, T* rows, int64_t nr) {
  for (int64_t c = 0; c < channels; ++c, planes += plane)
    for (int64_t tap = 0; tap < taps; ++tap, rows += nr) {
      if (!of_tap[tap].full) std::memset(rows, 0, nr * sizeof(T));
      for (int32_t i = of_tap[tap].begin; i < of_tap[tap].end; ++i)
        copy_spaced(planes + runs[i].source, step, runs[i].length, rows + runs[i].at);
    }
}

}  // namespace ptk::PTK_ISA
