// Attention with a cache under batch invariance: slots and rotated queries as rows for the kernel that attention itself
// runs then (csrc/ops/attention/attention_cpu_invariant.h). Key 0 of a sequence is its first slot behind the padding.
// Rotated queries are rounded to their dtype, as they are where another operator rotates them.
#pragma once

#include "csrc/ops/attention/attention_cpu_invariant_rows.h"
#include "kv_cache_cpu_tiled.h"

namespace ptk::PTK_ISA {

template <class T>
class InvariantAttend final : InvariantRows<T> {
  using Base = InvariantRows<T>;
  using A = Acc<T>;
  using E = Element<T>;

public:
  explicit InvariantAttend(const KvCacheParams& params) : p_(params) {
    problem_.dtype = p_.dtype;
    problem_.batch = p_.batch;
    problem_.heads_q = p_.heads_q;
    problem_.heads_kv = p_.heads_kv;
    problem_.len_q = p_.len_q;
    problem_.dim_qk = p_.dim_qk;
    problem_.dim_v = p_.dim_v;
    problem_.scale = p_.scale;
    problem_.softcap = p_.softcap;
    problem_.is_causal = p_.is_causal;
    problem_.left = p_.window_left < 0 ? kUnbounded : least(kUnbounded, p_.window_left);
    problem_.right = p_.window_right < 0 ? kUnbounded : least(kUnbounded, p_.window_right);
  }

  // False when memory ran out.
  bool run() {
    const int64_t slopes = p_.alibi ? p_.batch * p_.heads_q : 0, sinks = p_.sinks ? p_.heads_q : 0;
    A* values = static_cast<A*>(__builtin_malloc(most(slopes + sinks, 1) * sizeof(A)));
    if (!values) return false;
    for (int64_t i = 0; i < slopes; ++i)
      values[i] = p_.alibi[i / p_.heads_q * p_.alibi_strides[0] + i % p_.heads_q * p_.alibi_strides[1]];
    for (int64_t i = 0; i < sinks; ++i) values[slopes + i] = p_.sinks[i * p_.sinks_stride];
    if (p_.alibi) problem_.alibi = {values, {p_.heads_q, 1}};
    if (p_.sinks) problem_.sinks = {values + slopes, {0, 1}};
    const bool ok = attend_invariantly<T>(problem_, *this, p_.out, p_.lse);
    __builtin_free(values);
    return ok;
  }

private:
  Sequence sequence(int64_t batch) const override {
    const int64_t keys = p_.total[batch] - p_.leftpad[batch];
    Sequence seq{batch, 0, p_.len_q, 0, keys, keys - p_.len_q, 0, 0};
    seq.low = seq.diagonal - problem_.left;
    seq.high = seq.diagonal + (p_.is_causal ? 0 : problem_.right);
    return seq;
  }

  void load_queries(const Sequence& seq, int64_t head, int64_t first, int64_t rows, E* to, int64_t ld) const override {
    A scratch[Rotation<A>::kScratch], row[kRow];
    T rounded[kRow];
    Rotation<A> rotation(p_.rotary, scratch);
    for (int64_t i = 0; i < rows; ++i) {
      read_query(p_, seq.batch, head, first + i, rotation, row);
      for (int64_t d = 0; d < p_.dim_qk; d += kLanes<A>) store_as(rounded + d, load(row + d));
      pack_row(rounded, 1, p_.dim_qk, padded_k<T>(p_.dim_qk), to + i * ld);
    }
  }

  void pack_keys(const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, E* gathered, E* to) const override {
    const auto pack = [&](const auto* rows, int64_t stride) {
      using Stored = std::remove_cv_t<std::remove_pointer_t<decltype(rows)>>;
      pack_b<Stored>(rows, 1, stride, p_.dim_qk, keys, to, padded_k<T>(p_.dim_qk));
    };
    with_rows(p_.key, seq, head_kv, k0, keys, p_.dim_qk, gathered, pack);
  }

  void pack_values(const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, E* gathered, E* to) const override {
    const auto pack = [&](const auto* rows, int64_t stride) {
      Base::pack_value_panels(rows, stride, 1, keys, p_.dim_v, to);
    };
    with_rows(p_.value, seq, head_kv, k0, keys, p_.dim_v, gathered, pack);
  }

  int64_t gathered_row() const override { return gathered_row_of(p_); }

  bool has_key_scales() const override { return p_.key_scale.data; }
  bool has_value_scales() const override { return p_.value_scale.data; }
  void scale_keys(const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, A* scores) const override {
    const int64_t slot = p_.leftpad[seq.batch] + k0;
    multiply_scales(p_, p_.key_scale, seq.batch, head_kv, slot, slot + keys, scores);
  }
  void scale_values(const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, A* prob) const override {
    const int64_t slot = p_.leftpad[seq.batch] + k0;
    multiply_scales(p_, p_.value_scale, seq.batch, head_kv, slot, slot + keys, prob);
  }

  static constexpr int64_t kRow = 512 + 64;

  // Calls pack(first row, stride): in place where the rows lie in one page as the queries' type.
  template <class Pack>
  void with_rows(const CacheView& view, const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, int64_t dim,
                 E* gathered, const Pack& pack) const {
    const int64_t slot = p_.leftpad[seq.batch] + k0, inside = slot % p_.page;
    if (p_.cache_type == CacheType::as_query && inside + keys <= p_.page) {
      const auto rows = rows_of<const T>(p_, view, seq.batch, head_kv);
      return pack(rows.data + rows.blocks[slot / p_.page] * rows.stride_block + inside * rows.stride_slot,
                  rows.stride_slot);
    }
    gather_slots(p_, view, seq.batch, head_kv, slot, slot + keys, dim, gathered);
    pack(static_cast<const E*>(gathered), gathered_row_of(p_));
  }

  const KvCacheParams& p_;
  Problem problem_;
};

}  // namespace ptk::PTK_ISA
