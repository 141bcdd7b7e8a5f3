// Torch glue of the recurrent layers: arguments to a problem, checks, allocation.
#pragma once

#include "csrc/ops/packed_rnn/packed_rnn_sequences.h"

#include <cmath>
#include <cstring>
#include <optional>
#include <span>
#include <tuple>

namespace ptk {

inline RnnMode parse_mode(const std::string& name) {
  constexpr const char* names[] = {
      "lstm", "gru", "tanh", "relu", "peephole_lstm", "reset_before_gru", "layer_norm_lstm", "layer_norm_gru"};
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) {
      return static_cast<RnnMode>(i);
    }
  }
  fail("packed_rnn: mode: got '", name,
       "', expected lstm, gru, tanh, relu, peephole_lstm, "
       "reset_before_gru, layer_norm_lstm or layer_norm_gru");
}

enum class RnnParam : uint8_t {
  weight_ih,
  weight_hh,
  bias_ih,
  bias_hh,
  weight_hr,
  weight_peephole,
  norm_hidden,
  norm_cell,
};

// Which parameters a direction has, in their order, from how many there are; empty where no such list fits.
inline std::span<const RnnParam> param_order(RnnMode mode, int64_t count) {
  using enum RnnParam;
  static constexpr RnnParam biased[] = {weight_ih, weight_hh, bias_ih, bias_hh, weight_hr};
  static constexpr RnnParam projected[] = {weight_ih, weight_hh, weight_hr};
  static constexpr RnnParam peephole[] = {weight_ih, weight_hh, weight_peephole};
  static constexpr RnnParam peephole_biased[] = {weight_ih, weight_hh, bias_ih, weight_peephole};
  static constexpr RnnParam layer_norm[] = {weight_hh, norm_hidden, norm_cell};
  const auto first = [&](std::span<const RnnParam> all, std::initializer_list<int64_t> counts) {
    return std::ranges::find(counts, count) == counts.end() ? std::span<const RnnParam>() : all.first(count);
  };
  switch (mode) {
  case RnnMode::lstm:
    return count == 3 ? projected : first(biased, {2, 4, 5});
  case RnnMode::peephole_lstm:
    return count == 3 ? peephole : first(peephole_biased, {4});
  case RnnMode::reset_before_gru:
    return first(biased, {2, 3});
  case RnnMode::layer_norm_lstm:
    return first(layer_norm, {3});
  case RnnMode::layer_norm_gru:
    return first(layer_norm, {2});
  default:
    return first(biased, {2, 4});
  }
}

// What goes with some cells only.
struct CellOptions {
  double eps = 1e-5, zoneout = 0, zoneout_cell = 0;
  std::optional<Tensor> seed;
};

