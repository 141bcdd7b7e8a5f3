// Backward of one recurrent layer on the CPU: the part that runs step by step.
//
//   round     a step of one direction, last step first:  dh = grad_output + dG U^T  (dG of the step before), then the
//             gradients dG of the gates before activation, from what the forward saved. Where sums over all units are
//             on the way (normalisation, a projection, the product behind a reset), a step is several rounds.
//
// The gradients of weights and input are products over all tokens at once, formed from the dG of every step when all
// are there (packed_rnn_glue.h). Slices and the meeting once per step are those of the forward.
#pragma once

#include "packed_rnn_cpu_norm.h"
#include "packed_rnn_cpu_zoneout.h"

namespace ptk::PTK_ISA {

template <class T>
class RnnBackward {
  using E = Element<T>;
  using A = Acc<T>;
  static constexpr int64_t kNr = GemmTraits<T>::kNr;
  static constexpr int64_t kLanesA = kLanes<A>;

public:
  explicit RnnBackward(const RnnBackwardParams& params)
      : f_(params), p_(params.problem), z_(params.problem), zoneout_(params.problem),
        gate_parts_{{p_, z_.gates}, {p_, z_.gates}}, cell_parts_{{p_, 1}, {p_, 1}} {}

  // False when memory ran out.
  bool run() {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    carve(carver);
    for (int64_t t = 0, token = 0; t < p_.steps; token += f_.batch_sizes[t++]) token_[t] = token;
    const int64_t columns = z_.outputs / kNr, projection = p_.projected ? z_.panels : 0;
    z_.each_item(p_.directions * (columns + projection), [&](int64_t i) {
      const int64_t d = i % p_.directions;
      i /= p_.directions;
      if (i < columns) {
        pack_hidden_panel(d, i);
      } else {
        pack_projection_panel(d, i - columns);
      }
    });
    for (int64_t d = 0; d < p_.directions; ++d) begin_states(d);
    const int64_t phases = p_.mode == RnnMode::layer_norm_lstm ? 3
                           : p_.projected || p_.mode == RnnMode::layer_norm_gru || p_.mode == RnnMode::reset_before_gru
                               ? 2
                               : 1;
    Team(p_.directions, z_.slices, p_.steps * phases + 1).run(z_.serial, [&](int64_t d, int64_t slice, int64_t round) {
      TileScope tiles;
      if (round % phases == 0) back_through_hidden(d, slice, round / phases);
      if (round < p_.steps * phases) step(d, slice, round / phases, round % phases);
    });
    for (int64_t d = 0; d < p_.directions; ++d) end_states(d);
    release_large_scratch();
    return true;
  }

private:
  struct Direction {
    E *w_hidden, *w_projection;
    A *grad_h, *grad_c;  // flowing back from later steps
    A* c0;
    E* grad_gates[2];  // of the step at hand and of the one before: rows of A
    E* grad_projected;
    A* grad_unprojected;  // or, with a reset before the product, of r h
    A* grad_terms;        // of the recurrent terms, normalised
    A* grad_bias;
    A *own, *grad_own;
  };

