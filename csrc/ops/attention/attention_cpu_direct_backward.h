// Backward on the CPU for few queries (training on a short continuation, distillation step by step): keys and values
// are read once, in place, their gradients written once.
//
//   equation   as in attention_cpu_backward.h
//
//   tiling     chunks of kChunk keys: S = Q K^T and dP = dO V^T by attention_cpu_stored_rows.h, then dS, then dQ += dS
//   K by
//              the same, and rows of dK and dV as sums over the few rows of Q and dO, which stay in L1
//
//   threads    every (batch, kv head, chunk) is an item of its own, which owns its rows of dK and dV; dQ of the chunks
//   is
//              added in the order of the keys, so results do not depend on the number of threads
#pragma once

#include "attention_cpu_backward.h"
#include "attention_cpu_direct.h"

namespace ptk::PTK_ISA {

template <class T>
class DirectBackward {
  using A = Acc<T>;
  using Stored = StoredRows<T>;

public:
  // Few rows, contiguous keys and values, nothing that needs gradients of the scores themselves; and rows whose weights
  // need not be summed again, see TiledBackward::weigh_rows.
  static bool suits(const BackwardParams& b) {
    const Problem& p = b.problem;
    const bool adds = b.grad_mask.data || b.grad_alibi.data || b.grad_relative.data || b.grad_sinks.data;
    if (!DirectForward<T>::suits(p) || adds || p.softcap != 0 || p.seeds) return false;
    if (b.key.strides[3] != 1 || b.value.strides[3] != 1) return false;
    const A* lse = static_cast<const A*>(b.lse);
    const int64_t rows = p.heads_q * (p.first_q ? p.total_q : p.batch * p.len_q);
    for (int64_t i = 0; i < rows; ++i)
      if (is_far(lse[i])) return false;
    return true;
  }

  explicit DirectBackward(const BackwardParams& params)
      : b_(params), p_(params.problem), scores_{p_.dim_qk, p_.dim_v, kLds, 0},
        weights_{p_.dim_v, p_.dim_qk, kLds, round_up(p_.dim_qk, Stored::kStep)},
        chunks_(most(1, (p_.len_k + kChunk - 1) / kChunk)) {}

  // False when memory ran out.
  bool run() {
    const int64_t heads = p_.batch * p_.heads_kv, items = heads * chunks_;
    A* dq = nullptr;
    if (b_.grad_query.data) {
      dq = static_cast<A*>(__builtin_malloc(items * max_rows() * weights_.ld_out * sizeof(A)));
      if (!dq) return false;
    }
    const int64_t work = items * max_rows() * least(kChunk, p_.len_k) * (p_.dim_qk + p_.dim_v);
    bool ok = true;
    const auto item = [&](int64_t i) {
      if (!run_chunk(i / chunks_, i % chunks_, dq ? dq + i * max_rows() * weights_.ld_out : nullptr))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    };
    if (work < kParallelWork) {
      for (int64_t i = 0; i < items; ++i) item(i);
    } else {
      parallel_items(items, item);
    }
    for (int64_t head = 0; ok && dq && head < heads; ++head)
      write_queries(head, dq + head * chunks_ * max_rows() * weights_.ld_out);
    __builtin_free(dq);
    return ok;
  }

private:
  static constexpr int64_t kChunk = 256, kLds = kChunk + 64;
  static constexpr int64_t kParallelWork = 1 << 16;

  int64_t max_rows() const { return p_.heads_q / p_.heads_kv * p_.len_q; }
  int64_t ld_q() const { return scores_.ld_q(); }
  int64_t ld_o() const { return weights_.ld_q(); }

  struct Scratch {
    A *q, *d_o, *q_pairs, *do_pairs;  // in the order of memory, and of pairs
    A *lse, *delta, *out;
    A *prob, *ds;
    const T **keys, **values;
  };

