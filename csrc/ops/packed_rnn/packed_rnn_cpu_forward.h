// Forward of one recurrent layer on the CPU.
//
//   round     a step of one direction:  sums = x W + h U  for the sequences still running, then the gates, in place
//
//   slices    a thread owns some units of a direction: their columns of W and U (packed once per call, gates side by
//             side), their sums and cells. Per step the threads of a direction meet once, to exchange h.
//
//   one       sequence alone: weights are multiplied as they lie, along their rows.
//
//   input     x W is computed for several steps at a time, enough rows to use the registers well, just before the first
//             of them: it never leaves the cache.
//
// Every sum runs over its terms in the same order whatever the slices, the number of steps in the call, or the batch
// where it is more than one sequence: results depend neither on the number of threads nor on how sequences are cut into
// calls.
#pragma once

#include "packed_rnn_cpu_common.h"

namespace ptk::PTK_ISA {

template <class T>
class RnnForward {
  using E = Element<T>;
  using A = Acc<T>;
  static constexpr int64_t kNr = GemmTraits<T>::kNr;
  static constexpr int64_t kLanesA = kLanes<A>;
  static constexpr int64_t kInputRows = 128;

public:
  explicit RnnForward(const RnnForwardParams& params) : f_(params), p_(params.problem), z_(params.problem) {}

  // False when memory ran out.
  bool run() {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    carve(carver);
    plan();
    const int64_t items = packs() ? z_.gates * z_.panels : 0;
    const int64_t projection = p_.projected && !along_rows() ? z_.outputs / kNr : 0;
    z_.each_item(p_.directions * (2 * items + projection), [&](int64_t i) {
      const int64_t d = i % p_.directions;
      i /= p_.directions;
      if (i < 2 * items) {
        const int64_t which = i / items, gate = i % items / z_.panels, panel = i % z_.panels;
        pack_gate_panel(d, which, gate, panel, packed(d, which) + packed_panel(gate, panel) * depth(which) * kNr);
      } else {
        pack_projection_panel(d, i - 2 * items);
      }
    });
    for (int64_t d = 0; d < p_.directions; ++d) begin_states(d);
    const int64_t phases = p_.projected ? 2 : 1;
    Team(p_.directions, z_.slices, p_.steps * phases).run(z_.serial, [&](int64_t d, int64_t slice, int64_t round) {
      TileScope tiles;
      if (p_.projected && round % 2 == 1) {
        project(d, slice, round / 2);
      } else {
        step(d, slice, round / phases);
      }
    });
    release_large_scratch();
    return true;
  }

private:
  struct Direction {
    E *w_input, *w_hidden, *w_projection;
    A *bias, *cell;
    E *h[2], *unprojected;
    int64_t* input_row;  // per round: its first row among the sums of its chunk; 0 begins a chunk
  };
  struct SliceMemory {
    E *x, *panel;
    A* sums;
  };

