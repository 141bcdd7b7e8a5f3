// What forward and backward of the recurrent layers share on the CPU: sizes, slices, products in steps of depth.
#pragma once

#include "csrc/cpu/carver.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/scratch.h"
#include "csrc/ops/packed_rnn/packed_rnn.h"
#include "csrc/ops/packed_rnn/packed_rnn_cpu_product.h"
#include "csrc/ops/packed_rnn/packed_rnn_team.h"

namespace ptk::PTK_ISA {

// Units are dealt out in panels of the engine: a gate's columns are padded to whole panels, so that the gates of a unit
// lie at the same place of equally long rows and no vector of units is cut.
template <class T>
struct RnnSizes {
  using Traits = GemmTraits<T>;
  static constexpr int64_t kNr = Traits::kNr;
  static_assert(kNr % Traits::kKStep == 0, "a row of units is a row of the next product's A");

  explicit RnnSizes(const RnnProblem& p) : p(p) {
    // A round costs a meeting of all slices: less than this many multiply-adds each is not worth it.
    constexpr int64_t kWorthwhile = 32 << 10;
    const int64_t mean_batch = p.tokens / most(p.steps, 1);
    const int64_t worthwhile = mean_batch * gates * p.hidden * (p.outputs + (p.input + 1) / 2) / kWorthwhile;
    const int64_t threads = least(num_threads(), Team::kMaxSlices);
    slices = most(1, least(least(threads / p.directions, panels), worthwhile));
    // Below this many multiply-adds a second thread gains a fifth at most, and a call ends when the last of its threads
    // has come: where another process has the core, after milliseconds.
    constexpr int64_t kParallelWork = 1 << 21;
    const int64_t weights = p.directions * gates * p.hidden * (p.input + p.outputs);
    serial = num_threads() == 1 || weights * most(1, p.tokens) < kParallelWork;
  }

  // body(i) for every i < count, by all threads where the problem is worth them.
  template <class Body>
  void each_item(int64_t count, const Body& body) const {
    if (!serial) return parallel_items(count, body);
    for (int64_t i = 0; i < count; ++i) body(i);
  }

  int64_t slice_panel(int64_t slice) const { return slice * panels / slices; }
  int64_t slice_output_panel(int64_t slice) const { return slice * (outputs / kNr) / slices; }
  int64_t slice_units(int64_t slice) const { return (slice_panel(slice + 1) - slice_panel(slice)) * kNr; }
  int64_t padded_rows() const { return round_up(p.batch, 32); }
  // Where a direction's cells lie in a row of output.
  int64_t cell_column(int64_t d) const { return p.directions * p.outputs + d * p.hidden; }
  int64_t next_batch(const int64_t* batch_sizes, int64_t step) const {
    return step + 1 < p.steps ? batch_sizes[step + 1] : 0;
  }

  const RnnProblem& p;
  const int64_t gates = gate_count(p.mode);
  const int64_t units = padded_n<T>(p.hidden), panels = units / kNr;
  const int64_t outputs = padded_n<T>(p.outputs);
  int64_t slices;
  bool serial;
};

template <class T>
PTK_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    T narrow[kLanes<float>];
    store_as(narrow, v);
    return load_as(narrow);
  } else {
    return v;
  }
}

// v, rounded to the storage type T, as an element of the next product.
template <class T>
PTK_INLINE void store_element(Element<T>* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(Element<T>) == 2) {
    store_as(p, v);
  } else {
    store(p, rounded<T>(v));
  }
}

template <class T>
PTK_INLINE void store_valid(T* p, Vec<Acc<T>> v, int64_t valid) {
  if (valid > 0) store_as_partial(p, v, valid);
}
template <class T>
PTK_INLINE Vec<Acc<T>> load_valid(const T* p, int64_t valid) {
  return valid > 0 ? load_as_partial(p, valid) : Vec<Acc<T>>{};
}

// Vectors of units that a mode has beyond biases: those of i, f and o for peepholes; weights of the normalised gates,
// their biases, then weight and bias of the cells.
constexpr int64_t own_vectors(RnnMode mode) {
  if (mode == RnnMode::peephole_lstm) return 3;
  return is_normalised(mode) ? 2 * (gate_count(mode) + (has_cells(mode) ? 1 : 0)) : 0;
}

template <class U>
PTK_INLINE U* at(const void* base, int64_t offset) {
  return static_cast<U*>(const_cast<void*>(base)) + offset;
}

// Calls body(vector, parameter, place of the vector in it) for each of a mode's own vectors.
template <class Void, class Body>
inline void each_own_vector(const RnnProblem& p, Void* peephole, Void* norm_hidden, Void* norm_cell, const Body& body) {
  const int64_t normalised = 2 * gate_count(p.mode);
  for (int64_t i = 0; i < own_vectors(p.mode); ++i) {
    if (!is_normalised(p.mode)) {
      body(i, peephole, i * p.hidden);
    } else if (i < normalised) {
      body(i, norm_hidden, i * p.hidden);
    } else {
      body(i, norm_cell, (i - normalised) * p.hidden);
    }
  }
}

}  // namespace ptk::PTK_ISA
