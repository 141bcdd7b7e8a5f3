// Recurrent layers over ragged sequences: what the kernels are given. Torch-free.
//
//   lstm   i, f, o = sigmoid(x W_i + h U_i + b), ...;  g = tanh(...);  c' = f c + i g;  h' = o tanh(c')  [W_r]
//   gru    r, z = sigmoid(...);  n = tanh(x W_n + b_n + r (h U_n + b_un));  h' = (1 - z) n + z h
//   rnn    h' = tanh(x W + h U + b), or relu
//
// Sequences are numbered by slot, longest first, so that the ones still running at step t are the first batch_sizes[t].
#pragma once

#include "csrc/core/dtype.h"
#include "csrc/cpu/isa.h"

#include <cstdint>

namespace ptk {

enum class RnnMode : uint8_t { lstm, gru, tanh, relu };

constexpr int64_t gate_count(RnnMode mode) {
  return mode == RnnMode::lstm ? 4 : mode == RnnMode::gru ? 3 : 1;
}

// What a unit's gates take in buffers and in what the forward saves: gru keeps the two terms of n apart.
constexpr int64_t saved_gates(RnnMode mode) {
  return mode == RnnMode::lstm || mode == RnnMode::gru ? 4 : 0;
}

struct RnnProblem {
  DType dtype = DType::f32;
  RnnMode mode = RnnMode::lstm;
  int64_t directions = 1;
  int64_t steps = 0;       // of the longest sequence
  int64_t batch = 0;       // sequences, those of length 0 included
  int64_t tokens = 0;      // sum of the lengths
  int64_t saved_rows = 0;  // of each direction in gates and cells: tokens, or more
  int64_t input = 0;       // features
  int64_t hidden = 0;      // units
  int64_t outputs = 0;     // features of h: hidden, or the projection's
  bool projected = false;
  bool all_cells = false;  // rows of output go on with the cells of the token
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
  void* cells = nullptr;  // [directions, saved_rows, hidden], float32 (float64 for float64)
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
  // Gradients of the gates before activation, [directions, tokens, gates, hidden], packed order; for gru four: those of
  // r, z, n, and of n's recurrent term.
  void* grad_gates = nullptr;
  void* grad_projected = nullptr;  // [directions, tokens, outputs], only where projected
  void* unprojected = nullptr;     // [directions, tokens, hidden], only where projected: h before the projection
  // May be null:
  void* grad_bias_input[2] = {};  // [gates * hidden]
  void* grad_bias_hidden[2] = {};
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