  int64_t depth() const { return z_.gates * z_.units; }
  int64_t ld_gates() const { return depth() + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t ld_projected() const { return z_.outputs + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t stored_gates() const { return gate_gradients(p_.mode); }
  int64_t ld_saved() const { return saved_sums(p_.mode, p_.hidden); }
  bool keeps_grad_h() const { return !(has_cells(p_.mode) || is_plain(p_.mode)) || zoneout_.active; }
  int64_t step_of(int64_t d, int64_t round) const { return d == 0 ? p_.steps - 1 - round : round; }

  void carve(Carver& c) {
    token_ = c.take<int64_t>(p_.steps);
    for (int64_t d = 0; d < p_.directions; ++d) {
      Direction& m = direction_[d];
      m.w_hidden = c.take<E>(depth() * z_.outputs);
      m.w_projection = p_.projected ? c.take<E>(z_.outputs * z_.units) : nullptr;
      m.grad_h = c.take<A>(p_.batch * z_.outputs);
      m.grad_c = c.take<A>(p_.batch * z_.units);
      m.c0 = has_cells(p_.mode) ? c.take<A>(p_.batch * z_.units) : nullptr;
      for (E*& g : m.grad_gates) g = c.take<E>(z_.padded_rows() * ld_gates());
      m.grad_projected = p_.projected ? c.take<E>(z_.padded_rows() * ld_projected()) : nullptr;
      m.grad_unprojected =
          p_.projected || p_.mode == RnnMode::reset_before_gru ? c.take<A>(p_.batch * z_.units) : nullptr;
      m.grad_terms = is_normalised(p_.mode) ? c.take<A>(p_.batch * depth()) : nullptr;
      m.grad_bias = c.take<A>(stored_gates() * z_.units);
      m.own = c.take<A>(own_vectors(p_.mode) * z_.units);
      m.grad_own = c.take<A>(own_vectors(p_.mode) * z_.units);
      if (is_normalised(p_.mode)) gate_parts_[d].carve(c, p_.batch);
      if (p_.mode == RnnMode::layer_norm_lstm) cell_parts_[d].carve(c, p_.batch);
    }
  }

  // U as the operand of dG U^T: depth over all gates of all units.
  void pack_hidden_panel(int64_t d, int64_t panel) {
    const int64_t n0 = panel * kNr;
    for (int64_t q = 0; q < z_.gates; ++q)
      pack_b_panel<T>(at<const T>(f_.weights[d].hidden, q * p_.hidden * p_.outputs + n0), p_.outputs, 1, p_.hidden,
                      least(kNr, p_.outputs - n0), direction_[d].w_hidden + panel * depth() * kNr + q * z_.units * kNr,
                      z_.units);
  }

  void pack_projection_panel(int64_t d, int64_t panel) {
    const int64_t u0 = panel * kNr;
    pack_b_panel<T>(at<const T>(f_.weights[d].projection, u0), p_.hidden, 1, p_.outputs, least(kNr, p_.hidden - u0),
                    direction_[d].w_projection + u0 * z_.outputs, z_.outputs);
  }

  void begin_states(int64_t d) {
    Direction& m = direction_[d];
    std::memset(m.grad_bias, 0, stored_gates() * z_.units * sizeof(A));
    std::memset(m.grad_own, 0, own_vectors(p_.mode) * z_.units * sizeof(A));
    const RnnWeights& w = f_.weights[d];
    each_own_vector(p_, w.peephole, w.norm_hidden, w.norm_cell, [&](int64_t i, const void* from, int64_t first) {
      pack_row(at<const T>(from, first), 1, p_.hidden, z_.units, m.own + i * z_.units);
    });
    if (is_normalised(p_.mode)) gate_parts_[d].begin();
    if (p_.mode == RnnMode::layer_norm_lstm) cell_parts_[d].begin();
    const auto fill = [&](const void* source, int64_t state, int64_t n, int64_t padded, A* row) {
      if (source) {
        pack_row(at<const T>(source, state * n), 1, n, padded, row);
      } else {
        std::memset(row, 0, padded * sizeof(A));
      }
    };
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t state = d * p_.batch + f_.order[b];
      fill(f_.grad_h_n, state, p_.outputs, z_.outputs, m.grad_h + b * z_.outputs);
      fill(f_.grad_c_n, state, p_.hidden, z_.units, m.grad_c + b * z_.units);
      if (m.c0) fill(f_.c0, state, p_.hidden, z_.units, m.c0 + b * z_.units);
    }
    for (E* g : m.grad_gates) std::memset(g, 0, z_.padded_rows() * ld_gates() * sizeof(E));
  }

  void end_states(int64_t d) {
    const auto write = [](const A* row, int64_t n, T* out) {
      for (int64_t j = 0; j < n; j += kLanesA) store_as_partial(out + j, load(row + j), n - j);
    };
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t state = d * p_.batch + f_.order[b];
      const Direction& m = direction_[d];
      if (f_.grad_h0) write(m.grad_h + b * z_.outputs, p_.outputs, at<T>(f_.grad_h0, state * p_.outputs));
      if (f_.grad_c0) write(m.grad_c + b * z_.units, p_.hidden, at<T>(f_.grad_c0, state * p_.hidden));
    }
    for (int64_t q = 0; q < stored_gates(); ++q) {
      // n of a gru: its third sum belongs to the input's bias, the fourth to the recurrent one.
      const bool gru = p_.mode == RnnMode::gru;
      const A* row = direction_[d].grad_bias + q * z_.units;
      if (f_.grad_bias_input[d] && q < z_.gates) write(row, p_.hidden, at<T>(f_.grad_bias_input[d], q * p_.hidden));
      if (f_.grad_bias_hidden[d] && !(gru && q == 2))
        write(row, p_.hidden, at<T>(f_.grad_bias_hidden[d], (gru && q == 3 ? 2 : q) * p_.hidden));
    }
    each_own_vector(p_, f_.grad_peephole[d], f_.grad_norm_hidden[d], f_.grad_norm_cell[d],
                    [&](int64_t i, void* to, int64_t first) {
                      if (to) write(direction_[d].grad_own + i * z_.units, p_.hidden, at<T>(to, first));
                    });
  }

