// Where the batch invariant forward gets its rows from: tensors of attention (attention_cpu_invariant.h) or the pages
// of a cache (csrc/ops/attention_kv_cache/kv_cache_cpu_invariant.h).
#pragma once

#include "attention_cpu_common.h"

namespace ptk::PTK_ISA {

// Keys of one block. Blocks begin at multiples of it, counted from the first key of a sequence.
inline constexpr int64_t kInvariantKeys = 256;

template <class T>
class InvariantRows {
public:
  using A = Acc<T>;
  using E = Element<T>;
  static constexpr int64_t kNr = GemmTraits<T>::kNr;
  static constexpr int64_t kValuePanel = kInvariantKeys * kNr;

  virtual Sequence sequence(int64_t batch) const = 0;
  // Rows `first` and following of a query head as the engine's A, `ld` apart.
  virtual void load_queries(const Sequence& seq, int64_t head, int64_t first, int64_t rows, E* to,
                            int64_t ld) const = 0;
  // Keys k0.. of a sequence as the engine's B. `gathered` has room for kInvariantKeys rows of gathered_row().
  virtual void pack_keys(const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, E* gathered, E* to) const = 0;
  // Values likewise, panels kValuePanel apart.
  virtual void pack_values(const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, E* gathered,
                           E* to) const = 0;
  virtual int64_t gathered_row() const { return 0; }

  // What a stored code counts for, where keys and values are codes: products and probabilities are multiplied with it.
  virtual bool has_key_scales() const { return false; }
  virtual bool has_value_scales() const { return false; }
  virtual void scale_keys(const Sequence&, int64_t, int64_t, int64_t, A*) const {}
  virtual void scale_values(const Sequence&, int64_t, int64_t, int64_t, A*) const {}

protected:
  ~InvariantRows() = default;

  template <class Source>
  static void pack_value_panels(const Source* value, int64_t stride_row, int64_t stride_dim, int64_t keys, int64_t dim,
                                E* to) {
    // Rows that are gathered are elements already; the panels of an element type are those of the types packed to it.
    for (int64_t n0 = 0; n0 < dim; n0 += kNr)
      pack_b_panel<Source>(value + n0 * stride_dim, stride_row, stride_dim, keys, least(kNr, dim - n0),
                           to + n0 / kNr * kValuePanel, padded_k<T>(keys));
  }
};

// The forward that keeps its promise by being the only code that computes a row: both operators call it here.
// False when memory ran out. Defined at the levels whose kernels for T are their own.
template <class T>
bool attend_invariantly(const Problem& problem, const InvariantRows<T>& rows, const View& out, void* lse);

}  // namespace ptk::PTK_ISA
