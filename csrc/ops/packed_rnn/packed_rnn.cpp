// Schema of the recurrent layers and their CPU implementation.
//
// The backward runs the recurrence with the kernel of the active ISA, which leaves the gradients of all gates, and then
// forms every other gradient as one product over all tokens.
#include "csrc/cpu/gemm/gemm_driver.h"
#include "csrc/ops/packed_rnn/packed_rnn_glue.h"

#include <torch/csrc/stable/library.h>

namespace ptk {
namespace {

Tensor state_like(const Layer& layer, size_t index, int64_t features) {
  Tensor out = empty_contiguous(layer.input, layer.state_shape(features), layer.problem.dtype);
  // Sequences without a token keep what they came with.
  const size_t bytes = out.numel() * element_size(layer.problem.dtype);
  if (bytes > 0 && index < layer.state.size()) {
    std::memcpy(out.mutable_data_ptr(), layer.state[index].const_data_ptr(), bytes);
  } else if (bytes > 0) {
    std::memset(out.mutable_data_ptr(), 0, bytes);
  }
  return out;
}

// Output, h_n and c_n; gates and cells are kept where there is a place for them.
std::tuple<Tensor, Tensor, Tensor> run_forward(const Layer& layer, void* gates, void* cells) {
  const RnnProblem& p = layer.problem;
  const bool is_lstm = has_cells(p.mode);
  const std::vector<int64_t> none = {0};
  Tensor output = empty_contiguous(layer.input, layer.output_shape(), p.dtype);
  Tensor h_n = state_like(layer, 0, p.outputs);
  Tensor c_n = is_lstm ? state_like(layer, 1, p.hidden) : empty_contiguous(layer.input, none, p.dtype);
  zero_padding(layer.sequences, output);
  if (p.tokens > 0) {
    const RowOffsets input_rows = layer.sequences.offsets(layer.input);
    const RowOffsets output_rows = layer.sequences.offsets(output);
    RnnForwardParams f;
    f.problem = p;
    f.batch_sizes = layer.sequences.batch_sizes.data();
    f.order = layer.sequences.order.data();
    layer.fill_weights(f.weights);
    f.input = layer.input.const_data_ptr();
    f.input_rows = input_rows.rows();
    f.output = output.mutable_data_ptr();
    f.output_rows = output_rows.rows();
    f.h0 = layer.state_data(0);
    f.c0 = layer.state_data(1);
    f.h_n = h_n.mutable_data_ptr();
    f.c_n = is_lstm ? c_n.mutable_data_ptr() : nullptr;
    f.gates = gates;
    f.cells = cells;
    PTK_CHECK(PTK_DISPATCH(packed_rnn_kernels).forward(f), "packed_rnn: out of memory");
  }
  return {output, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
packed_rnn(Tensor input, std::optional<Tensor> sizes, std::optional<Tensor> sorted_indices, std::vector<Tensor> state,
           std::vector<Tensor> params, int64_t batch_size, Text layout, Text mode, bool bidirectional, bool save,
           bool /*recompute*/, bool all_cells, double eps, double zoneout, double zoneout_cell,
           std::optional<Tensor> seed) {
  const Layer layer(input, sizes, sorted_indices, std::move(state), std::move(params), batch_size, layout, mode,
                    bidirectional, all_cells, {eps, zoneout, zoneout_cell, seed});
  const RnnProblem& p = layer.problem;
  const std::vector<int64_t> none = {0};
  const bool save_gates = save && saved_gates(p.mode) > 0, save_sums = save && layer.saves_sums();
  Tensor gates = empty_contiguous(layer.input, save_gates ? layer.gates_shape() : none, p.dtype);
  Tensor cells = empty_contiguous(layer.input, save_sums ? layer.cells_shape() : none, sum_dtype(p.dtype));
  zero_unused(layer, gates);
  zero_unused(layer, cells);
  auto [output, h_n, c_n] = run_forward(layer, save_gates ? gates.mutable_data_ptr() : nullptr,
                                        save_sums ? cells.mutable_data_ptr() : nullptr);
  return {output, h_n, c_n, gates, cells};
}

// C[m, n] = A^T B over `tokens` rows, in the storage type.
void product(GemmProblem g) {
  PTK_CHECK(PTK_DISPATCH(gemm_kernels).gemm(g), "packed_rnn: out of memory");
}

GemmType gemm_type(DType dtype) {
  return static_cast<GemmType>(dtype);
}

char* offset(const void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(const_cast<void*>(data)) + elements * static_cast<int64_t>(element_size(dtype));
}

class Backward {
public:
  Backward(const Layer& layer, const Tensor& output, const Tensor& gates, const Tensor& cells,
           const std::vector<bool>& wanted)
      : layer_(layer), p_(layer.problem), output_(output), gates_(gates), cells_(cells) {
    PTK_CHECK(wanted.size() == 1 + layer.state.size() + layer.params.size(), "packed_rnn: output_mask: got ",
              wanted.size(), " entries, expected one for input, each state and each parameter");
    allocate(wanted[0], layer.input.sizes());
    for (size_t i = 0; i < layer.state.size(); ++i) {
      allocate(wanted[1 + i], layer.state[i].sizes());
    }
    for (size_t i = 0; i < layer.params.size(); ++i) {
      allocate(wanted[1 + layer.state.size() + i], layer.params[i].sizes());
    }
  }

  std::vector<Tensor> run(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
                          const std::optional<Tensor>& grad_c_n) {
    if (p_.tokens == 0) {
      for (std::optional<Tensor>& grad : grads_) {
        if (grad) {
          torch::stable::zero_(*grad);
        }
      }
      copy_state_gradient(0, grad_h_n);
      copy_state_gradient(1, grad_c_n);
    } else {
      recurrence(grad_output, grad_h_n, grad_c_n);
      for (int64_t d = 0; d < p_.directions; ++d) {
        weight_gradients(d);
      }
      input_gradient();
    }
    std::vector<Tensor> given;
    for (const std::optional<Tensor>& grad : grads_) {
      if (grad) {
        given.push_back(*grad);
      }
    }
    return given;
  }

private:
  void allocate(bool wanted, const auto& sizes) {
    grads_.push_back(wanted ? std::optional(empty_contiguous(
                                  layer_.input, std::vector<int64_t>(sizes.begin(), sizes.end()), p_.dtype))
                            : std::nullopt);
  }

  void copy_state_gradient(size_t index, const std::optional<Tensor>& grad) {
    if (index < layer_.state.size() && grads_[1 + index] && grad) {
      torch::stable::copy_(*grads_[1 + index], *grad);
    }
  }

  // Null where the layer has no such parameter, or its gradient is not wanted.
  void* param_gradient(int64_t direction, RnnParam kind) {
    const int64_t index = layer_.param_index(direction, kind);
    return index < 0 ? nullptr : data_of(grads_[1 + layer_.state.size() + index]);
  }

  int64_t row_of_gradients() const { return gate_gradients(p_.mode) * p_.hidden; }

  static void* data_of(std::optional<Tensor>& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

  void recurrence(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
                  const std::optional<Tensor>& grad_c_n) {
    const Sequences& sequences = layer_.sequences;
    const RowOffsets output_rows = sequences.offsets(output_);
    grad_gates_ = empty_contiguous(layer_.input, {p_.directions, p_.tokens, row_of_gradients()}, p_.dtype);
    const auto only_if = [&](bool there, int64_t features) {
      return empty_contiguous(layer_.input, {p_.directions, there ? p_.tokens : 0, features}, p_.dtype);
    };
    const bool multiplies = p_.projected || p_.mode == RnnMode::reset_before_gru;
    grad_projected_ = only_if(p_.projected, p_.outputs);
    multiplied_ = only_if(multiplies, p_.hidden);
    RnnBackwardParams f;
    f.problem = p_;
    f.batch_sizes = sequences.batch_sizes.data();
    f.order = sequences.order.data();
    layer_.fill_weights(f.weights);
    f.output = output_.const_data_ptr();
    f.grad_output = grad_output ? grad_output->const_data_ptr() : nullptr;
    f.output_rows = output_rows.rows();
    f.h0 = layer_.state_data(0);
    f.c0 = layer_.state_data(1);
    f.gates = gates_.const_data_ptr();
    f.cells = cells_.const_data_ptr();
    f.grad_h_n = grad_h_n ? grad_h_n->const_data_ptr() : nullptr;
    f.grad_c_n = grad_c_n ? grad_c_n->const_data_ptr() : nullptr;
    f.grad_gates = grad_gates_->mutable_data_ptr();
    f.grad_projected = p_.projected ? grad_projected_->mutable_data_ptr() : nullptr;
    f.multiplied = multiplies ? multiplied_->mutable_data_ptr() : nullptr;
    for (int64_t d = 0; d < p_.directions; ++d) {
      f.grad_bias_input[d] = param_gradient(d, RnnParam::bias_ih);
      f.grad_bias_hidden[d] = param_gradient(d, RnnParam::bias_hh);
      f.grad_peephole[d] = param_gradient(d, RnnParam::weight_peephole);
      f.grad_norm_hidden[d] = param_gradient(d, RnnParam::norm_hidden);
      f.grad_norm_cell[d] = param_gradient(d, RnnParam::norm_cell);
    }
    f.grad_h0 = layer_.state.empty() ? nullptr : data_of(grads_[1]);
    f.grad_c0 = layer_.state.size() < 2 ? nullptr : data_of(grads_[2]);
    PTK_CHECK(PTK_DISPATCH(packed_rnn_kernels).backward(f), "packed_rnn: out of memory");
  }

  // grad [rows of `a`'s columns, n] = a^T b, both [tokens, ..] with the given row lengths.
  void over_tokens(const void* a, int64_t row_a, int64_t m, const void* b, int64_t row_b, int64_t n, void* grad) const {
    product({gemm_type(p_.dtype), 1, m, n, p_.tokens, a, {0, 1, row_a}, b, {0, row_b, 1}, nullptr, false, grad});
  }

  // Inputs in packed order; the tensor itself where it is in that order.
  const Tensor& packed_input() {
    if (layer_.sequences.layout == RnnLayout::packed) {
      return layer_.input;
    }
    if (!packed_input_) {
      packed_input_ = empty_contiguous(layer_.input, {p_.tokens, p_.input}, p_.dtype);
      const RowOffsets rows = layer_.sequences.offsets(layer_.input);
      move_rows(layer_.sequences, rows, const_cast<void*>(layer_.input.const_data_ptr()),
                packed_input_->mutable_data_ptr(), p_.input, p_.input, element_size(p_.dtype), true);
    }
    return *packed_input_;
  }

  // h that each token's step started from, in packed order.
  Tensor h_before(int64_t d) const {
    Tensor before = empty_contiguous(layer_.input, {p_.tokens, p_.outputs}, p_.dtype);
    const Sequences& s = layer_.sequences;
    const RowOffsets offsets = s.offsets(output_);
    const RnnRows rows = offsets.rows();
    const size_t bytes = p_.outputs * element_size(p_.dtype);
    auto* to = static_cast<char*>(before.mutable_data_ptr());
    for (int64_t t = 0; t < p_.steps; ++t) {
      const int64_t source = d == 0 ? t - 1 : t + 1;
      for (int64_t b = 0; b < s.batch_sizes[t]; ++b, to += bytes) {
        if (source >= 0 && source < p_.steps && b < s.batch_sizes[source]) {
          std::memcpy(to, offset(output_.const_data_ptr(), rows(source, b) + d * p_.outputs, p_.dtype), bytes);
        } else if (layer_.state.empty()) {
          std::memset(to, 0, bytes);
        } else {
          std::memcpy(to, offset(layer_.state_data(0), (d * p_.batch + s.order[b]) * p_.outputs, p_.dtype), bytes);
        }
      }
    }
    return before;
  }

  const void* multiplied(int64_t d) const {
    return offset(multiplied_->const_data_ptr(), d * p_.tokens * p_.hidden, p_.dtype);
  }

  void weight_gradients(int64_t d) {
    const int64_t row = row_of_gradients(), gates = gate_count(p_.mode) * p_.hidden;
    const void* grad_gates = offset(grad_gates_->const_data_ptr(), d * p_.tokens * row, p_.dtype);
    if (void* grad = param_gradient(d, RnnParam::weight_ih)) {
      const Tensor& x = packed_input();
      over_tokens(grad_gates, row, gates, x.const_data_ptr(), x.stride(0), p_.input, grad);
    }
    if (void* grad = param_gradient(d, RnnParam::weight_hh)) {
      const Tensor before = h_before(d);
      const void* h = before.const_data_ptr();
      const auto product = [&](int64_t gate, int64_t count, int64_t to, const void* state) {
        over_tokens(offset(grad_gates, gate * p_.hidden, p_.dtype), row, count * p_.hidden, state, p_.outputs,
                    p_.outputs, offset(grad, to * p_.hidden * p_.outputs, p_.dtype));
      };
      if (p_.mode == RnnMode::gru) {
        // n: its recurrent term has a gradient of its own, the fourth.
        product(0, 2, 0, h);
        product(3, 1, 2, h);
      } else if (p_.mode == RnnMode::reset_before_gru) {
        product(0, 2, 0, h);
        product(2, 1, 2, multiplied(d));
      } else {
        product(is_normalised(p_.mode) ? gate_count(p_.mode) : 0, gate_count(p_.mode), 0, h);
      }
    }
    if (void* grad = param_gradient(d, RnnParam::weight_hr)) {
      over_tokens(offset(grad_projected_->const_data_ptr(), d * p_.tokens * p_.outputs, p_.dtype), p_.outputs,
                  p_.outputs, multiplied(d), p_.hidden, p_.hidden, grad);
    }
  }

  // Of the products that came in the input's place: the gates' own gradients, both directions side by side.
  void product_gradient() {
    const int64_t row = row_of_gradients(), gates = gate_count(p_.mode) * p_.hidden;
    const RowOffsets offsets = layer_.sequences.offsets(*grads_[0]);
    zero_padding(layer_.sequences, *grads_[0]);
    for (int64_t d = 0; d < p_.directions; ++d) {
      move_rows(layer_.sequences, offsets, offset(grads_[0]->mutable_data_ptr(), d * gates, p_.dtype),
                offset(grad_gates_->mutable_data_ptr(), d * p_.tokens * row, p_.dtype), gates, row,
                element_size(p_.dtype), false);
    }
  }

  void input_gradient() {
    if (!grads_[0]) {
      return;
    }
    if (is_normalised(p_.mode)) {
      return product_gradient();
    }
    const int64_t row = row_of_gradients(), gates = gate_count(p_.mode) * p_.hidden;
    Tensor weights = layer_.params[layer_.param_index(0, RnnParam::weight_ih)];
    if (p_.directions == 2) {
      weights = empty_contiguous(layer_.input, {2, gates, p_.input}, p_.dtype);
      for (int64_t d = 0; d < 2; ++d) {
        std::memcpy(offset(weights.mutable_data_ptr(), d * gates * p_.input, p_.dtype),
                    layer_.param_data(d, RnnParam::weight_ih), gates * p_.input * element_size(p_.dtype));
      }
    }
    const bool in_place = layer_.sequences.layout == RnnLayout::packed;
    Tensor grad = in_place ? *grads_[0] : empty_contiguous(layer_.input, {p_.tokens, p_.input}, p_.dtype);
    product({gemm_type(p_.dtype),
             p_.directions,
             p_.tokens,
             p_.input,
             gates,
             grad_gates_->const_data_ptr(),
             {p_.tokens * row, row, 1},
             weights.const_data_ptr(),
             {gates * p_.input, p_.input, 1},
             nullptr,
             false,
             grad.mutable_data_ptr()});
    if (!in_place) {
      zero_padding(layer_.sequences, *grads_[0]);
      move_rows(layer_.sequences, layer_.sequences.offsets(*grads_[0]), grads_[0]->mutable_data_ptr(),
                grad.mutable_data_ptr(), p_.input, p_.input, element_size(p_.dtype), false);
    }
  }

  const Layer& layer_;
  const RnnProblem& p_;
  const Tensor &output_, &gates_, &cells_;
  std::vector<std::optional<Tensor>> grads_;  // of input, states, parameters; set where wanted
  std::optional<Tensor> grad_gates_, grad_projected_, multiplied_, packed_input_;
};

std::vector<Tensor> packed_rnn_backward(std::optional<Tensor> grad_output, std::optional<Tensor> grad_h_n,
                                        std::optional<Tensor> grad_c_n, Tensor input, std::optional<Tensor> sizes,
                                        std::optional<Tensor> sorted_indices, std::vector<Tensor> state,
                                        std::vector<Tensor> params, Tensor output, Tensor gates, Tensor cells,
                                        int64_t batch_size, Text layout, Text mode, bool bidirectional,
                                        std::vector<bool> output_mask, bool all_cells, double eps, double zoneout,
                                        double zoneout_cell, std::optional<Tensor> seed) {
  const Layer layer(input, sizes, sorted_indices, std::move(state), std::move(params), batch_size, layout, mode,
                    bidirectional, all_cells, {eps, zoneout, zoneout_cell, seed});
  const RnnProblem& p = layer.problem;
  const auto check = [&](const char* name, std::optional<Tensor>& tensor, const std::vector<int64_t>& shape) {
    if (tensor) {
      check_rnn_tensor(name, *tensor, layer.input);
      check_rnn_shape(name, *tensor, shape);
      tensor = as_contiguous(*tensor);
    }
  };
  PTK_CHECK(!grad_c_n || has_cells(p.mode), "packed_rnn: grad_c_n: got one, expected None without cells");
  check("grad_output", grad_output, layer.output_shape());
  check("grad_h_n", grad_h_n, layer.state_shape(p.outputs));
  check("grad_c_n", grad_c_n, layer.state_shape(p.hidden));
  check_rnn_tensor("output", output, layer.input);
  check_rnn_shape("output", output, layer.output_shape());
  if (saved_gates(p.mode) > 0) {
    check_rnn_tensor("gates", gates, layer.input);
    check_rnn_shape("gates", gates, layer.gates_shape());
  }
  if (layer.saves_sums()) {
    PTK_CHECK(cells.is_cpu() && float_dtype(cells) == sum_dtype(p.dtype),
              "packed_rnn: cells: got another dtype, expected ", dtype_name(sum_dtype(p.dtype)));
    check_rnn_shape("cells", cells, layer.cells_shape());
  }
  output = as_contiguous(output);
  gates = as_contiguous(gates);
  cells = as_contiguous(cells);
  return Backward(layer, output, gates, cells, output_mask).run(grad_output, grad_h_n, grad_c_n);
}

}  // namespace

const char* packed_rnn_kernel_name(const RnnProblem& problem) {
  return PTK_DISPATCH(packed_rnn_kernels).describe(problem);
}

}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def(
      "packed_rnn(Tensor input, Tensor? sizes, Tensor? sorted_indices, Tensor[] state, Tensor[] params, "
      "SymInt batch_size, str layout, str mode, bool bidirectional=False, bool save=False, bool recompute=False, "
      "bool all_cells=False, float eps=1e-05, float zoneout=0.0, float zoneout_cell=0.0, Tensor? seed=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("_packed_rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
              "Tensor? sizes, Tensor? sorted_indices, Tensor[] state, Tensor[] params, Tensor output, Tensor gates, "
              "Tensor cells, SymInt batch_size, str layout, str mode, bool bidirectional, bool[] output_mask, "
              "bool all_cells=False, float eps=1e-05, float zoneout=0.0, float zoneout_cell=0.0, Tensor? seed=None) "
              "-> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("packed_rnn", TORCH_BOX(&ptk::packed_rnn));
  library.impl("_packed_rnn_backward", TORCH_BOX(&ptk::packed_rnn_backward));
}
