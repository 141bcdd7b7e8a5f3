// Backward of one recurrent layer on the CPU: the part that runs step by step.
//
//   round     a step of one direction, last step first:  dh = grad_output + dG U^T  (dG of the step before), then the
//             gradients dG of the gates before activation, from what the forward saved
//
// The gradients of weights and input are products over all tokens at once, formed from the dG of every step when all
// are there (packed_rnn_glue.h). Slices and the meeting once per step are those of the forward.
#pragma once

#include "packed_rnn_cpu_common.h"

namespace ptk::PTK_ISA {

template <class T>
class RnnBackward {
  using E = Element<T>;
  using A = Acc<T>;
  static constexpr int64_t kNr = GemmTraits<T>::kNr;
  static constexpr int64_t kLanesA = kLanes<A>;

public:
  explicit RnnBackward(const RnnBackwardParams& params) : f_(params), p_(params.problem), z_(params.problem) {}

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
    const int64_t phases = p_.projected ? 2 : 1;
    Team(p_.directions, z_.slices, p_.steps * phases + 1).run(z_.serial, [&](int64_t d, int64_t slice, int64_t round) {
      TileScope tiles;
      if (round % phases == 0) back_through_hidden(d, slice, round / phases);
      if (round < p_.steps * phases && round % phases == phases - 1) step(d, slice, round / phases);
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
    A* grad_unprojected;
    A* grad_bias;
  };

  int64_t depth() const { return z_.gates * z_.units; }
  int64_t ld_gates() const { return depth() + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t ld_projected() const { return z_.outputs + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t stored_gates() const { return p_.mode == RnnMode::gru ? 4 : z_.gates; }
  int64_t step_of(int64_t d, int64_t round) const { return d == 0 ? p_.steps - 1 - round : round; }

  void carve(Carver& c) {
    token_ = c.take<int64_t>(p_.steps);
    for (int64_t d = 0; d < p_.directions; ++d) {
      Direction& m = direction_[d];
      m.w_hidden = c.take<E>(depth() * z_.outputs);
      m.w_projection = p_.projected ? c.take<E>(z_.outputs * z_.units) : nullptr;
      m.grad_h = c.take<A>(p_.batch * z_.outputs);
      m.grad_c = c.take<A>(p_.batch * z_.units);
      m.c0 = p_.mode == RnnMode::lstm ? c.take<A>(p_.batch * z_.units) : nullptr;
      for (E*& g : m.grad_gates) g = c.take<E>(z_.padded_rows() * ld_gates());
      m.grad_projected = p_.projected ? c.take<E>(z_.padded_rows() * ld_projected()) : nullptr;
      m.grad_unprojected = p_.projected ? c.take<A>(p_.batch * z_.units) : nullptr;
      m.grad_bias = c.take<A>(stored_gates() * z_.units);
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
  }

  // grad_h of the slice's outputs from the gates of the round before, for the sequences that ran in it; then,
  // projected, the rows of the product that leads from h to the units.
  void back_through_hidden(int64_t d, int64_t slice, int64_t round) {
    const Direction& m = direction_[d];
    const int64_t first = p_.projected ? z_.slice_output_panel(slice) : z_.slice_panel(slice);
    const int64_t end = p_.projected ? z_.slice_output_panel(slice + 1) : z_.slice_panel(slice + 1);
    if (round > 0)
      rnn_product<T>(f_.batch_sizes[step_of(d, round - 1)], (end - first) * kNr, depth(), m.grad_gates[(round - 1) % 2],
                     ld_gates(), m.w_hidden + first * depth() * kNr, depth() * kNr, m.grad_h + first * kNr, z_.outputs,
                     p_.mode == RnnMode::gru, round % 2 == 1);
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
  void step(int64_t d, int64_t slice, int64_t round) {
    const Direction& m = direction_[d];
    const int64_t first = z_.slice_panel(slice), units = z_.slice_units(slice);
    const int64_t t = step_of(d, round), n = f_.batch_sizes[t];
    if (p_.projected)
      rnn_product<T>(n, units, z_.outputs, m.grad_projected, ld_projected(), m.w_projection + first * kNr * z_.outputs,
                     z_.outputs * kNr, m.grad_unprojected + first * kNr, z_.units, false);
    for (int64_t unit = first * kNr; unit < first * kNr + units; unit += kLanesA) {
      switch (p_.mode) {
      case RnnMode::lstm:
        each_row(d, t, n, unit, round, [&](const Row& r, Vec<A>(&g)[4]) { lstm_row(r, g); });
        break;
      case RnnMode::gru:
        each_row(d, t, n, unit, round, [&](const Row& r, Vec<A>(&g)[4]) { gru_row(r, g); });
        break;
      default:
        each_row(d, t, n, unit, round, [&](const Row& r, Vec<A>(&g)[4]) { plain_row(r, g); });
      }
    }
  }

  // A vector of units of one sequence at one step.
  struct Row {
    Vec<A> grad;  // of h, before the projection
    int64_t d, t, b, unit, valid, token, saved;
    A* grad_h;
  };

  // Rows inside, so that a bias gradient is summed in registers before it joins the sum of the other steps.
  template <class Body>
  inline __attribute__((always_inline)) void each_row(int64_t d, int64_t t, int64_t n, int64_t unit, int64_t round,
                                                      const Body& body) {
    const Direction& m = direction_[d];
    const int64_t stored = stored_gates(), valid = p_.hidden - unit;
    Vec<A> bias[4] = {};
    for (int64_t b = 0; b < n; ++b) {
      const int64_t token = token_[t] + b;
      Row r{Vec<A>{},
            d,
            t,
            b,
            unit,
            valid,
            d * p_.tokens + token,
            d * p_.saved_rows + token,
            m.grad_h + b * z_.outputs + unit};
      r.grad = p_.projected ? load(m.grad_unprojected + b * z_.units + unit)
                            : load(r.grad_h) + output_gradient(d, t, b, unit, valid);
      Vec<A> g[4];
      body(r, g);
      E* element = m.grad_gates[round % 2] + b * ld_gates() + unit;
      T* out = at<T>(f_.grad_gates, r.token * stored * p_.hidden + unit);
      for (int64_t q = 0; q < stored; ++q) {
        bias[q] += g[q];
        store_valid(out + q * p_.hidden, g[q], valid);
      }
      // What flows back through U is, for n of a gru, the gradient of its recurrent term.
      for (int64_t q = 0; q < z_.gates; ++q)
        store_element<T>(element + q * z_.units, g[p_.mode == RnnMode::gru && q == 2 ? 3 : q]);
    }
    A* sum = m.grad_bias + unit;
    for (int64_t q = 0; q < stored; ++q) store(sum + q * z_.units, load(sum + q * z_.units) + bias[q]);
  }

  Vec<A> saved_gate(const Row& r, int64_t q) const {
    return load_valid(at<const T>(f_.gates, (r.saved * 4 + q) * p_.hidden + r.unit), r.valid);
  }

  Vec<A> cell_gradient(const Row& r) const {
    if (!p_.all_cells || !f_.grad_output) return Vec<A>{};
    const int64_t row = f_.output_rows(r.t, r.b);
    return load_valid(at<const T>(f_.grad_output, row + z_.cell_column(r.d) + r.unit), r.valid);
  }

  // Step before t in the direction's time, for a sequence; -1 where it began at t.
  int64_t step_before(const Row& r) const {
    if (r.d == 0) return r.t - 1;
    return r.b < z_.next_batch(f_.batch_sizes, r.t) ? r.t + 1 : -1;
  }

  void lstm_row(const Row& r, Vec<A> (&g)[4]) const {
    const Direction& m = direction_[r.d];
    const int64_t before = step_before(r);
    const Vec<A> i = saved_gate(r, 0), f = saved_gate(r, 1), c_in = saved_gate(r, 2), o = saved_gate(r, 3);
    const Vec<A> c = load_valid(at<const A>(f_.cells, r.saved * p_.hidden + r.unit), r.valid);
    const Vec<A> c_before =
        before < 0
            ? load(m.c0 + r.b * z_.units + r.unit)
            : load_valid(at<const A>(f_.cells, (r.d * p_.saved_rows + token_[before] + r.b) * p_.hidden + r.unit),
                         r.valid);
    A* grad_c = m.grad_c + r.b * z_.units + r.unit;
    const Vec<A> squashed = tanh<A>(c);
    if (f_.unprojected) store_valid(at<T>(f_.unprojected, r.token * p_.hidden + r.unit), o * squashed, r.valid);
    const Vec<A> dc = load(grad_c) + cell_gradient(r) + r.grad * o * (A(1) - squashed * squashed);
    store(grad_c, dc * f);
    g[0] = dc * c_in * i * (A(1) - i);
    g[1] = dc * c_before * f * (A(1) - f);
    g[2] = dc * i * (A(1) - c_in * c_in);
    g[3] = r.grad * squashed * o * (A(1) - o);
  }

  void gru_row(const Row& row, Vec<A> (&g)[4]) const {
    const Vec<A> r = saved_gate(row, 0), z = saved_gate(row, 1), n = saved_gate(row, 2), recurrent = saved_gate(row, 3);
    const Vec<A> dn = row.grad * (A(1) - z) * (A(1) - n * n);
    g[0] = dn * recurrent * r * (A(1) - r);
    g[1] = row.grad * (h_before(row) - n) * z * (A(1) - z);
    g[2] = dn;
    g[3] = dn * r;
    store(row.grad_h, row.grad * z);
  }

  void plain_row(const Row& r, Vec<A> (&g)[4]) const {
    const Vec<A> h = load_valid(output_at(r.d, r.t, r.b) + r.unit, r.valid);
    g[0] = p_.mode == RnnMode::tanh ? r.grad * (A(1) - h * h) : (h > A(0) ? r.grad : Vec<A>{});
  }

  const T* output_at(int64_t d, int64_t t, int64_t b) const {
    return at<const T>(f_.output, f_.output_rows(t, b) + d * p_.outputs);
  }

  Vec<A> h_before(const Row& r) const {
    const int64_t before = step_before(r);
    if (before >= 0) return load_valid(output_at(r.d, before, r.b) + r.unit, r.valid);
    if (!f_.h0) return Vec<A>{};
    return load_valid(at<const T>(f_.h0, (r.d * p_.batch + f_.order[r.b]) * p_.outputs + r.unit), r.valid);
  }

  const RnnBackwardParams& f_;
  const RnnProblem& p_;
  const RnnSizes<T> z_;
  int64_t* token_ = nullptr;
  Direction direction_[2];
};

}  // namespace ptk::PTK_ISA
