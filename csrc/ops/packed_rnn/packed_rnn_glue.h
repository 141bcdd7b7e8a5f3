// Torch glue of the recurrent layers: arguments to a problem, checks, allocation.
#pragma once

#include "csrc/ops/packed_rnn/packed_rnn_sequences.h"

#include <cstring>
#include <optional>
#include <tuple>

namespace ptk {

inline RnnMode parse_mode(const std::string& name) {
  constexpr const char* names[] = {"lstm", "gru", "tanh", "relu"};
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) {
      return static_cast<RnnMode>(i);
    }
  }
  fail("packed_rnn: mode: got '", name, "', expected lstm, gru, tanh or relu");
}

// torch::stable::contiguous goes through the dispatcher, which takes 2 us where there is nothing to do as well.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_rnn_tensor(const char* name, const Tensor& tensor, const Tensor& input) {
  PTK_CHECK(tensor.is_cpu(), "packed_rnn: ", name, ": got a tensor on another device, expected it on the CPU");
  PTK_CHECK(shim_dtype(tensor) == shim_dtype(input), "packed_rnn: ", name,
            ": got another dtype than input's, expected ", dtype_name(*float_dtype(input)));
}

inline void check_rnn_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  PTK_CHECK(std::ranges::equal(tensor.sizes(), expected), "packed_rnn: ", name, ": got shape ",
            shape_text(tensor.sizes()), ", expected ", shape_text(expected));
}

