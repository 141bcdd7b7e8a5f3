// Recurrent layers over ragged sequences: what the kernels are given. Torch-free.
//
//   lstm   i, f, o = sigmoid(x W_i + h U_i + b), ...;  g = tanh(...);  c' = f c + i g;  h' = o tanh(c')  [W_r]
//   gru    r, z = sigmoid(...);  n = tanh(x W_n + b_n + r (h U_n + b_un));  h' = (1 - z) n + z h
//   rnn    h' = tanh(x W + h U + b), or relu
//
//   peephole_lstm     lstm whose gates i and f see p c besides, and o sees p c'
//   reset_before_gru  gru with n = tanh(x W_n + (r h) U_n + b_n)
//   layer_norm_lstm   lstm of v + LN(h U), where v is given instead of x W, with h' = o tanh(LN(c'))
//   layer_norm_gru    gru of the same, LN over r and z together and over n
//
//   zoneout           of any of them: a unit of h, and of c, keeps what it had with some probability
//
// Sequences are numbered by slot, longest first, so that the ones still running at step t are the first batch_sizes[t].
#pragma once

#include "csrc/core/dtype.h"
#include "csrc/cpu/isa.h"

#include <cstdint>

namespace ptk {

enum class RnnMode : uint8_t {
  lstm,
  gru,
  tanh,
  relu,
  peephole_lstm,
  reset_before_gru,
  layer_norm_lstm,
  layer_norm_gru,
};

constexpr bool has_cells(RnnMode mode) {
  return mode == RnnMode::lstm || mode == RnnMode::peephole_lstm || mode == RnnMode::layer_norm_lstm;
}
constexpr bool is_plain(RnnMode mode) {
  return mode == RnnMode::tanh || mode == RnnMode::relu;
}
constexpr bool is_normalised(RnnMode mode) {
  return mode == RnnMode::layer_norm_lstm || mode == RnnMode::layer_norm_gru;
}

constexpr int64_t gate_count(RnnMode mode) {
  return has_cells(mode) ? 4 : is_plain(mode) ? 1 : 3;
}

// Numbers that the forward saves of a unit's gates: gru keeps the two terms of n apart; behind the gates of a
// normalised cell stand the recurrent terms, normalised.
static inline constexpr int64_t saved_gates(RnnMode mode) {
  return is_plain(mode) ? 0 : is_normalised(mode) ? 2 * gate_count(mode) : mode == RnnMode::gru ? 4 : gate_count(mode);
}

// What the forward saves of a token in the dtype of sums: its cells, then, where normalised, the inverse deviation of
// every normalised group of gates and, for cells, their mean and inverse deviation.
constexpr int64_t saved_sums(RnnMode mode, int64_t hidden) {
  const int64_t statistics = mode == RnnMode::layer_norm_lstm ? 3 : mode == RnnMode::layer_norm_gru ? 2 : 0;
  return (has_cells(mode) ? hidden : 0) + statistics;
}

// Gradients of a unit that the backward leaves for the products over all tokens: those of the gates' input terms, then
// those of the recurrent terms that differ from them.
static inline constexpr int64_t gate_gradients(RnnMode mode) {
  return is_normalised(mode) ? 2 * gate_count(mode) : mode == RnnMode::gru ? 4 : gate_count(mode);
}

struct RnnProblem {
  DType dtype = DType::f32;
  RnnMode mode = RnnMode::lstm;
  int64_t directions = 1;
  int64_t steps = 0;       // of the longest sequence
  int64_t batch = 0;       // sequences, those of length 0 included
  int64_t tokens = 0;      // sum of the lengths
  int64_t saved_rows = 0;  // of each direction in gates and cells: tokens, or more
  int64_t input = 0;       // features; 0 where normalised, whose input is [directions * gates * hidden] products
  int64_t hidden = 0;      // units
  int64_t outputs = 0;     // features of h: hidden, or the projection's
  bool projected = false;
  bool all_cells = false;  // rows of output go on with the cells of the token
  double eps = 0;          // of normalisation
  // Shares of h and of c that are kept: of the units, where 24 bits of philox(seed, {unit, step, sequence, direction})
  // are below keep_below, or, where nothing is drawn, of every unit's value.
  double zoneout[2] = {0, 0};
  bool draws = false;
  uint32_t keep_below[2] = {0, 0};
  uint64_t seed = 0;
};

// Where token (step, slot) lies: step[t] + slot[b] elements into the data, features contiguous. Covers packed, padded
// and concatenated sequences alike.
struct RnnRows {
  const int64_t* step = nullptr;
  const int64_t* slot = nullptr;
  int64_t operator()(int64_t t, int64_t b) const { return step[t] + slot[b]; }
};

// Contiguous; biases and projection may be null.
struct RnnWeights {
  const void* input = nullptr;       // [gates * hidden, input]
  const void* hidden = nullptr;      // [gates * hidden, outputs]
  const void* bias_input = nullptr;  // [gates * hidden]
  const void* bias_hidden = nullptr;
  const void* projection = nullptr;  // [outputs, hidden]
  const void* peephole = nullptr;    // [3, hidden], of i, f and o
  // Weights, then biases; only where normalised.
  const void* norm_hidden = nullptr;  // [2, gates * hidden]
  const void* norm_cell = nullptr;    // [2, hidden]
};

struct RnnForwardParams {
  RnnProblem problem;
  const int64_t* batch_sizes = nullptr;  // [steps]
  const int64_t* order = nullptr;        // [batch]: row of the states that belongs to a slot
  RnnWeights weights[2];
  const void* input = nullptr;
  RnnRows input_rows;
  void* output = nullptr;  // [.., directions * outputs (+ directions * hidden)], rows of tokens only are written
  RnnRows output_rows;
  const void* h0 = nullptr;  // [directions, batch, outputs] contiguous; null means zeros
  const void* c0 = nullptr;  // [directions, batch, hidden]
  void* h_n = nullptr;       // as h0 and c0; only sequences with a token are written
  void* c_n = nullptr;
  // Kept for the backward, null where none will follow. Tokens in packed order.
  void* gates = nullptr;  // [directions, saved_rows, saved_gates, hidden], after activation
  void* cells = nullptr;  // [directions, saved_rows, saved_sums], float32 (float64 for float64)
};

struct RnnBackwardParams {
  RnnProblem problem;
  const int64_t* batch_sizes = nullptr;
  const int64_t* order = nullptr;
  RnnWeights weights[2];
  const void* output = nullptr;  // of the forward
  const void* grad_output = nullptr;
  RnnRows output_rows;
  RnnRows grad_output_rows;
  const void* h0 = nullptr;
  const void* c0 = nullptr;
  const void* gates = nullptr;
  const void* cells = nullptr;
  const void* grad_h_n = nullptr;  // null means zeros, as for grad_output
  const void* grad_c_n = nullptr;
  // Gradients of the gates before activation, [directions, tokens, gate_gradients, hidden], packed order; for gru four:
  // those of r, z, n, and of n's recurrent term.
  void* grad_gates = nullptr;
  void* grad_projected = nullptr;  // [directions, tokens, outputs], only where projected
  // What a projection, or the product behind a reset, multiplied: [directions, tokens, hidden]; only where there is
  // one.
  void* multiplied = nullptr;
  // May be null:
  void* grad_bias_input[2] = {};  // [gates * hidden]
  void* grad_bias_hidden[2] = {};
  void* grad_peephole[2] = {};  // as the weights
  void* grad_norm_hidden[2] = {};
  void* grad_norm_cell[2] = {};
  void* grad_h0 = nullptr;
  void* grad_c0 = nullptr;
};

struct RnnKernels {
  // False when memory ran out.
  bool (*forward)(const RnnForwardParams&);
  bool (*backward)(const RnnBackwardParams&);
  const char* (*describe)(const RnnProblem&);
};

PTK_DECLARE_KERNELS(RnnKernels, packed_rnn_kernels)

// Name of the kernel that the active level runs for a problem.
PTK_EXPORT const char* packed_rnn_kernel_name(const RnnProblem& problem);

}  // namespace ptk