// torch::stable::contiguous goes through the dispatcher, which takes 2 us where there is nothing to do as well.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void make_contiguous(Tensor& tensor) {
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
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
        const std::string& mode, bool bidirectional, bool all_cells, const CellOptions& options)
      : input(checked_input(input_)), sequences(input, sizes, sorted_indices, batch, parse_layout(layout)),
        state(std::move(state_)), params(std::move(params_)) {
    RnnProblem& p = problem;
    p.dtype = *float_dtype(input);
    p.mode = parse_mode(mode);
    p.directions = bidirectional ? 2 : 1;
    PTK_CHECK(!all_cells || has_cells(p.mode), "packed_rnn: all_cells: got true for '", mode,
              "', expected it for an lstm only");
    p.all_cells = all_cells;
    p.steps = static_cast<int64_t>(sequences.batch_sizes.size());
    p.batch = batch;
    p.tokens = sequences.tokens;
    // Shapes must not depend on the lengths: what is saved for padded sequences has room for full ones.
    p.saved_rows = input.size(0) * (sequences.is_padded() ? input.size(1) : 1);
    p.input = is_normalised(p.mode) ? 0 : input.size(input.dim() - 1);
    read_params();
    read_state();
    read_options(options);
  }

  // Among all parameters; -1 where the layer has none of that kind.
  int64_t param_index(int64_t direction, RnnParam kind) const {
    const auto found = std::ranges::find(order_, kind);
    return found == order_.end() ? -1 : direction * static_cast<int64_t>(order_.size()) + (found - order_.begin());
  }
  const void* param_data(int64_t direction, RnnParam kind) const {
    const int64_t index = param_index(direction, kind);
    return index < 0 ? nullptr : params[index].const_data_ptr();
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
  bool saves_sums() const { return saved_sums(problem.mode, problem.hidden) > 0; }
  std::vector<int64_t> cells_shape() const {
    return {problem.directions, problem.saved_rows, saved_sums(problem.mode, problem.hidden)};
  }

  void fill_weights(RnnWeights* weights) const {
    for (int64_t d = 0; d < problem.directions; ++d) {
      weights[d].input = param_data(d, RnnParam::weight_ih);
      weights[d].hidden = param_data(d, RnnParam::weight_hh);
      weights[d].bias_input = param_data(d, RnnParam::bias_ih);
      weights[d].bias_hidden = param_data(d, RnnParam::bias_hh);
      weights[d].projection = param_data(d, RnnParam::weight_hr);
      weights[d].peephole = param_data(d, RnnParam::weight_peephole);
      weights[d].norm_hidden = param_data(d, RnnParam::norm_hidden);
      weights[d].norm_cell = param_data(d, RnnParam::norm_cell);
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
    const int64_t count = static_cast<int64_t>(params.size()), each = count / p.directions;
    order_ = count % p.directions == 0 ? param_order(p.mode, each) : std::span<const RnnParam>();
    PTK_CHECK(!order_.empty(), "packed_rnn: params: got ", count,
              " tensors, expected for each direction what the mode has: weight_ih, weight_hh, both biases or none, "
              "for lstm possibly weight_hr; for peephole_lstm and reset_before_gru at most one bias, and "
              "weight_peephole; for layer_norm_lstm and layer_norm_gru weight_hh, norm_hidden and norm_cell");
    const int64_t gates = gate_count(p.mode);
    PTK_CHECK(params[0].dim() == 2 && params[0].size(0) % gates == 0 && params[0].size(0) > 0,
              "packed_rnn: params: got a first weight of shape ", shape_text(params[0].sizes()), ", expected [", gates,
              " * hidden, ..]");
    p.hidden = params[0].size(0) / gates;
    p.outputs = p.hidden;
    const int64_t projection = param_index(0, RnnParam::weight_hr);
    p.projected = projection >= 0;
    if (p.projected) {
      PTK_CHECK(params[projection].dim() == 2 && params[projection].size(0) > 0,
                "packed_rnn: params: got weight_hr of shape ", shape_text(params[projection].sizes()),
                ", expected [proj_size, hidden]");
      p.outputs = params[projection].size(0);
    }
    if (is_normalised(p.mode)) {
      PTK_CHECK(input.size(input.dim() - 1) == p.directions * gates * p.hidden, "packed_rnn: input: got ",
                input.size(input.dim() - 1), " features, expected the products of every gate, ",
                p.directions * gates * p.hidden);
    }
    for (int64_t i = 0; i < count; ++i) {
      check_rnn_tensor("params", params[i], input);
      check_param(order_[i % each], params[i]);
      make_contiguous(params[i]);
    }
  }

  void check_param(RnnParam kind, const Tensor& param) const {
    const RnnProblem& p = problem;
    const int64_t rows = gate_count(p.mode) * p.hidden;
    switch (kind) {
    case RnnParam::weight_ih:
      return check_rnn_shape("params: weight_ih", param, {rows, p.input});
    case RnnParam::weight_hh:
      return check_rnn_shape("params: weight_hh", param, {rows, p.outputs});
    case RnnParam::bias_ih:
    case RnnParam::bias_hh:
      return check_rnn_shape("params: bias", param, {rows});
    case RnnParam::weight_hr:
      return check_rnn_shape("params: weight_hr", param, {p.outputs, p.hidden});
    case RnnParam::weight_peephole:
      return check_rnn_shape("params: weight_peephole", param, {3, p.hidden});
    case RnnParam::norm_hidden:
      return check_rnn_shape("params: norm_hidden", param, {2, rows});
    case RnnParam::norm_cell:
      return check_rnn_shape("params: norm_cell", param, {2, p.hidden});
    }
  }

  void read_options(const CellOptions& options) {
    RnnProblem& p = problem;
    PTK_CHECK(options.eps >= 0, "packed_rnn: eps: got ", options.eps, ", expected 0 or more");
    p.eps = options.eps;
    p.zoneout[0] = options.zoneout;
    p.zoneout[1] = has_cells(p.mode) ? options.zoneout_cell : 0;
    for (int i = 0; i < 2; ++i) {
      PTK_CHECK(0 <= p.zoneout[i] && p.zoneout[i] <= 1, "packed_rnn: zoneout: got ", p.zoneout[i],
                ", expected a probability from 0 to 1");
      PTK_CHECK(p.zoneout[i] == 0 || !(p.projected || is_plain(p.mode)), "packed_rnn: zoneout: got ", p.zoneout[i],
                " for a layer without gates or with a projection, expected 0");
      p.keep_below[i] = static_cast<uint32_t>(std::nearbyint(p.zoneout[i] * (1 << 24)));
    }
    p.draws = options.seed.has_value();
    if (p.draws) {
      PTK_CHECK(options.seed->is_cpu() && shim_dtype(*options.seed) == aoti_torch_dtype_int64() &&
                    options.seed->numel() == 1,
                "packed_rnn: seed: got another tensor, expected one int64 on the CPU");
      p.seed = *static_cast<const uint64_t*>(options.seed->const_data_ptr());
    }
  }

  void read_state() {
    const RnnProblem& p = problem;
    const size_t expected = has_cells(p.mode) ? 2 : 1;
    PTK_CHECK(state.empty() || state.size() == expected, "packed_rnn: state: got ", state.size(),
              " tensors, expected none or ", expected);
    for (size_t i = 0; i < state.size(); ++i) {
      check_rnn_tensor("state", state[i], input);
      check_rnn_shape("state", state[i], state_shape(i == 0 ? p.outputs : p.hidden));
      make_contiguous(state[i]);
    }
  }

  std::span<const RnnParam> order_;
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

// Copies rows of tokens between a tensor of the user's layout and packed order, there `packed_row` elements apart.
inline void move_rows(const Sequences& sequences, const RowOffsets& offsets, void* laid_out, void* packed,
                      int64_t features, int64_t packed_row, size_t element, bool to_packed) {
  int64_t token = 0;
  const RnnRows rows = offsets.rows();
  for (size_t t = 0; t < sequences.batch_sizes.size(); ++t) {
    for (int64_t b = 0; b < sequences.batch_sizes[t]; ++b, ++token) {
      char* there = static_cast<char*>(laid_out) + rows(static_cast<int64_t>(t), b) * element;
      char* here = static_cast<char*>(packed) + token * packed_row * element;
      std::memcpy(to_packed ? here : there, to_packed ? there : here, features * element);
    }
  }
}

}  // namespace ptk