inline DType sum_dtype(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

// The arguments of a layer, checked. Holds contiguous versions of weights and states while kernels read them.
class Layer {
public:
  Layer(Tensor input_, const std::optional<Tensor>& sizes, const std::optional<Tensor>& sorted_indices,
        std::vector<Tensor> state_, std::vector<Tensor> params_, int64_t batch, const std::string& layout,
        const std::string& mode, bool bidirectional, bool all_cells)
      : input(checked_input(input_)), sequences(input, sizes, sorted_indices, batch, parse_layout(layout)),
        state(std::move(state_)), params(std::move(params_)) {
    RnnProblem& p = problem;
    p.dtype = *float_dtype(input);
    p.mode = parse_mode(mode);
    p.directions = bidirectional ? 2 : 1;
    PTK_CHECK(!all_cells || p.mode == RnnMode::lstm, "packed_rnn: all_cells: got true for '", mode,
              "', expected it for lstm only");
    p.all_cells = all_cells;
    p.steps = static_cast<int64_t>(sequences.batch_sizes.size());
    p.batch = batch;
    p.tokens = sequences.tokens;
    // Shapes must not depend on the lengths: what is saved for padded sequences has room for full ones.
    p.saved_rows = input.size(0) * (sequences.is_padded() ? input.size(1) : 1);
    p.input = input.size(input.dim() - 1);
    read_params();
    read_state();
  }

  int64_t params_per_direction() const { return static_cast<int64_t>(params.size()) / problem.directions; }
  bool has_bias() const { return params_per_direction() >= 4; }
  const Tensor& param(int64_t direction, int64_t index) const {
    return params[direction * params_per_direction() + index];
  }
  const void* state_data(size_t index) const { return index < state.size() ? state[index].const_data_ptr() : nullptr; }

  std::vector<int64_t> output_shape() const {
    std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
    shape.back() = problem.directions * (problem.outputs + (problem.all_cells ? problem.hidden : 0));
    return shape;
  }
  std::vector<int64_t> state_shape(int64_t features) const { return {problem.directions, problem.batch, features}; }
  std::vector<int64_t> gates_shape() const {
    return {problem.directions, problem.saved_rows, saved_gates(problem.mode), problem.hidden};
  }
  std::vector<int64_t> cells_shape() const { return {problem.directions, problem.saved_rows, problem.hidden}; }

  void fill_weights(RnnWeights* weights) const {
    for (int64_t d = 0; d < problem.directions; ++d) {
      weights[d].input = param(d, 0).const_data_ptr();
      weights[d].hidden = param(d, 1).const_data_ptr();
      weights[d].bias_input = has_bias() ? param(d, 2).const_data_ptr() : nullptr;
      weights[d].bias_hidden = has_bias() ? param(d, 3).const_data_ptr() : nullptr;
      weights[d].projection = problem.projected ? param(d, params_per_direction() - 1).const_data_ptr() : nullptr;
    }
  }

  Tensor input;
  Sequences sequences;
  std::vector<Tensor> state, params;
  RnnProblem problem;

private:
  static Tensor checked_input(const Tensor& input) {
    PTK_CHECK(float_dtype(input), "packed_rnn: input: got another dtype, expected float64, float32, bfloat16 or "
                                  "float16");
    PTK_CHECK(input.is_cpu(), "packed_rnn: input: got a tensor on another device, expected it on the CPU");
    PTK_CHECK(input.dim() >= 2 && input.size(input.dim() - 1) >= 1, "packed_rnn: input: got shape ",
              shape_text(input.sizes()), ", expected at least one feature");
    return input.stride(input.dim() - 1) == 1 ? input : as_contiguous(input);
  }

  void read_params() {
    RnnProblem& p = problem;
    const int64_t count = static_cast<int64_t>(params.size());
    const int64_t each = count / p.directions;
    const bool fits =
        count % p.directions == 0 && (p.mode == RnnMode::lstm ? 2 <= each && each <= 5 : each == 2 || each == 4);
    PTK_CHECK(fits, "packed_rnn: params: got ", count,
              " tensors, expected per direction weight_ih, weight_hh, both "
              "biases or none, and for lstm possibly weight_hr");
    p.projected = each % 2 == 1;
    const int64_t gates = gate_count(p.mode);
    PTK_CHECK(params[0].dim() == 2 && params[0].size(0) % gates == 0 && params[0].size(0) > 0,
              "packed_rnn: params: got weight_ih of shape ", shape_text(params[0].sizes()), ", expected [", gates,
              " * hidden, input]");
    p.hidden = params[0].size(0) / gates;
    p.outputs = p.hidden;
    if (p.projected) {
      PTK_CHECK(params[each - 1].dim() == 2 && params[each - 1].size(0) > 0,
                "packed_rnn: params: got weight_hr of shape ", shape_text(params[each - 1].sizes()),
                ", expected [proj_size, hidden]");
      p.outputs = params[each - 1].size(0);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t kind = i % each;
      check_rnn_tensor("params", params[i], input);
      if (kind == 0) {
        check_rnn_shape("params: weight_ih", params[i], {gates * p.hidden, p.input});
      } else if (kind == 1) {
        check_rnn_shape("params: weight_hh", params[i], {gates * p.hidden, p.outputs});
      } else if (p.projected && kind == each - 1) {
        check_rnn_shape("params: weight_hr", params[i], {p.outputs, p.hidden});
      } else {
        check_rnn_shape("params: bias", params[i], {gates * p.hidden});
      }
      params[i] = as_contiguous(params[i]);
    }
  }

  void read_state() {
    const RnnProblem& p = problem;
    const size_t expected = p.mode == RnnMode::lstm ? 2 : 1;
    PTK_CHECK(state.empty() || state.size() == expected, "packed_rnn: state: got ", state.size(),
              " tensors, expected none or ", expected);
    for (size_t i = 0; i < state.size(); ++i) {
      check_rnn_tensor("state", state[i], input);
      check_rnn_shape("state", state[i], state_shape(i == 0 ? p.outputs : p.hidden));
      state[i] = as_contiguous(state[i]);
    }
  }
};

// Rows of a padded tensor that belong to no token.
inline void zero_padding(const Sequences& sequences, const Tensor& tensor) {
  if (!sequences.is_padded()) {
    return;
  }
  const bool batch_first = sequences.layout == RnnLayout::batch_first;
  const int64_t steps = tensor.size(batch_first ? 1 : 0);
  const int64_t features = tensor.size(2);
  const size_t bytes = element_size(*float_dtype(tensor));
  auto* data = static_cast<char*>(tensor.mutable_data_ptr());
  for (int64_t b = 0; b < sequences.batch; ++b) {
    for (int64_t t = sequences.lengths[b]; t < steps; ++t) {
      const int64_t row = batch_first ? b * steps + t : t * sequences.batch + b;
      std::memset(data + row * features * bytes, 0, features * bytes);
    }
  }
}

// What is saved has rows of tokens first; the rest is defined too.
inline void zero_unused(const Layer& layer, const Tensor& saved) {
  const RnnProblem& p = layer.problem;
  if (p.saved_rows == p.tokens || saved.dim() < 2) {
    return;
  }
  const size_t row = saved.stride(1) * element_size(*float_dtype(saved));
  for (int64_t d = 0; d < p.directions; ++d) {
    std::memset(static_cast<char*>(saved.mutable_data_ptr()) + (d * p.saved_rows + p.tokens) * row, 0,
                (p.saved_rows - p.tokens) * row);
  }
}

// Copies rows of tokens between a tensor of the user's layout and packed order.
inline void move_rows(const Sequences& sequences, const RowOffsets& offsets, void* laid_out, void* packed,
                      int64_t features, size_t element, bool to_packed) {
  int64_t token = 0;
  const RnnRows rows = offsets.rows();
  for (size_t t = 0; t < sequences.batch_sizes.size(); ++t) {
    for (int64_t b = 0; b < sequences.batch_sizes[t]; ++b, ++token) {
      char* there = static_cast<char*>(laid_out) + rows(static_cast<int64_t>(t), b) * element;
      char* here = static_cast<char*>(packed) + token * features * element;
      std::memcpy(to_packed ? here : there, to_packed ? there : here, features * element);
    }
  }
}

}  // namespace ptk