  // grad_h of the slice's outputs from the gates of the round before, for the sequences that ran in it; then,
  // projected, the rows of the product that leads from h to the units.
  void back_through_hidden(int64_t d, int64_t slice, int64_t round) {
    const Direction& m = direction_[d];
    const int64_t first = p_.projected ? z_.slice_output_panel(slice) : z_.slice_panel(slice);
    const int64_t end = p_.projected ? z_.slice_output_panel(slice + 1) : z_.slice_panel(slice + 1);
    // n of a gru that resets before the product went through it already.
    const int64_t of_h = p_.mode == RnnMode::reset_before_gru ? 2 * z_.units : depth();
    if (round > 0)
      rnn_product<T>(f_.batch_sizes[step_of(d, round - 1)], (end - first) * kNr, of_h, m.grad_gates[(round - 1) % 2],
                     ld_gates(), m.w_hidden + first * depth() * kNr, depth() * kNr, m.grad_h + first * kNr, z_.outputs,
                     keeps_grad_h(), round % 2 == 1);
    if (!p_.projected || round == p_.steps) return;
    const int64_t t = step_of(d, round);
    for (int64_t b = 0; b < f_.batch_sizes[t]; ++b) {
      T* row = at<T>(f_.grad_projected, (d * p_.tokens + token_[t] + b) * p_.outputs);
      for (int64_t j = first * kNr; j < end * kNr; j += kLanesA) {
        const Vec<A> grad = load(m.grad_h + b * z_.outputs + j) + output_gradient(d, t, b, j, p_.outputs - j);
        store_element<T>(m.grad_projected + b * ld_projected() + j, grad);
        store_valid(row + j, grad, p_.outputs - j);
      }
    }
  }

  Vec<A> output_gradient(int64_t d, int64_t t, int64_t b, int64_t column, int64_t valid) const {
    if (!f_.grad_output) return Vec<A>{};
    return load_valid(at<const T>(f_.grad_output, f_.output_rows(t, b) + d * p_.outputs + column), valid);
  }

