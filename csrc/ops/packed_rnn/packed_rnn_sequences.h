// How sequences lie in the tensors of a call, read from the integers that describe them and checked against the data.
#pragma once

#include "csrc/core/checks.h"
#include "csrc/core/stable_compat.h"
#include "csrc/ops/packed_rnn/packed_rnn.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace ptk {

// packed      data [tokens, features], step after step, `sizes` = sequences running at each step (batch_sizes)
// varlen      data [tokens, features], sequence after sequence, `sizes` = where each begins, and the end (cu_seqlens)
// time_first  data [steps, batch, features], `sizes` = lengths, or none where all are full
// batch_first data [batch, steps, features]
enum class RnnLayout : uint8_t { packed, varlen, time_first, batch_first };

inline RnnLayout parse_layout(const std::string& name) {
  constexpr const char* names[] = {"packed", "varlen", "time_first", "batch_first"};
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) {
      return static_cast<RnnLayout>(i);
    }
  }
  fail("packed_rnn: layout: got '", name, "', expected packed, varlen, time_first or batch_first");
}

inline std::vector<int64_t> read_integers(const char* name, const Tensor& tensor) {
  PTK_CHECK(tensor.is_cpu() && shim_dtype(tensor) == aoti_torch_dtype_int64() && tensor.dim() == 1,
            "packed_rnn: ", name, ": got a tensor that is not a vector of int64 on the CPU, expected one");
  const auto* data = static_cast<const int64_t*>(tensor.const_data_ptr());
  std::vector<int64_t> values(tensor.size(0));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = data[static_cast<int64_t>(i) * tensor.stride(0)];
  }
  return values;
}

// Element offsets of tokens in one tensor.
struct RowOffsets {
  std::vector<int64_t> step, slot;
  RnnRows rows() const { return {step.data(), slot.data()}; }
};

class Sequences {
public:
  Sequences(const Tensor& input, const std::optional<Tensor>& sizes, const std::optional<Tensor>& sorted_indices,
            int64_t batch, RnnLayout layout)
      : layout(layout), batch(batch) {
    PTK_CHECK(batch >= 0, "packed_rnn: batch_size: got ", batch, ", expected 0 or more");
    PTK_CHECK(!sorted_indices || layout == RnnLayout::packed,
              "packed_rnn: sorted_indices: got them without packed sequences, expected None");
    const int64_t rank = is_padded() ? 3 : 2;
    PTK_CHECK(input.dim() == rank, "packed_rnn: input: got ", input.dim(), " dimensions, expected ", rank);
    order.resize(batch);
    std::iota(order.begin(), order.end(), 0);
    if (is_padded()) {
      read_lengths(input, sizes);
    } else {
      PTK_CHECK(sizes, "packed_rnn: sizes: got None, expected batch_sizes or cu_seqlens");
      layout == RnnLayout::packed ? read_batch_sizes(input, *sizes) : read_cu_seqlens(input, *sizes);
    }
    if (sorted_indices) {
      read_order(*sorted_indices);
    }
    tokens = std::accumulate(batch_sizes.begin(), batch_sizes.end(), int64_t{0});
  }

  bool is_padded() const { return layout == RnnLayout::time_first || layout == RnnLayout::batch_first; }

  // Of a tensor laid out like the input.
  RowOffsets offsets(const Tensor& tensor) const {
    RowOffsets o;
    o.step.resize(batch_sizes.size());
    o.slot.resize(batch);
    int64_t stride_step = tensor.stride(0);
    int64_t stride_slot = stride_step;
    if (is_padded()) {
      stride_slot = tensor.stride(layout == RnnLayout::batch_first ? 0 : 1);
      stride_step = tensor.stride(layout == RnnLayout::batch_first ? 1 : 0);
    }
    for (size_t t = 0, token = 0; t < o.step.size(); token += batch_sizes[t++]) {
      o.step[t] = static_cast<int64_t>(layout == RnnLayout::packed ? token : t) * stride_step;
    }
    for (int64_t b = 0; b < batch; ++b) {
      o.slot[b] = (layout == RnnLayout::packed   ? b
                   : layout == RnnLayout::varlen ? starts[order[b]]
                                                 : order[b]) *
                  stride_slot;
    }
    return o;
  }

