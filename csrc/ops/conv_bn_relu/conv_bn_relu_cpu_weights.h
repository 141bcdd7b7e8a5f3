// Weights on their way into the panels of a matrix product: read in the order in which they lie in memory, a part of
// the channels of one panel at a time, so that what follows finds them in cache.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_gather.h"

namespace ptk::PTK_ISA {

// Channels of a part: a multiple of the engine's kKStep and of a cache line.
inline constexpr int64_t kPackedChannels = 32;

// How far weights are fetched before they are read, in elements.
inline constexpr int64_t kAhead = 128;

// loose[channel][tap][column] of `channels` source channels from `first` and of the panel whose first result channel is
// n0, zeros behind its `columns`. Taps are counted as in the weight tensor, which begins at `weight`.
template <class T>
static void load_weights(const Gather& g, const T* weight, int64_t n0, int64_t columns, int64_t first, int64_t channels,
                         Acc<T>* loose) {
  using A = Acc<T>;
  constexpr int64_t nr = GemmTraits<T>::kNr, lanes = kLanes<A>, line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t taps = volume(g.kernel), depth = channels * taps, whole = columns / lanes * lanes;
  weight += n0 * g.weight_result + first * g.weight_source;
  // Elements of depth below `done` have their first `whole` columns.
  int64_t done = 0;
  if (g.weight_source == taps) {
    // Channels and taps of a column are neighbours.
    done = depth / lanes * lanes;
    for (int64_t n = 0; n < whole; n += lanes)
      for (int64_t k = 0; k < done; k += lanes) {
        Vec<A> rows[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          const T* from = weight + (n + i) * g.weight_result + k;
          // A row is too short for the processor to see where it leads.
          __builtin_prefetch(from + kAhead);
          rows[i] = load_as(from);
        }
        transpose<A>(rows);
        for (int64_t i = 0; i < lanes; ++i) store(loose + (k + i) * nr + n, rows[i]);
      }
  } else if (g.weight_result == taps && taps <= lanes) {
    // Columns and taps of a channel are neighbours: of `lanes` columns, as many taps as there are, and what is read
    // beyond them is not used. The tensor's last channel is left out, where that might lie behind it.
    const int64_t ends = taps == 1 || first + channels < g.group_source() ? channels : channels - 1;
    done = ends * taps;
    for (int64_t c = 0; c < ends; ++c) {
      const T* from = weight + c * g.weight_source;
      for (int64_t i = 0; i < columns * taps; i += line) __builtin_prefetch(from + 2 * g.weight_source + i);
      A* to = loose + c * taps * nr;
      for (int64_t n = 0; n < whole; n += lanes) {
        if (taps == 1) {
          store(to + n, load_as(from + n));
          continue;
        }
        Vec<A> rows[lanes];
        for (int64_t i = 0; i < lanes; ++i) rows[i] = load_as(from + (n + i) * taps);
        transpose<A>(rows);
        for (int64_t tap = 0; tap < taps; ++tap) store(to + tap * nr + n, rows[tap]);
      }
    }
  }
  for (int64_t c = 0, k = 0; c < channels; ++c)
    for (int64_t tap = 0; tap < taps; ++tap, ++k) {
      const T* from = weight + c * g.weight_source + tap;
      A* to = loose + k * nr;
      for (int64_t i = k < done ? whole : 0; i < columns; ++i) to[i] = load_scalar(from + i * g.weight_result);
      for (int64_t i = columns; i < nr; ++i) to[i] = A(0);
    }
}

}  // namespace ptk::PTK_ISA