  // Gates of the slice's units at the round's step.
  void step(int64_t d, int64_t slice, int64_t round, int64_t phase) {
    const Direction& m = direction_[d];
    const int64_t first = z_.slice_panel(slice), units = z_.slice_units(slice);
    const int64_t n = f_.batch_sizes[step_of(d, round)];
    if (p_.projected) {
      if (phase == 0) return;
      rnn_product<T>(n, units, z_.outputs, m.grad_projected, ld_projected(), m.w_projection + first * kNr * z_.outputs,
                     z_.outputs * kNr, m.grad_unprojected + first * kNr, z_.units, false);
    } else if (p_.mode == RnnMode::reset_before_gru && phase == 1) {
      rnn_product<T>(n, units, z_.units, m.grad_gates[round % 2] + 2 * z_.units, ld_gates(),
                     m.w_hidden + (first * depth() + 2 * z_.units) * kNr, depth() * kNr,
                     m.grad_unprojected + first * kNr, z_.units, false);
    }
    for (int64_t unit = first * kNr; unit < first * kNr + units; unit += kLanesA) {
      const auto each = [&]<int Gates, int Own>(int64_t gate, int64_t own, const auto& body) {
        each_row<Gates, Own>(d, round, unit, gate, own, body);
      };
      switch (p_.mode) {
      case RnnMode::lstm:
        each.template operator()<4, 0>(0, 0, [&](Row& r) { lstm_row<false>(r); });
        break;
      case RnnMode::peephole_lstm:
        each.template operator()<4, 3>(0, 0, [&](Row& r) { lstm_row<true>(r); });
        break;
      case RnnMode::gru:
        each.template operator()<4, 0>(0, 0, [&](Row& r) { gru_row(r); });
        break;
      case RnnMode::tanh:
      case RnnMode::relu:
        each.template operator()<1, 0>(0, 0, [&](Row& r) { plain_row(r); });
        break;
      case RnnMode::reset_before_gru:
        if (phase == 0) {
          each.template operator()<2, 0>(1, 0, [&](Row& r) { candidate_row(r); });
        } else {
          each.template operator()<1, 0>(0, 0, [&](Row& r) { reset_row(r); });
        }
        break;
      case RnnMode::layer_norm_lstm:
        if (phase == 0) {
          each.template operator()<0, 2>(0, 8, [&](Row& r) { normalised_output_row(r); });
        } else if (phase == 1) {
          each.template operator()<4, 0>(0, 0, [&](Row& r) { normalised_lstm_row(r); });
        } else {
          each.template operator()<4, 8>(4, 0, [&](Row& r) { normalised_row<4>(r); });
        }
        break;
      case RnnMode::layer_norm_gru:
        if (phase == 0) {
          each.template operator()<3, 0>(0, 0, [&](Row& r) { normalised_gru_row(r); });
        } else {
          each.template operator()<3, 6>(3, 0, [&](Row& r) { normalised_row<3>(r); });
        }
      }
    }
  }

  // A vector of units of one sequence at one step, and what a round finds of its gradients.
  struct Row {
    int64_t d, t, b, unit, valid, token, saved;
    A* grad_h;
    Vec<A> grad;       // of h as it left the step, before the projection
    Vec<A> g[4];       // of the gates
    Vec<A> of_own[8];  // of the mode's own vectors
    typename Zoneout<T>::Kept kept;
  };

  // Gates from `first_gate` on and own vectors from `first_own` on. Rows inside, so that gradients of biases and own
  // vectors are summed in registers before they join the sums of the other steps.
  template <int Gates, int Own, class Body>
  inline __attribute__((always_inline)) void each_row(int64_t d, int64_t round, int64_t unit, int64_t first_gate,
                                                      int64_t first_own, const Body& body) {
    const Direction& m = direction_[d];
    const int64_t stored = stored_gates(), t = step_of(d, round);
    Vec<A> bias[Gates + 1] = {}, own[Own + 1] = {};
    for (int64_t b = 0; b < f_.batch_sizes[t]; ++b) {
      Row r;
      r.d = d;
      r.t = t;
      r.b = b;
      r.unit = unit;
      r.valid = p_.hidden - unit;
      r.token = d * p_.tokens + token_[t] + b;
      r.saved = d * p_.saved_rows + token_[t] + b;
      r.grad_h = m.grad_h + b * z_.outputs + unit;
      r.grad = p_.projected ? load(m.grad_unprojected + b * z_.units + unit)
                            : load(r.grad_h) + output_gradient(d, t, b, unit, r.valid);
      if (zoneout_.active) r.kept = zoneout_.kept(d, t, f_.order[b], unit);
      body(r);
      E* element = m.grad_gates[round % 2] + b * ld_gates() + unit;
      T* out = at<T>(f_.grad_gates, (r.token * stored + first_gate) * p_.hidden + unit);
      for (int q = 0; q < Gates; ++q) {
        bias[q] += r.g[q];
        store_valid(out + q * p_.hidden, r.g[q], r.valid);
      }
      for (int i = 0; i < Own; ++i) own[i] += r.of_own[i];
      // What flows back through U is, for n of a gru, the gradient of its recurrent term, and where terms are
      // normalised what came of that.
      if (is_normalised(p_.mode) && first_gate == 0) continue;
      const int64_t column = is_normalised(p_.mode) ? 0 : first_gate;
      for (int q = 0; q < least(Gates, static_cast<int>(z_.gates)); ++q)
        store_element<T>(element + (column + q) * z_.units, r.g[p_.mode == RnnMode::gru && q == 2 ? 3 : q]);
    }
    const auto join = [&](A* sum, Vec<A> more) { store(sum, load(sum) + more); };
    for (int q = 0; q < Gates; ++q) join(m.grad_bias + (first_gate + q) * z_.units + unit, bias[q]);
    for (int i = 0; i < Own; ++i) join(m.grad_own + (first_own + i) * z_.units + unit, own[i]);
  }