  RnnLayout layout;
  int64_t batch, tokens = 0;
  std::vector<int64_t> batch_sizes, order, lengths, starts;  // lengths and starts by sequence, not by slot

private:
  void read_batch_sizes(const Tensor& input, const Tensor& sizes) {
    batch_sizes = read_integers("sizes", sizes);
    int64_t before = batch;
    int64_t total = 0;
    for (size_t t = 0; t < batch_sizes.size(); ++t) {
      PTK_CHECK(t > 0 || batch_sizes[t] == batch, "packed_rnn: sizes: got ", batch_sizes[t],
                " sequences at the first step, expected batch_size ", batch);
      PTK_CHECK(1 <= batch_sizes[t] && batch_sizes[t] <= before, "packed_rnn: sizes: got ", batch_sizes[t],
                " sequences at step ", t, " after ", before, ", expected 1 or more and never more than before");
      before = batch_sizes[t];
      total += before;
    }
    PTK_CHECK(total == input.size(0), "packed_rnn: sizes: got a sum of ", total, ", expected the ", input.size(0),
              " rows of input");
    PTK_CHECK(batch == 0 || !batch_sizes.empty(), "packed_rnn: sizes: got no step, expected at least one");
  }

  void read_cu_seqlens(const Tensor& input, const Tensor& sizes) {
    starts = read_integers("sizes", sizes);
    PTK_CHECK(static_cast<int64_t>(starts.size()) == batch + 1, "packed_rnn: sizes: got ", starts.size(),
              " cu_seqlens, expected batch_size + 1 = ", batch + 1);
    PTK_CHECK(starts.front() == 0 && starts.back() == input.size(0), "packed_rnn: sizes: got cu_seqlens from ",
              starts.front(), " to ", starts.back(), ", expected 0 to the ", input.size(0), " rows of input");
    for (int64_t b = 0; b < batch; ++b) {
      PTK_CHECK(starts[b] <= starts[b + 1], "packed_rnn: sizes: got cu_seqlens that decrease, expected them ascending");
      lengths.push_back(starts[b + 1] - starts[b]);
    }
    sort_by_length();
  }

  void read_lengths(const Tensor& input, const std::optional<Tensor>& sizes) {
    const int64_t steps = input.size(layout == RnnLayout::batch_first ? 1 : 0);
    const int64_t found = input.size(layout == RnnLayout::batch_first ? 0 : 1);
    PTK_CHECK(found == batch, "packed_rnn: batch_size: got ", batch, ", expected input's ", found);
    if (!sizes) {
      lengths.assign(batch, steps);
      batch_sizes.assign(batch == 0 ? 0 : steps, batch);
      return;
    }
    lengths = read_integers("sizes", *sizes);
    PTK_CHECK(static_cast<int64_t>(lengths.size()) == batch, "packed_rnn: sizes: got ", lengths.size(),
              " lengths, expected ", batch);
    for (const int64_t length : lengths) {
      PTK_CHECK(0 <= length && length <= steps, "packed_rnn: sizes: got a length of ", length, ", expected 0 to ",
                steps);
    }
    sort_by_length();
  }

  void sort_by_length() {
    std::ranges::stable_sort(order, [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    int64_t running = batch;
    for (int64_t t = 0; batch > 0 && t < lengths[order[0]]; ++t) {
      while (lengths[order[running - 1]] <= t) {
        --running;
      }
      batch_sizes.push_back(running);
    }
  }

  void read_order(const Tensor& sorted_indices) {
    order = read_integers("sorted_indices", sorted_indices);
    std::vector<bool> seen(batch);
    PTK_CHECK(static_cast<int64_t>(order.size()) == batch, "packed_rnn: sorted_indices: got ", order.size(),
              " entries, expected ", batch);
    for (const int64_t index : order) {
      PTK_CHECK(0 <= index && index < batch && !seen[index], "packed_rnn: sorted_indices: got ", index,
                " out of range or twice, expected a permutation of ", batch, " sequences");
      seen[index] = true;
    }
  }
};

}  // namespace ptk