  Scratch carve(Carver& c) const {
    Scratch s;
    s.q = c.take<A>(max_rows() * ld_q());
    s.d_o = c.take<A>(max_rows() * ld_o());
    s.q_pairs = c.take<A>(max_rows() * ld_q());
    s.do_pairs = c.take<A>(max_rows() * ld_o());
    s.lse = c.take<A>(max_rows());
    s.delta = c.take<A>(max_rows());
    s.out = c.take<A>(ld_o());
    s.prob = c.take<A>(max_rows() * kLds);
    s.ds = c.take<A>(max_rows() * kLds);
    s.keys = c.take<const T*>(kChunk + Stored::kBlock);
    s.values = c.take<const T*>(kChunk + Stored::kBlock);
    return s;
  }

  bool run_chunk(int64_t head_kv, int64_t chunk, A* dq) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    const FewRows rows = FewRows::of(p_, head_kv);
    const Sequence& seq = rows.seq;
    const int64_t first = chunk * kChunk, last = least(seq.len_k, first + kChunk);
    // What any row sees of the chunk.
    const int64_t begin = rows.count ? least(last, most(first, seq.first_key(0))) : least(first, last);
    const int64_t end = rows.count ? most(begin, least(last, seq.end_key(seq.len_q - 1))) : begin, keys = end - begin;
    const int64_t head = head_kv % p_.heads_kv;
    clear(b_.grad_key, seq, head, first, begin, p_.dim_qk);
    clear(b_.grad_value, seq, head, first, begin, p_.dim_v);
    clear(b_.grad_key, seq, head, end, last, p_.dim_qk);
    clear(b_.grad_value, seq, head, end, last, p_.dim_v);
    if (keys <= 0) {
      if (dq) std::memset(dq, 0, max_rows() * weights_.ld_out * sizeof(A));
      return true;
    }
    for (int64_t r = 0; r < rows.count; ++r) load_rows(s, rows, r);
    list_rows(head_of<T>(b_.key, seq.batch, head, seq.first_k + begin), keys, s.keys);
    list_rows(head_of<T>(b_.value, seq.batch, head, seq.first_k + begin), keys, s.values);
    Stored::look_ahead(s.keys, s.values, keys);
    scores_.score(s.q_pairs, rows.count, s.keys, keys, s.prob);
    weights_.score(s.do_pairs, rows.count, s.values, keys, s.ds);
    for (int64_t r = 0; r < rows.count; ++r) differentiate(s, rows, r, begin, keys);
    if (dq) weights_.weigh(s.ds, rows.count, s.keys, keys, dq);
    if (b_.grad_key.data)
      write_sums(s.ds, rows.count, s.q, ld_q(), keys, head_of<T>(b_.grad_key, seq.batch, head, seq.first_k + begin),
                 p_.dim_qk);
    if (b_.grad_value.data)
      write_sums(s.prob, rows.count, s.d_o, ld_o(), keys,
                 head_of<T>(b_.grad_value, seq.batch, head, seq.first_k + begin), p_.dim_v);
    return true;
  }

  static void clear(const View& view, const Sequence& seq, int64_t head, int64_t begin, int64_t end, int64_t dim) {
    if (!view.data) return;
    const auto rows = head_of<T>(view, seq.batch, head, seq.first_k);
    for (int64_t j = begin; j < end; ++j) std::memset(rows.row(j), 0, dim * sizeof(T));
  }

  void load_rows(const Scratch& s, const FewRows& rows, int64_t r) const {
    const Sequence& seq = rows.seq;
    const int64_t head = rows.head(r), i = rows.position(r), offset = lse_offset(p_, seq, head) + i;
    A *q = s.q + r * ld_q(), *d_o = s.d_o + r * ld_o();
    std::memset(q, 0, ld_q() * sizeof(A));
    std::memset(d_o, 0, ld_o() * sizeof(A));
    widen_row(head_of<T>(b_.query, seq.batch, head, seq.first_q), i, p_.dim_qk, static_cast<A>(p_.scale), q);
    widen_row(head_of<T>(b_.grad_out, seq.batch, head, seq.first_q), i, p_.dim_v, A(1), d_o);
    widen_row(head_of<T>(b_.out, seq.batch, head, seq.first_q), i, p_.dim_v, A(1), s.out);
    Stored::to_pairs(q, p_.dim_qk, s.q_pairs + r * ld_q());
    Stored::to_pairs(d_o, p_.dim_v, s.do_pairs + r * ld_o());
    const A lse = static_cast<const A*>(b_.lse)[offset];
    A delta = b_.grad_lse ? -static_cast<const A*>(b_.grad_lse)[offset] : A(0);
    for (int64_t d = 0; d < p_.dim_v; ++d) delta += d_o[d] * s.out[d];
    // A row without keys has probabilities 2^(-inf) = 0.
    const bool is_empty = lse == -static_cast<A>(__builtin_inf());
    s.lse[r] = is_empty ? -lse : lse;
    s.delta[r] = is_empty ? 0 : delta;
  }