  int64_t depth_x() const { return padded_k<T>(p_.input); }
  int64_t depth_h() const { return padded_k<T>(p_.outputs); }
  int64_t ld_x() const { return depth_x() + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t ld_h() const { return z_.outputs + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t ld_unprojected() const { return z_.units + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t buffered_gates() const { return p_.mode == RnnMode::gru ? 4 : z_.gates; }
  int64_t chunk_rows() const { return round_up(streams() ? p_.batch : most(kInputRows, p_.batch), 32); }
  int64_t step_of(int64_t d, int64_t round) const { return d == 0 ? round : p_.steps - 1 - round; }

  void carve(Carver& c) {
    token_ = c.take<int64_t>(p_.steps);
    for (int64_t d = 0; d < p_.directions; ++d) {
      Direction& m = direction_[d];
      m.w_input = c.take<E>(packs() ? z_.gates * z_.units * depth_x() : 0);
      m.w_hidden = c.take<E>(packs() ? z_.gates * z_.units * depth_h() : 0);
      m.w_projection = c.take<E>(p_.projected && !along_rows() ? z_.outputs * z_.units : 0);
      m.bias = c.take<A>(buffered_gates() * z_.units);
      m.cell = c.take<A>(p_.batch * z_.units);
      for (E*& h : m.h) h = c.take<E>(z_.padded_rows() * ld_h());
      m.unprojected = p_.projected ? c.take<E>(z_.padded_rows() * ld_unprojected()) : nullptr;
      m.input_row = c.take<int64_t>(p_.steps);
      for (int64_t s = 0; s < z_.slices; ++s) {
        slice_[d * z_.slices + s].panel = c.take<E>(streams() && !along_rows() ? most(depth_x(), depth_h()) * kNr : 0);
        slice_[d * z_.slices + s].x = c.take<E>(chunk_rows() * ld_x());
        slice_[d * z_.slices + s].sums = c.take<A>(chunk_rows() * buffered_gates() * z_.slice_units(s));
      }
    }
  }

  void plan() {
    for (int64_t t = 0, token = 0; t < p_.steps; token += f_.batch_sizes[t++]) token_[t] = token;
    for (int64_t d = 0; d < p_.directions; ++d) {
      for (int64_t round = 0, row = 0; round < p_.steps; ++round) {
        const int64_t n = f_.batch_sizes[step_of(d, round)];
        if (row + n > chunk_rows()) row = 0;
        direction_[d].input_row[round] = row;
        row += n;
      }
    }
  }

  // In a call of one step each weight is met once: packed panel by panel just before, it stays in L1.
  bool streams() const { return p_.steps == 1; }
  // One sequence reads its weights for a row at a time, which takes as long as memory does in any layout.
  bool along_rows() const { return p_.batch == 1; }
  bool packs() const { return !streams() && !along_rows(); }

  // Of W (which = 0) or U.
  int64_t depth(int64_t which) const { return which == 0 ? depth_x() : depth_h(); }
  E* packed(int64_t d, int64_t which) const { return which == 0 ? direction_[d].w_input : direction_[d].w_hidden; }

  void pack_gate_panel(int64_t d, int64_t which, int64_t gate, int64_t panel, E* to) const {
    const int64_t k = which == 0 ? p_.input : p_.outputs, u0 = panel * kNr;
    const void* w = which == 0 ? f_.weights[d].input : f_.weights[d].hidden;
    pack_b_panel<T>(at<const T>(w, (gate * p_.hidden + u0) * k), 1, k, k, least(kNr, p_.hidden - u0), to, depth(which));
  }

  // The slice's columns of gates [first, end) of a W or a U, added to or stored in the sums of gate `first`.
  void gate_product(int64_t d, int64_t slice, int64_t which, int64_t first, int64_t end, int64_t rows, const E* a,
                    int64_t lda, A* sums, bool add, bool backwards = false) const {
    const int64_t panel = z_.slice_panel(slice), columns = z_.slice_units(slice), ld = buffered_gates() * columns;
    const int64_t k = which == 0 ? p_.input : p_.outputs, stride = depth(which) * kNr;
    if (packs())
      return rnn_product<T>(rows, (end - first) * columns, k, a, lda,
                            packed(d, which) + panel * z_.gates * stride + first * columns * depth(which), stride, sums,
                            ld, add, backwards);
    const T* weight = at<const T>(which == 0 ? f_.weights[d].input : f_.weights[d].hidden, panel * kNr * k);
    const int64_t valid = p_.hidden - panel * kNr;
    for (int64_t i = 0; i < end - first; ++i) {
      const int64_t gate = backwards ? end - 1 - i : first + i;
      A* to = sums + (gate - first) * columns;
      const T* w = weight + gate * p_.hidden * k;
      if (along_rows()) {
        rnn_row_product<T>(rows, columns, valid, k, a, lda, w, k, to, ld, add, backwards);
        continue;
      }
      if (rows <= kStreamedRows<T>) {
        rnn_streamed_product<T>(rows, columns, valid, k, a, lda, w, k, to, ld, add);
        continue;
      }
      E* buffer = slice_[d * z_.slices + slice].panel;
      for (int64_t j = 0; j < columns / kNr; ++j) {
        pack_gate_panel(d, which, gate, panel + j, buffer);
        rnn_product<T>(rows, kNr, k, a, lda, buffer, stride, to + j * kNr, ld, add);
      }
    }
  }

  // A slice's panels lie together, gate after gate.
  int64_t packed_panel(int64_t gate, int64_t panel) const {
    int64_t slice = 0;
    while (panel >= z_.slice_panel(slice + 1)) ++slice;
    const int64_t first = z_.slice_panel(slice), count = z_.slice_panel(slice + 1) - first;
    return first * z_.gates + gate * count + panel - first;
  }

  void add_biases(int64_t d) {
    const bool apart = p_.mode == RnnMode::gru;
    const auto fill = [&](int64_t row, int64_t gate, const void* one, const void* other) {
      A* to = direction_[d].bias + row * z_.units;
      for (int64_t u = 0; u < z_.units; u += kLanesA) {
        Vec<A> sum{};
        if (one) sum += load_valid(at<const T>(one, gate * p_.hidden + u), p_.hidden - u);
        if (other) sum += load_valid(at<const T>(other, gate * p_.hidden + u), p_.hidden - u);
        store(to + u, sum);
      }
    };
    const RnnWeights& w = f_.weights[d];
    for (int64_t gate = 0; gate < z_.gates; ++gate)
      fill(gate, gate, w.bias_input, apart && gate == 2 ? nullptr : w.bias_hidden);
    if (apart) fill(3, 2, nullptr, w.bias_hidden);
  }

  void pack_projection_panel(int64_t d, int64_t panel) {
    const int64_t n0 = panel * kNr;
    pack_b_panel<T>(at<const T>(f_.weights[d].projection, n0 * p_.hidden), 1, p_.hidden, p_.hidden,
                    least(kNr, p_.outputs - n0), direction_[d].w_projection + panel * z_.units * kNr, z_.units);
  }

  // States before the first step, in both buffers: a sequence that joins later finds its own in either.
  void begin_states(int64_t d) {
    Direction& m = direction_[d];
    add_biases(d);
    if (m.unprojected) std::memset(m.unprojected, 0, z_.padded_rows() * ld_unprojected() * sizeof(E));
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t state = d * p_.batch + f_.order[b];
      for (E* h : m.h) {
        if (f_.h0) {
          pack_row(at<const T>(f_.h0, state * p_.outputs), 1, p_.outputs, ld_h(), h + b * ld_h());
        } else {
          std::memset(h + b * ld_h(), 0, ld_h() * sizeof(E));
        }
      }
      if (f_.c0) {
        pack_row(at<const T>(f_.c0, state * p_.hidden), 1, p_.hidden, z_.units, m.cell + b * z_.units);
      } else {
        std::memset(m.cell + b * z_.units, 0, z_.units * sizeof(A));
      }
    }
  }

  A* sums_of(int64_t d, int64_t slice, int64_t round) {
    return slice_[d * z_.slices + slice].sums +
           direction_[d].input_row[round] * buffered_gates() * z_.slice_units(slice);
  }

  void step(int64_t d, int64_t slice, int64_t round) {
    const Direction& m = direction_[d];
    const int64_t columns = z_.slice_units(slice), ld = buffered_gates() * columns;
    const int64_t n = f_.batch_sizes[step_of(d, round)];
    if (m.input_row[round] == 0) input_product(d, slice, round);
    A* sums = sums_of(d, slice, round);
    if (round > 0 || f_.h0) {
      const E* h = m.h[round % 2];
      const bool backwards = round % 2 == 1;
      if (p_.mode == RnnMode::gru) {
        gate_product(d, slice, 1, 0, 2, n, h, ld_h(), sums, true, backwards);
        gate_product(d, slice, 1, 2, 3, n, h, ld_h(), sums + 3 * columns, false, backwards);
      } else {
        gate_product(d, slice, 1, 0, z_.gates, n, h, ld_h(), sums, true, backwards);
      }
    } else if (p_.mode == RnnMode::gru) {
      for (int64_t b = 0; b < n; ++b) std::memset(sums + b * ld + 3 * columns, 0, columns * sizeof(A));
    }
    switch (p_.mode) {
    case RnnMode::lstm:
      return lstm_gates(d, slice, round, n, sums, ld);
    case RnnMode::gru:
      return gru_gates(d, slice, round, n, sums, ld);
    case RnnMode::tanh:
      return plain_gates<true>(d, slice, round, n, sums, ld);
    case RnnMode::relu:
      return plain_gates<false>(d, slice, round, n, sums, ld);
    }
  }

  // x W for the steps from `round` to the end of its chunk.
  void input_product(int64_t d, int64_t slice, int64_t round) {
    const SliceMemory& memory = slice_[d * z_.slices + slice];
    E* x = memory.x;
    int64_t rows = 0;
    do {
      const int64_t t = step_of(d, round), n = f_.batch_sizes[t];
      for (int64_t b = 0; b < n; ++b) {
        pack_row(at<const T>(f_.input, f_.input_rows(t, b)), 1, p_.input, ld_x(), x + (rows + b) * ld_x());
      }
      rows += n;
    } while (++round < p_.steps && direction_[d].input_row[round] != 0);
    gate_product(d, slice, 0, 0, z_.gates, rows, x, ld_x(), memory.sums, false);
  }

  // Where the results of a row go, and what of them is wanted.
  struct RowTarget {
    E* h;       // of the next step, or unprojected
    T* output;  // null where projected
    T* h_n;     // null where the sequence goes on
    T* c_n;
    T* c_output;  // null where the cells of every token are not wanted
    T* gates;
    A* cells;
  };

  bool is_last(int64_t d, int64_t t, int64_t b) const {
    return d == 0 ? b >= z_.next_batch(f_.batch_sizes, t) : t == 0;
  }

  RowTarget target(int64_t d, int64_t round, int64_t b, int64_t unit) {
    const Direction& m = direction_[d];
    const int64_t t = step_of(d, round), token = d * p_.saved_rows + token_[t] + b;
    const int64_t state = d * p_.batch + f_.order[b];
    const bool last = is_last(d, t, b);
    RowTarget r{};
    if (p_.projected) {
      r.h = m.unprojected + b * ld_unprojected() + unit;
    } else {
      r.h = m.h[(round + 1) % 2] + b * ld_h() + unit;
      r.output = output_row(d, t, b) + unit;
      if (last) r.h_n = at<T>(f_.h_n, state * p_.outputs + unit);
    }
    if (last && f_.c_n) r.c_n = at<T>(f_.c_n, state * p_.hidden + unit);
    if (p_.all_cells) r.c_output = at<T>(f_.output, f_.output_rows(t, b) + z_.cell_column(d) + unit);
    if (f_.gates) r.gates = at<T>(f_.gates, token * saved_gates(p_.mode) * p_.hidden + unit);
    if (f_.cells) r.cells = at<A>(f_.cells, token * p_.hidden + unit);
    return r;
  }

  T* output_row(int64_t d, int64_t t, int64_t b) const {
    return at<T>(f_.output, f_.output_rows(t, b) + d * p_.outputs);
  }

  PTK_INLINE void store_h(const RowTarget& r, int64_t u, Vec<A> h, int64_t valid) {
    store_element<T>(r.h + u, h);
    if (r.output) store_valid(r.output + u, h, valid);
    if (r.h_n) store_valid(r.h_n + u, h, valid);
  }

  // Calls body(row of the sums, RowTarget, row index) for every running sequence.
  template <class Body>
  inline __attribute__((always_inline)) void each_row(int64_t d, int64_t slice, int64_t round, int64_t n, A* sums,
                                                      int64_t ld, const Body& body) {
    const int64_t unit = z_.slice_panel(slice) * kNr;
    for (int64_t b = 0; b < n; ++b) body(sums + b * ld, target(d, round, b, unit), b);
  }

  void lstm_gates(int64_t d, int64_t slice, int64_t round, int64_t n, A* sums, int64_t ld) {
    const int64_t unit = z_.slice_panel(slice) * kNr, columns = z_.slice_units(slice), hidden = p_.hidden;
    const A* bias = direction_[d].bias + unit;
    each_row(d, slice, round, n, sums, ld, [&](const A* g, const RowTarget& r, int64_t b) {
      A* cell = direction_[d].cell + b * z_.units + unit;
      for (int64_t u = 0; u < columns; u += kLanesA) {
        const int64_t valid = hidden - unit - u;
        const auto gate = [&](int64_t q) { return load(g + q * columns + u) + load(bias + q * z_.units + u); };
        const Vec<A> i = sigmoid<A>(gate(0)), f = sigmoid<A>(gate(1)), c_in = tanh<A>(gate(2)), o = sigmoid<A>(gate(3));
        const Vec<A> c = f * load(cell + u) + i * c_in;
        store(cell + u, c);
        store_h(r, u, o * tanh<A>(c), valid);
        if (r.c_n) store_valid(r.c_n + u, c, valid);
        if (r.c_output) store_valid(r.c_output + u, c, valid);
        if (r.gates) {
          store_valid(r.gates + u, i, valid);
          store_valid(r.gates + hidden + u, f, valid);
          store_valid(r.gates + 2 * hidden + u, c_in, valid);
          store_valid(r.gates + 3 * hidden + u, o, valid);
          store_valid(r.cells + u, c, valid);
        }
      }
    });
  }

  void gru_gates(int64_t d, int64_t slice, int64_t round, int64_t n, A* sums, int64_t ld) {
    const int64_t unit = z_.slice_panel(slice) * kNr, columns = z_.slice_units(slice), hidden = p_.hidden;
    const A* bias = direction_[d].bias + unit;
    each_row(d, slice, round, n, sums, ld, [&](const A* g, const RowTarget& target, int64_t b) {
      const E* before = direction_[d].h[round % 2] + b * ld_h() + unit;
      for (int64_t u = 0; u < columns; u += kLanesA) {
        const int64_t valid = hidden - unit - u;
        const auto gate = [&](int64_t q) { return load(g + q * columns + u) + load(bias + q * z_.units + u); };
        const Vec<A> r = sigmoid<A>(gate(0)), z = sigmoid<A>(gate(1)), recurrent = gate(3);
        const Vec<A> candidate = tanh<A>(gate(2) + r * recurrent);
        store_h(target, u, candidate + z * (load_as(before + u) - candidate), valid);
        if (target.gates) {
          store_valid(target.gates + u, r, valid);
          store_valid(target.gates + hidden + u, z, valid);
          store_valid(target.gates + 2 * hidden + u, candidate, valid);
          store_valid(target.gates + 3 * hidden + u, recurrent, valid);
        }
      }
    });
  }

  template <bool Tanh>
  void plain_gates(int64_t d, int64_t slice, int64_t round, int64_t n, A* sums, int64_t ld) {
    const int64_t unit = z_.slice_panel(slice) * kNr, columns = z_.slice_units(slice), hidden = p_.hidden;
    const A* bias = direction_[d].bias + unit;
    each_row(d, slice, round, n, sums, ld, [&](const A* g, const RowTarget& r, int64_t) {
      for (int64_t u = 0; u < columns; u += kLanesA) {
        const Vec<A> x = load(g + u) + load(bias + u);
        store_h(r, u, Tanh ? tanh<A>(x) : max(Vec<A>{}, x), hidden - unit - u);
      }
    });
  }

  // h = unprojected W_r^T
  void project(int64_t d, int64_t slice, int64_t round) {
    const Direction& m = direction_[d];
    const int64_t first = z_.slice_output_panel(slice), end = z_.slice_output_panel(slice + 1);
    const int64_t t = step_of(d, round), n = f_.batch_sizes[t];
    A* sums = slice_[d * z_.slices + slice].sums + projection_row(d, round) * buffered_gates() * z_.slice_units(slice);
    for (int64_t panel = first; panel < end; ++panel) {
      const int64_t n0 = panel * kNr, valid = p_.outputs - n0;
      if (along_rows()) {
        rnn_row_product<T>(n, kNr, valid, p_.hidden, m.unprojected, ld_unprojected(),
                           at<const T>(f_.weights[d].projection, n0 * p_.hidden), p_.hidden, sums, kNr, false);
      } else {
        rnn_product<T>(n, kNr, z_.units, m.unprojected, ld_unprojected(), m.w_projection + n0 * z_.units,
                       z_.units * kNr, sums, kNr, false);
      }
      for (int64_t b = 0; b < n; ++b) {
        T* h_n = is_last(d, t, b) ? at<T>(f_.h_n, (d * p_.batch + f_.order[b]) * p_.outputs + n0) : nullptr;
        for (int64_t j = 0; j < kNr; j += kLanesA) {
          const Vec<A> h = load(sums + b * kNr + j);
          store_element<T>(m.h[(round + 1) % 2] + b * ld_h() + n0 + j, h);
          store_valid(output_row(d, t, b) + n0 + j, h, valid - j);
          if (h_n) store_valid(h_n + j, h, valid - j);
        }
      }
    }
  }

  // The projection's sums go where those of the step's gates were: they are done with.
  int64_t projection_row(int64_t d, int64_t round) const { return direction_[d].input_row[round]; }

  const RnnForwardParams& f_;
  const RnnProblem& p_;
  const RnnSizes<T> z_;
  int64_t* token_ = nullptr;
  Direction direction_[2];
  SliceMemory slice_[Team::kMaxSlices];
};

}  // namespace ptk::PTK_ISA