  inline __attribute__((always_inline)) Vec<A> saved_gate(const Row& r, int64_t q) const {
    return load_valid(at<const T>(f_.gates, (r.saved * saved_gates(p_.mode) + q) * p_.hidden + r.unit), r.valid);
  }
  Vec<A> own(const Row& r, int64_t i) const { return load(direction_[r.d].own + i * z_.units + r.unit); }
  A saved_statistic(const Row& r, int64_t index) const {
    return *at<const A>(f_.cells, r.saved * ld_saved() + (has_cells(p_.mode) ? p_.hidden : 0) + index);
  }

  inline __attribute__((always_inline)) Vec<A> cell_gradient(const Row& r) const {
    if (!p_.all_cells || !f_.grad_output) return Vec<A>{};
    const int64_t row = f_.output_rows(r.t, r.b);
    return load_valid(at<const T>(f_.grad_output, row + z_.cell_column(r.d) + r.unit), r.valid);
  }

  // Step before t in the direction's time, for a sequence; -1 where it began at t.
  int64_t step_before(const Row& r) const {
    if (r.d == 0) return r.t - 1;
    return r.b < z_.next_batch(f_.batch_sizes, r.t) ? r.t + 1 : -1;
  }

  // Gradients of what zoneout took from the step; what it kept goes to the states before, which is what is returned.
  inline __attribute__((always_inline)) Vec<A> fresh_h(const Row& r) const {
    return zoneout_.active ? r.grad - r.kept.h * r.grad : r.grad;
  }
  inline __attribute__((always_inline)) Vec<A> kept_h(const Row& r) const {
    return zoneout_.active ? r.kept.h * r.grad : Vec<A>{};
  }

  // What the cells of a step come from and go to.
  struct Cells {
    Vec<A> i, f, c_in, o, before, fresh;  // fresh: before zoneout
    Vec<A> grad, kept;                    // of fresh from later steps, and of `before` past the step
    A* grad_c;
  };

  inline __attribute__((always_inline)) Cells cells(const Row& r) const {
    const Direction& m = direction_[r.d];
    const int64_t before = step_before(r);
    Cells c;
    c.i = saved_gate(r, 0);
    c.f = saved_gate(r, 1);
    c.c_in = saved_gate(r, 2);
    c.o = saved_gate(r, 3);
    c.before =
        before < 0
            ? load(m.c0 + r.b * z_.units + r.unit)
            : load_valid(at<const A>(f_.cells, (r.d * p_.saved_rows + token_[before] + r.b) * ld_saved() + r.unit),
                         r.valid);
    c.fresh = zoneout_.active ? c.f * c.before + c.i * c.c_in
                              : load_valid(at<const A>(f_.cells, r.saved * ld_saved() + r.unit), r.valid);
    c.grad_c = m.grad_c + r.b * z_.units + r.unit;
    const Vec<A> grad = load(c.grad_c) + cell_gradient(r);
    c.kept = zoneout_.active ? r.kept.c * grad : Vec<A>{};
    c.grad = grad - c.kept;
    return c;
  }