  // Products of row r become its probabilities and the gradients of its scores, 0 where it does not see the key.
  void differentiate(const Scratch& s, const FewRows& rows, int64_t r, int64_t k0, int64_t keys) const {
    A *prob = s.prob + r * kLds, *ds = s.ds + r * kLds;
    const int64_t i = rows.position(r);
    if (has_shaped_scores(p_)) shape_rows<T>(p_, rows.seq, rows.head(r), prob, kLds, i, 1, k0, keys, A(1));
    for (int64_t j = 0; j < keys; j += kLanes<A>) {
      const Vec<A> p = exp2((load(prob + j) - s.lse[r]) * static_cast<A>(kLog2E));
      store(prob + j, p);
      store(ds + j, p * (load(ds + j) - s.delta[r]));
    }
    const int64_t hidden = least(keys, most(0, rows.seq.first_key(i) - k0));
    const int64_t seen = most(hidden, least(keys, rows.seq.end_key(i) - k0));
    for (A* row : {prob, ds}) {
      for (int64_t j = 0; j < hidden; ++j) row[j] = 0;
      for (int64_t j = seen; j < keys; ++j) row[j] = 0;
    }
  }

  // to[j] = sum over r of weights[r][j] rows[r], four keys for every row that is loaded.
  static void write_sums(const A* weights, int64_t count, const A* rows, int64_t ld, int64_t keys, HeadView<T> to,
                         int64_t dim) {
    constexpr int kTogether = 4;
    for (int64_t j = 0; j < keys; j += kTogether) {
      for (int64_t d = 0; d < dim; d += kLanes<A>) {
        Vec<A> sum[kTogether] = {};
        for (int64_t r = 0; r < count; ++r) {
          const Vec<A> row = load(rows + r * ld + d);
#pragma GCC unroll 4
          for (int i = 0; i < kTogether; ++i) sum[i] += weights[r * kLds + j + i] * row;
        }
        for (int64_t i = 0; i < least(kTogether, keys - j); ++i) store_as_partial(to.row(j + i) + d, sum[i], dim - d);
      }
    }
  }

  void write_queries(int64_t head_kv, A* parts) const {
    const FewRows rows = FewRows::of(p_, head_kv);
    const int64_t part = max_rows() * weights_.ld_out;
    for (int64_t r = 0; r < rows.count; ++r) {
      A* sum = parts + r * weights_.ld_out;
      for (int64_t chunk = 1; chunk < chunks_; ++chunk)
        for (int64_t d = 0; d < weights_.ld_out; d += kLanes<A>)
          store(sum + d, load(sum + d) + load(sum + chunk * part + d));
      alignas(64) A row[round_up(512, Stored::kStep)];
      Stored::from_pairs(sum, p_.dim_qk, row);
      T* to = head_of<T>(b_.grad_query, rows.seq.batch, rows.head(r), rows.seq.first_q).row(rows.position(r));
      for (int64_t d = 0; d < p_.dim_qk; d += kLanes<A>)
        store_as_partial(to + d, load(row + d) * static_cast<A>(p_.scale), p_.dim_qk - d);
    }
  }

  const BackwardParams& b_;
  const Problem& p_;
  const Stored scores_, weights_;  // the second with values in the place of keys, and keys in that of values
  const int64_t chunks_;
};

}  // namespace ptk::PTK_ISA
