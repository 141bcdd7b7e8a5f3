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
  constexpr int64_t nr = GemmTraits<T>::kNr, lanes = kLanes<A>;
  const int64_t taps = volume(g.kernel), depth = channels * taps;
  weight += n0 * g.weight_result + first * g.weight_source;
  int64_t n = 0, done = 0;
  if (g.weight_source == taps) {
    // Channels and taps of a column are neighbours.
    done = depth / lanes * lanes;
    for (; n + lanes <= columns; n += lanes)
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
  }
  const int64_t full = n;
  if (g.weight_result == 1 && taps == 1) {
    // Columns are neighbours.
    for (; n + lanes <= columns; n += lanes)
      for (int64_t c = 0; c < channels; ++c) store(loose + c * nr + n, load_as(weight + c * g.weight_source + n));
  } else if (g.weight_result == taps && taps <= lanes) {
    // Columns and taps of a channel are neighbours: of `lanes` columns, as many taps as there are, and what is read
    // beyond them is not used. The last columns are left out, where that might lie behind the tensor.
    for (; n + 2 * lanes <= columns || (n + lanes <= columns && taps == lanes); n += lanes)
      for (int64_t c = 0; c < channels; ++c) {
        Vec<A> rows[lanes];
        for (int64_t i = 0; i < lanes; ++i) rows[i] = load_as(weight + c * g.weight_source + (n + i) * taps);
        transpose<A>(rows);
        for (int64_t tap = 0; tap < taps; ++tap) store(loose + (c * taps + tap) * nr + n, rows[tap]);
      }
  }
  const int64_t begun = n;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const T* from = weight + c * g.weight_source + tap;
      A* to = loose + (c * taps + tap) * nr;
      for (int64_t i = c * taps + tap < done ? full : begun > full ? begun : 0; i < columns; ++i)
        to[i] = load_scalar(from + i * g.weight_result);
      for (int64_t i = columns; i < nr; ++i) to[i] = A(0);
    }
}

}  // namespace ptk::PTK_ISA