  template <bool Peephole>
  inline __attribute__((always_inline)) void lstm_row(Row& r) const {
    const Cells c = cells(r);
    const Vec<A> squashed = tanh<A>(c.fresh), grad = fresh_h(r);
    if (f_.multiplied) store_valid(at<T>(f_.multiplied, r.token * p_.hidden + r.unit), c.o * squashed, r.valid);
    r.g[3] = grad * squashed * c.o * (A(1) - c.o);
    Vec<A> dc = c.grad + grad * c.o * (A(1) - squashed * squashed);
    if (Peephole) dc += r.g[3] * own(r, 2);
    gates_of_cells(r, c, dc);
    if (Peephole) {
      store(c.grad_c, load(c.grad_c) + r.g[0] * own(r, 0) + r.g[1] * own(r, 1));
      r.of_own[0] = r.g[0] * c.before;
      r.of_own[1] = r.g[1] * c.before;
      r.of_own[2] = r.g[3] * c.fresh;
    }
    if (zoneout_.active) store(r.grad_h, kept_h(r));
  }

  // Of all gates but o, and of the cells before, from that of the new cells.
  inline __attribute__((always_inline)) void gates_of_cells(Row& r, const Cells& c, Vec<A> dc) const {
    store(c.grad_c, dc * c.f + c.kept);
    r.g[0] = dc * c.c_in * c.i * (A(1) - c.i);
    r.g[1] = dc * c.before * c.f * (A(1) - c.f);
    r.g[2] = dc * c.i * (A(1) - c.c_in * c.c_in);
  }

  // Of z and n; h before has what reaches it past the gates.
  inline __attribute__((always_inline)) void gru_candidate(Row& row, Vec<A> z, Vec<A> n, Vec<A>& dz, Vec<A>& dn) const {
    const Vec<A> grad = fresh_h(row);
    dn = grad * (A(1) - z) * (A(1) - n * n);
    dz = grad * (h_before(row) - n) * z * (A(1) - z);
    store(row.grad_h, grad * z + kept_h(row));
  }

  inline __attribute__((always_inline)) void gru_row(Row& row) const {
    const Vec<A> r = saved_gate(row, 0), recurrent = saved_gate(row, 3);
    gru_candidate(row, saved_gate(row, 1), saved_gate(row, 2), row.g[1], row.g[2]);
    row.g[0] = row.g[2] * recurrent * r * (A(1) - r);
    row.g[3] = row.g[2] * r;
  }

  void candidate_row(Row& row) const { gru_candidate(row, saved_gate(row, 1), saved_gate(row, 2), row.g[0], row.g[1]); }

  void reset_row(Row& row) const {
    const Vec<A> r = saved_gate(row, 0), h = h_before(row);
    const Vec<A> grad = load(direction_[row.d].grad_unprojected + row.b * z_.units + row.unit);
    store_valid(at<T>(f_.multiplied, row.token * p_.hidden + row.unit), r * h, row.valid);
    row.g[0] = grad * h * r * (A(1) - r);
    store(row.grad_h, load(row.grad_h) + grad * r);
  }

  inline __attribute__((always_inline)) void plain_row(Row& r) const {
    const Vec<A> h = load_valid(output_at(r.d, r.t, r.b) + r.unit, r.valid);
    r.g[0] = p_.mode == RnnMode::tanh ? r.grad * (A(1) - h * h) : (h > A(0) ? r.grad : Vec<A>{});
  }

  // LN(c) of a row: its gradient from that of h, and the deviations from the mean that it is made of.
  struct NormalCells {
    Vec<A> normal, squashed, grad, scaled;  // scaled: grad, times the weight
  };
  NormalCells normal_cells(const Row& r, const Cells& c) const {
    NormalCells n;
    n.normal = (c.fresh - saved_statistic(r, 1)) * saved_statistic(r, 2);
    n.squashed = tanh<A>(n.normal * own(r, 8) + own(r, 9));
    n.grad = fresh_h(r) * c.o * (A(1) - n.squashed * n.squashed);
    n.scaled = n.grad * own(r, 8);
    return n;
  }

