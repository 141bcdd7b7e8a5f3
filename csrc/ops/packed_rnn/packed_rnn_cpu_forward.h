// Forward of one recurrent layer on the CPU.
//
//   round     a step of one direction:  sums = x W + h U  for the sequences still running, then the gates, in place.
//             Where h U of all units is needed before the gates (normalisation, a projection, a reset before the
//             product), or all cells before h, a step is several rounds.
//
//   slices    a thread owns some units of a direction: their columns of W and U (packed once per call, gates side by
//             side), their sums and cells. After every round the threads of a direction meet, to exchange h.
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

#include "packed_rnn_cpu_norm.h"
#include "packed_rnn_cpu_zoneout.h"

namespace ptk::PTK_ISA {

template <class T>
class RnnForward {
  using E = Element<T>;
  using A = Acc<T>;
  static constexpr int64_t kNr = GemmTraits<T>::kNr;
  static constexpr int64_t kLanesA = kLanes<A>;
  static constexpr int64_t kInputRows = 128;
  static constexpr int64_t kMemoryBytes = 32 << 20;  // of U: no cache has it from step to step

public:
  explicit RnnForward(const RnnForwardParams& params)
      : f_(params), p_(params.problem), z_(params.problem), zoneout_(params.problem),
        gate_parts_{{p_, z_.gates}, {p_, z_.gates}}, cell_parts_{{p_, 1}, {p_, 1}} {}