  void normalised_output_row(Row& r) const {
    const NormalCells n = normal_cells(r, cells(r));
    r.of_own[0] = n.grad * n.normal;
    r.of_own[1] = n.grad;
    cell_parts_[r.d].put(r.b, 0, r.unit, reduce_add<A>(n.scaled), reduce_add<A>(n.scaled * n.normal));
  }

  void normalised_lstm_row(Row& r) const {
    const Cells c = cells(r);
    const NormalCells n = normal_cells(r, c);
    const Vec<A> through = back_through_norm(n.scaled, n.normal, cell_parts_[r.d].sums(r.b, 0, 1), p_.hidden);
    r.g[3] = fresh_h(r) * n.squashed * c.o * (A(1) - c.o);
    gates_of_cells(r, c, c.grad + saved_statistic(r, 2) * through);
    put_terms<4>(r, r.g);
    if (zoneout_.active) store(r.grad_h, kept_h(r));
  }

  void normalised_gru_row(Row& row) const {
    const Vec<A> r = saved_gate(row, 0), recurrent = saved_gate(row, 5) * own(row, 2) + own(row, 5);
    gru_candidate(row, saved_gate(row, 1), saved_gate(row, 2), row.g[1], row.g[2]);
    row.g[0] = row.g[2] * recurrent * r * (A(1) - r);
    put_terms<3>(row, {row.g[0], row.g[1], row.g[2] * r});
  }

  // Gradient of x before normalisation, but for its inverse deviation, from that of its deviations.
  static Vec<A> back_through_norm(Vec<A> grad, Vec<A> normal, typename RowParts<T>::Sums sums, int64_t count) {
    return grad - (sums.one + normal * sums.other) * (A(1) / static_cast<A>(count));
  }

  // The recurrent terms, weight and bias included: their gradients, and the sums that the way back needs.
  template <int Gates>
  void put_terms(const Row& r, const Vec<A> (&grad)[Gates]) const {
    for (int q = 0; q < Gates; ++q) {
      store(direction_[r.d].grad_terms + r.b * depth() + q * z_.units + r.unit, grad[q]);
      const Vec<A> scaled = grad[q] * own(r, q);
      gate_parts_[r.d].put(r.b, q, r.unit, reduce_add<A>(scaled), reduce_add<A>(scaled * saved_gate(r, Gates + q)));
    }
  }

  template <int Gates>
  void normalised_row(Row& r) const {
    for (int q = 0; q < Gates; ++q) {
      // Of a gru r and z are normalised together, n by itself.
      const bool by_itself = Gates == 3 && q == 2;
      const int64_t first = by_itself ? 2 : 0, count = Gates == 4 ? 4 : by_itself ? 1 : 2;
      const Vec<A> grad = load(direction_[r.d].grad_terms + r.b * depth() + q * z_.units + r.unit);
      const Vec<A> normal = saved_gate(r, Gates + q);
      const typename RowParts<T>::Sums sums = gate_parts_[r.d].sums(r.b, first, first + count);
      r.g[q] =
          saved_statistic(r, by_itself ? 1 : 0) * back_through_norm(grad * own(r, q), normal, sums, count * p_.hidden);
      r.of_own[q] = grad * normal;
      r.of_own[Gates + q] = grad;
    }
  }

  const T* output_at(int64_t d, int64_t t, int64_t b) const {
    return at<const T>(f_.output, f_.output_rows(t, b) + d * p_.outputs);
  }

  inline __attribute__((always_inline)) Vec<A> h_before(const Row& r) const {
    const int64_t before = step_before(r);
    if (before >= 0) return load_valid(output_at(r.d, before, r.b) + r.unit, r.valid);
    if (!f_.h0) return Vec<A>{};
    return load_valid(at<const T>(f_.h0, (r.d * p_.batch + f_.order[r.b]) * p_.outputs + r.unit), r.valid);
  }

  const RnnBackwardParams& f_;
  const RnnProblem& p_;
  const RnnSizes<T> z_;
  const Zoneout<T> zoneout_;
  RowParts<T> gate_parts_[2], cell_parts_[2];
  int64_t* token_ = nullptr;
  Direction direction_[2];
};

}  // namespace ptk::PTK_ISA