  // False when memory ran out.
  bool run() {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    carve(carver);
    plan();
    const int64_t items = packs(1) ? z_.gates * z_.panels : 0, first = packs(0) ? 0 : items;
    const int64_t projection = p_.projected && !along_rows() ? z_.outputs / kNr : 0;
    z_.each_item(p_.directions * (2 * items - first + projection), [&](int64_t i) {
      const int64_t d = i % p_.directions;
      i = first + i / p_.directions;
      if (i < 2 * items) {
        const int64_t which = i / items, gate = i % items / z_.panels, panel = i % z_.panels;
        pack_gate_panel(d, which, gate, panel, packed(d, which) + packed_panel(gate, panel) * depth(which) * kNr);
      } else {
        pack_projection_panel(d, i - 2 * items);
      }
    });
    for (int64_t d = 0; d < p_.directions; ++d) begin_states(d);
    const int64_t phases = p_.mode == RnnMode::layer_norm_lstm ? 3
                           : p_.projected || p_.mode == RnnMode::layer_norm_gru || p_.mode == RnnMode::reset_before_gru
                               ? 2
                               : 1;
    Team(p_.directions, z_.slices, p_.steps * phases).run(z_.serial, [&](int64_t d, int64_t slice, int64_t round) {
      TileScope tiles;
      step(d, slice, round / phases, round % phases);
    });
    release_large_scratch();
    return true;
  }

private:
  struct Direction {
    E *w_input, *w_hidden, *w_projection;
    A *bias, *cell, *own;
    E *h[2], *unprojected, *reset_h;
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
      m.w_input = c.take<E>(packs(0) ? z_.gates * z_.units * depth_x() : 0);
      m.w_hidden = c.take<E>(packs(1) ? z_.gates * z_.units * depth_h() : 0);
      m.w_projection = c.take<E>(p_.projected && !along_rows() ? z_.outputs * z_.units : 0);
      m.bias = c.take<A>(buffered_gates() * z_.units);
      m.cell = c.take<A>(p_.batch * z_.units);
      m.own = c.take<A>(own_vectors(p_.mode) * z_.units);
      if (is_normalised(p_.mode)) gate_parts_[d].carve(c, p_.batch);
      if (p_.mode == RnnMode::layer_norm_lstm) cell_parts_[d].carve(c, p_.batch);
      for (E*& h : m.h) h = c.take<E>(z_.padded_rows() * ld_h());
      m.unprojected = p_.projected ? c.take<E>(z_.padded_rows() * ld_unprojected()) : nullptr;
      m.reset_h = p_.mode == RnnMode::reset_before_gru ? c.take<E>(z_.padded_rows() * ld_h()) : nullptr;
      m.input_row = c.take<int64_t>(p_.steps);
      for (int64_t s = 0; s < z_.slices; ++s) {
        slice_[d * z_.slices + s].panel = c.take<E>(along_rows() ? 0 : most(depth_x(), depth_h()) * kNr);
        slice_[d * z_.slices + s].x = c.take<E>(has_input_weight() ? chunk_rows() * ld_x() : 0);
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

  // In a call of one step each weight is met once, as are those of the input where one chunk has all tokens: packed
  // panel by panel just before, it stays in L1. Weights that come from memory for every step, and for few rows, are
  // transposed on their way in the time that memory takes.
  bool streams() const { return p_.steps == 1; }
  // One sequence reads its weights for a row at a time, which takes as long as memory does in any layout.
  bool along_rows() const { return p_.batch == 1; }
  bool packs(int64_t which) const {
    if (streams() || along_rows()) return false;
    if (which == 0) return has_input_weight() && p_.tokens > chunk_rows();
    return p_.batch > kStreamedRows<T> ||
           z_.gates * z_.units * depth_h() < kMemoryBytes / static_cast<int64_t>(sizeof(E));
  }
  // Elsewhere the input is products already.
  bool has_input_weight() const { return !is_normalised(p_.mode); }

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
    if (packs(which))
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
    const RnnWeights& w = f_.weights[d];
    each_own_vector(p_, w.peephole, w.norm_hidden, w.norm_cell, [&](int64_t i, const void* from, int64_t first) {
      pack_row(at<const T>(from, first), 1, p_.hidden, z_.units, m.own + i * z_.units);
    });
    if (is_normalised(p_.mode)) gate_parts_[d].begin();
    if (p_.mode == RnnMode::layer_norm_lstm) cell_parts_[d].begin();
    if (m.reset_h) std::memset(m.reset_h, 0, z_.padded_rows() * ld_h() * sizeof(E));
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

  void step(int64_t d, int64_t slice, int64_t round, int64_t phase) {
    const int64_t n = f_.batch_sizes[step_of(d, round)];
    if (phase == 0 && has_input_weight() && direction_[d].input_row[round] == 0) input_product(d, slice, round);
    const Place here{d, slice, round, n, z_.slice_panel(slice) * kNr, z_.slice_units(slice), sums_of(d, slice, round)};
    switch (p_.mode) {
    case RnnMode::lstm:
      if (phase == 1) return project(d, slice, round);
      add_recurrence(here, 0, z_.gates);
      return lstm_gates<false>(here);
    case RnnMode::peephole_lstm:
      add_recurrence(here, 0, z_.gates);
      return lstm_gates<true>(here);
    case RnnMode::gru:
      add_recurrence(here, 0, 2);
      recurrence(here, 2, 3, 3);
      return gru_gates(here);
    case RnnMode::tanh:
      add_recurrence(here, 0, 1);
      return plain_gates<true>(here);
    case RnnMode::relu:
      add_recurrence(here, 0, 1);
      return plain_gates<false>(here);
    case RnnMode::reset_before_gru:
      if (phase == 0) {
        add_recurrence(here, 0, 2);
        return reset_gates(here);
      }
      add_recurrence(here, 2, 3);
      return reset_candidate(here);
    case RnnMode::layer_norm_lstm:
      return phase == 0 ? normalised_recurrence(here) : phase == 1 ? normalised_cells(here) : normalised_outputs(here);
    case RnnMode::layer_norm_gru:
      return phase == 0 ? normalised_recurrence(here) : normalised_gru(here);
    }
  }

  // A slice's part of a step.
  struct Place {
    int64_t d, slice, round, n, unit, columns;
    A* sums;
  };

  // h U of gates [first, end) is added to their sums. Before the first step of a call without states h is zeros.
  void add_recurrence(const Place& here, int64_t first, int64_t end) {
    if (here.round > 0 || f_.h0) recurrent_product(here, first, end, first, true);
  }

  // The same into the columns from gate `to` on, nothing there before.
  void recurrence(const Place& here, int64_t first, int64_t end, int64_t to) {
    if (here.round > 0 || f_.h0) return recurrent_product(here, first, end, to, false);
    for (int64_t b = 0; b < here.n; ++b)
      std::memset(here.sums + (b * buffered_gates() + to) * here.columns, 0, (end - first) * here.columns * sizeof(A));
  }

  void recurrent_product(const Place& here, int64_t first, int64_t end, int64_t to, bool add) {
    const Direction& m = direction_[here.d];
    const E* h = m.reset_h && first == 2 ? m.reset_h : m.h[here.round % 2];
    gate_product(here.d, here.slice, 1, first, end, here.n, h, ld_h(), here.sums + to * here.columns, add,
                 here.round % 2 == 1);
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
    if (f_.cells) r.cells = at<A>(f_.cells, token * saved_sums(p_.mode, p_.hidden) + unit);
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
  inline __attribute__((always_inline)) void each_row(const Place& here, const Body& body) {
    const int64_t ld = buffered_gates() * here.columns;
    for (int64_t b = 0; b < here.n; ++b) body(here.sums + b * ld, target(here.d, here.round, b, here.unit), b);
  }

  inline __attribute__((always_inline)) Vec<A> biased(const Place& here, const A* g, int64_t gate, int64_t u) const {
    return load(g + gate * here.columns + u) + load(direction_[here.d].bias + gate * z_.units + here.unit + u);
  }

  const A* own(const Place& here, int64_t vector, int64_t u) const {
    return direction_[here.d].own + vector * z_.units + here.unit + u;
  }

  inline __attribute__((always_inline)) Vec<A> h_before(const Place& here, int64_t b, int64_t u) const {
    return load_as(direction_[here.d].h[here.round % 2] + b * ld_h() + here.unit + u);
  }

  // Units of h, and of cells where there are, that keep what they had.
  inline __attribute__((always_inline)) void zone_out(const Place& here, int64_t b, int64_t u, Vec<A>& h) const {
    if (!zoneout_.active) return;
    h = zoneout_.mix(h, h_before(here, b, u), kept(here, b, u).h);
  }
  inline __attribute__((always_inline)) void zone_out_cells(const Place& here, int64_t b, int64_t u, Vec<A>& c,
                                                            Vec<A> before) const {
    if (!zoneout_.active) return;
    c = zoneout_.mix(c, before, kept(here, b, u).c);
  }
  inline __attribute__((always_inline)) typename Zoneout<T>::Kept kept(const Place& here, int64_t b, int64_t u) const {
    return zoneout_.kept(here.d, step_of(here.d, here.round), f_.order[b], here.unit + u);
  }

  template <bool Peephole>
  void lstm_gates(const Place& here) {
    const int64_t hidden = p_.hidden;
    each_row(here, [&](const A* g, const RowTarget& r, int64_t b) {
      A* cell = direction_[here.d].cell + b * z_.units + here.unit;
      for (int64_t u = 0; u < here.columns; u += kLanesA) {
        const int64_t valid = hidden - here.unit - u;
        const Vec<A> before = load(cell + u);
        const auto gate = [&](int64_t q, Vec<A> c, int64_t peephole) {
          const Vec<A> x = biased(here, g, q, u);
          return Peephole && peephole >= 0 ? x + load(own(here, peephole, u)) * c : x;
        };
        const Vec<A> i = sigmoid<A>(gate(0, before, 0)), f = sigmoid<A>(gate(1, before, 1));
        const Vec<A> c_in = tanh<A>(gate(2, before, -1));
        const Vec<A> fresh = f * before + i * c_in, o = sigmoid<A>(gate(3, fresh, 2));
        Vec<A> c = fresh, h = o * tanh<A>(fresh);
        zone_out(here, b, u, h);
        zone_out_cells(here, b, u, c, before);
        store(cell + u, c);
        store_h(r, u, h, valid);
        store_cell(r, u, c, valid);
        if (r.gates) store_gates<4>(r, u, {i, f, c_in, o}, valid);
      }
    });
  }

  PTK_INLINE void store_cell(const RowTarget& r, int64_t u, Vec<A> c, int64_t valid) {
    if (r.c_n) store_valid(r.c_n + u, c, valid);
    if (r.c_output) store_valid(r.c_output + u, c, valid);
    if (r.cells) store_valid(r.cells + u, c, valid);
  }

  template <int Count>
  inline __attribute__((always_inline)) void store_gates(const RowTarget& r, int64_t u, const Vec<A> (&gates)[Count],
                                                         int64_t valid, int64_t first = 0) const {
#pragma GCC unroll 4
    for (int q = 0; q < Count; ++q) store_valid(r.gates + (first + q) * p_.hidden + u, gates[q], valid);
  }

  void gru_gates(const Place& here) {
    each_row(here, [&](const A* g, const RowTarget& target, int64_t b) {
      for (int64_t u = 0; u < here.columns; u += kLanesA) {
        const Vec<A> r = sigmoid<A>(biased(here, g, 0, u)), z = sigmoid<A>(biased(here, g, 1, u));
        const Vec<A> recurrent = biased(here, g, 3, u), n = tanh<A>(biased(here, g, 2, u) + r * recurrent);
        const int64_t valid = p_.hidden - here.unit - u;
        store_gru(here, target, b, u, z, n);
        if (target.gates) store_gates<4>(target, u, {r, z, n, recurrent}, valid);
      }
    });
  }

  inline __attribute__((always_inline)) void store_gru(const Place& here, const RowTarget& target, int64_t b, int64_t u,
                                                       Vec<A> z, Vec<A> n) {
    Vec<A> h = n + z * (h_before(here, b, u) - n);
    zone_out(here, b, u, h);
    store_h(target, u, h, p_.hidden - here.unit - u);
  }

  // r, and z in the place of its sum; what the product of n multiplies is r h.
  void reset_gates(const Place& here) {
    each_row(here, [&](A* g, const RowTarget& target, int64_t b) {
      for (int64_t u = 0; u < here.columns; u += kLanesA) {
        const Vec<A> r = sigmoid<A>(biased(here, g, 0, u)), z = sigmoid<A>(biased(here, g, 1, u));
        store(g + here.columns + u, z);
        store_element<T>(direction_[here.d].reset_h + b * ld_h() + here.unit + u, r * h_before(here, b, u));
        if (target.gates) store_gates<2>(target, u, {r, z}, p_.hidden - here.unit - u);
      }
    });
  }

  void reset_candidate(const Place& here) {
    each_row(here, [&](const A* g, const RowTarget& target, int64_t b) {
      for (int64_t u = 0; u < here.columns; u += kLanesA) {
        const Vec<A> z = load(g + here.columns + u), n = tanh<A>(biased(here, g, 2, u));
        store_gru(here, target, b, u, z, n);
        if (target.gates) store_gates<1>(target, u, {n}, p_.hidden - here.unit - u, 2);
      }
    });
  }

  template <bool Tanh>
  void plain_gates(const Place& here) {
    each_row(here, [&](const A* g, const RowTarget& r, int64_t) {
      for (int64_t u = 0; u < here.columns; u += kLanesA) {
        const Vec<A> x = biased(here, g, 0, u);
        store_h(r, u, Tanh ? tanh<A>(x) : max(Vec<A>{}, x), p_.hidden - here.unit - u);
      }
    });
  }

  // h U of every gate, and the moments of its rows.
  void normalised_recurrence(const Place& here) {
    recurrence(here, 0, z_.gates, 0);
    each_row(here, [&](const A* g, const RowTarget&, int64_t b) {
      for (int64_t q = 0; q < z_.gates; ++q)
        for (int64_t u = 0; u < here.columns; u += kLanesA)
          gate_parts_[here.d].put_moments(b, q, here.unit + u, load(g + q * here.columns + u));
    });
  }

  using Normal = typename RowParts<T>::Normal;

  inline __attribute__((always_inline)) Vec<A> normalised(const Place& here, const A* g, Normal s, int64_t q,
                                                          int64_t u) const {
    return (load(g + q * here.columns + u) - s.mean) * s.scale;
  }
  inline __attribute__((always_inline)) Vec<A> scaled(const Place& here, Vec<A> x, int64_t vector, int64_t bias,
                                                      int64_t u) const {
    return x * load(own(here, vector, u)) + load(own(here, bias, u));
  }
  // The product of the input that came in its place.
  inline __attribute__((always_inline)) Vec<A> given(const Place& here, int64_t b, int64_t q, int64_t u) const {
    const int64_t row = f_.input_rows(step_of(here.d, here.round), b), unit = here.unit + u;
    return load_valid(at<const T>(f_.input, row + (here.d * z_.gates + q) * p_.hidden + unit), p_.hidden - unit);
  }

  // Gates and cells, and the moments of these; the new cells and o stay in the sums of i and o.
  void normalised_cells(const Place& here) {
    each_row(here, [&](A* g, const RowTarget& r, int64_t b) {
      const Normal s = gate_parts_[here.d].normal(b, 0, 4);
      A* cell = direction_[here.d].cell + b * z_.units + here.unit;
      for (int64_t u = 0; u < here.columns; u += kLanesA) {
        const int64_t valid = p_.hidden - here.unit - u;
        Vec<A> normal[4], x[4];
        for (int64_t q = 0; q < 4; ++q) {
          normal[q] = normalised(here, g, s, q, u);
          x[q] = given(here, b, q, u) + scaled(here, normal[q], q, 4 + q, u);
        }
        const Vec<A> i = sigmoid<A>(x[0]), f = sigmoid<A>(x[1]), c_in = tanh<A>(x[2]), o = sigmoid<A>(x[3]);
        const Vec<A> before = load(cell + u);
        Vec<A> c = f * before + i * c_in;
        cell_parts_[here.d].put_moments(b, 0, here.unit + u, c);
        store(g + u, c);
        store(g + 3 * here.columns + u, o);
        zone_out_cells(here, b, u, c, before);
        store(cell + u, c);
        store_cell(r, u, c, valid);
        if (r.gates) {
          store_gates<4>(r, u, {i, f, c_in, o}, valid);
          store_gates<4>(r, u, normal, valid, 4);
        }
      }
      if (r.cells && here.unit == 0) r.cells[p_.hidden] = s.scale;
    });
  }

  void normalised_outputs(const Place& here) {
    each_row(here, [&](const A* g, const RowTarget& r, int64_t b) {
      const Normal s = cell_parts_[here.d].normal(b, 0, 1);
      for (int64_t u = 0; u < here.columns; u += kLanesA) {
        const Vec<A> c = scaled(here, normalised(here, g, s, 0, u), 8, 9, u);
        Vec<A> h = load(g + 3 * here.columns + u) * tanh<A>(c);
        zone_out(here, b, u, h);
        store_h(r, u, h, p_.hidden - here.unit - u);
      }
      if (r.cells && here.unit == 0) {
        r.cells[p_.hidden + 1] = s.mean;
        r.cells[p_.hidden + 2] = s.scale;
      }
    });
  }

  void normalised_gru(const Place& here) {
    each_row(here, [&](const A* g, const RowTarget& target, int64_t b) {
      const Normal shared = gate_parts_[here.d].normal(b, 0, 2), candidate = gate_parts_[here.d].normal(b, 2, 3);
      for (int64_t u = 0; u < here.columns; u += kLanesA) {
        Vec<A> normal[3], term[3];
        for (int64_t q = 0; q < 3; ++q) {
          normal[q] = normalised(here, g, q < 2 ? shared : candidate, q, u);
          term[q] = scaled(here, normal[q], q, 3 + q, u);
        }
        const Vec<A> r = sigmoid<A>(given(here, b, 0, u) + term[0]), z = sigmoid<A>(given(here, b, 1, u) + term[1]);
        const Vec<A> n = tanh<A>(given(here, b, 2, u) + r * term[2]);
        store_gru(here, target, b, u, z, n);
        if (target.gates) {
          store_gates<3>(target, u, {r, z, n}, p_.hidden - here.unit - u);
          store_gates<3>(target, u, normal, p_.hidden - here.unit - u, 3);
        }
      }
      if (target.cells && here.unit == 0) {
        target.cells[0] = shared.scale;
        target.cells[1] = candidate.scale;
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
  const Zoneout<T> zoneout_;
  RowParts<T> gate_parts_[2], cell_parts_[2];
  int64_t* token_ = nullptr;
  Direction direction_[2];
  SliceMemory slice_[Team::kMaxSlices];
};

}  // namespace ptk::PTK_ISA
