// Forward on the CPU for few queries (decoding): keys and values are read once, in place, never packed.
//
//   layout     key and value rows contiguous in dim; the few query rows of a group of heads in the thread's own memory
//
//   tiling     chunks of kChunk keys: scores of the chunk, softmax, then P V; both products by
//              attention_cpu_stored_rows.h
//
//   threads    every (batch, kv head, chunk) is an item of its own; partial results of the chunks are merged afterwards
//              in the order of the keys, so results do not depend on the number of threads
#pragma once

#include "attention_cpu_forward.h"
#include "attention_cpu_stored_rows.h"

namespace ptk::PTK_ISA {

// The rows of a group of heads against one kv head: row r is query position r % len_q of head r / len_q.
struct FewRows {
  Sequence seq;
  int64_t first_head, count;

  int64_t head(int64_t r) const { return first_head + r / seq.len_q; }
  int64_t position(int64_t r) const { return r % seq.len_q; }

  PTK_INLINE FewRows of(const Problem& p, int64_t head_kv) {
    const int64_t group = p.heads_q / p.heads_kv;
    const Sequence seq = sequence_of(p, head_kv / p.heads_kv);
    return {seq, head_kv % p.heads_kv * group, group * seq.len_q};
  }
};

// A row, widened and scaled, in the order of memory.
template <class T>
static void widen_row(const HeadView<const T>& rows, int64_t i, int64_t dim, Acc<T> scale, Acc<T>* to) {
  constexpr int lanes = kLanes<Acc<T>>;
  const T* from = rows.row(i);
  int64_t d = 0;
  if (rows.stride_dim == 1)
    for (; d + lanes <= dim; d += lanes) store(to + d, load_as(from + d) * scale);
  for (; d < dim; ++d) to[d] = load_scalar(from + d * rows.stride_dim) * scale;
}

template <class T>
static void list_rows(const HeadView<const T>& rows, int64_t n, const T** list) {
  for (int64_t j = 0; j < n; ++j) list[j] = rows.row(j);
}

template <class T>
class DirectForward {
  using A = Acc<T>;
  using Stored = StoredRows<T>;

public:
  static constexpr int64_t kRows = 16, kLeastKeys = 128;

  // For keys and values whose rows are contiguous. Many rows of few keys are better packed.
  static bool suits(const Problem& p) {
    const int64_t rows = p.heads_q / p.heads_kv * p.len_q;
    return rows <= kRows && (rows <= kRows / 2 || p.len_k >= kLeastKeys);
  }

  explicit DirectForward(const ForwardParams& params)
      : f_(params), p_(params.problem), stored_{p_.dim_qk, p_.dim_v, kLds, round_up(p_.dim_v, Stored::kStep) + 2} {}

  // False when memory ran out.
  bool run() {
    const int64_t heads = p_.batch * p_.heads_kv;
    for (int64_t batch = 0; batch < (p_.first_q ? p_.batch : 1); ++batch) {
      const Sequence seq = sequence_of(p_, batch);
      if (seq.len_q > 0) keys_ = most(keys_, seq.end_key(seq.len_q - 1) - seq.first_key(0));
    }
    chunks_ = most(1, (keys_ + kChunk - 1) / kChunk);
    A* partial = nullptr;
    if (chunks_ > 1) {
      partial = static_cast<A*>(__builtin_malloc(heads * chunks_ * max_rows() * partial_row() * sizeof(A)));
      if (!partial) return false;
    }
    const int64_t items = heads * chunks_;
    const int64_t work = items * max_rows() * least(kChunk, keys_) * (p_.dim_qk + p_.dim_v);
    const int64_t threads = work < kParallelWork ? 1 : least(num_threads(), items);
    bool ok = true;
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = items * begin / threads; i < items * end / threads; ++i)
        if (!run_chunk(i / chunks_, i % chunks_, partial)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    if (chunks_ > 1) {
      for (int64_t head = 0; ok && head < heads; ++head) ok = merge(head, partial);
      __builtin_free(partial);
    }
    return ok;
  }

private:
  static constexpr int64_t kChunk = 512, kLds = kChunk + 64;
  static constexpr int64_t kParallelWork = 1 << 16;

  int64_t max_rows() const { return p_.heads_q / p_.heads_kv * p_.len_q; }
  int64_t dim_v() const { return stored_.ld_v(); }
  // Sums, maximum and denominator of one row of one chunk.
  int64_t partial_row() const { return stored_.ld_out; }

  struct Scratch {
    A *row, *query, *scores, *sums;
    const T **keys, **values;
  };

  Scratch carve(Carver& carver) const {
    Scratch s;
    s.row = carver.take<A>(most(stored_.ld_q(), dim_v()));
    s.query = carver.take<A>(max_rows() * stored_.ld_q());
    s.scores = carver.take<A>(max_rows() * kLds);
    s.sums = carver.take<A>(max_rows() * partial_row());
    s.keys = carver.take<const T*>(kChunk + Stored::kBlock);
    s.values = carver.take<const T*>(kChunk + Stored::kBlock);
    return s;
  }

  bool run_chunk(int64_t head_kv, int64_t chunk, A* partial) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);

    const FewRows rows = FewRows::of(p_, head_kv);
    if (rows.count == 0) return true;
    const Sequence& seq = rows.seq;
    const int64_t k0 = seq.first_key(0) + chunk * kChunk;
    const int64_t keys = most(0, least(kChunk, seq.end_key(seq.len_q - 1) - k0));
    A* sums = partial ? partial + (head_kv * chunks_ + chunk) * max_rows() * partial_row() : s.sums;
    if (keys > 0) {
      list_rows(head_of<T>(f_.key, seq.batch, head_kv % p_.heads_kv, seq.first_k + k0), keys, s.keys);
      list_rows(head_of<T>(f_.value, seq.batch, head_kv % p_.heads_kv, seq.first_k + k0), keys, s.values);
      Stored::look_ahead(s.keys, s.values, keys);
      for (int64_t r = 0; r < rows.count; ++r) load_query(s, seq, rows.head(r), rows.position(r), r);
      stored_.score(s.query, rows.count, s.keys, keys, s.scores);
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = rows.position(r), valid = most(0, least(keys, seq.end_key(i) - k0));
      A* row = sums + r * partial_row();
      row[dim_v() + 1] =
          softmax_chunk(seq, rows.head(r), i, k0, valid, round_up(keys, kLanes<A>), s.scores + r * kLds, row[dim_v()]);
    }
    stored_.weigh(s.scores, rows.count, s.values, keys, sums);
    for (int64_t r = 0; !partial && r < rows.count; ++r) {
      A* row = sums + r * partial_row();
      write(seq, rows.head(r), rows.position(r), row, row[dim_v()], row[dim_v() + 1], s.row);
    }
    return true;
  }

  // Scores of row i become probabilities relative to their maximum, `top`; returns their sum before dropout.
  A softmax_chunk(const Sequence& seq, int64_t head, int64_t i, int64_t k0, int64_t valid, int64_t padded, A* s,
                  A& top) const {
    const A lowest = -static_cast<A>(__builtin_inf());
    if (has_shaped_scores(p_)) shape_rows<T>(p_, seq, head, s, kLds, i, 1, k0, valid, A(1));
    const int64_t hidden = least(valid, seq.first_key(i) - k0);
    for (int64_t j = 0; j < hidden; ++j) s[j] = lowest;
    top = row_max(s, valid);
    const A sum = exp2_row(s, s, valid, padded, static_cast<A>(kLog2E), top == lowest ? 0 : top);
    if (p_.seeds) drop_rows(Dropout::of(p_, seq.batch, head), s, kLds, i, 1, k0, valid);
    return sum;
  }

  void load_query(const Scratch& s, const Sequence& seq, int64_t head, int64_t i, int64_t r) const {
    widen_row(head_of<T>(f_.query, seq.batch, head, seq.first_q), i, p_.dim_qk, static_cast<A>(p_.scale), s.row);
    Stored::to_pairs(s.row, p_.dim_qk, s.query + r * stored_.ld_q());
  }

  void write(const Sequence& seq, int64_t head, int64_t i, A* in_pairs, A shift, A denominator, A* sums) const {
    Stored::from_pairs(in_pairs, dim_v(), sums);
    if (p_.sinks.data) join_sink(head_value<A>(p_.sinks, seq.batch, head), sums, p_.dim_v, shift, denominator);
    const auto out = head_of<T>(f_.out, seq.batch, head, seq.first_q);
    A* lse = static_cast<A*>(f_.lse) + lse_offset(p_, seq, head) + i;
    write_row<T>(sums, shift, denominator, p_.dim_v, out.row(i), lse, kept_share<A>(p_));
  }

  bool merge(int64_t head_kv, const A* partial) const {
    A* sums = static_cast<A*>(thread_scratch(2 * dim_v() * sizeof(A)));
    if (!sums) return false;
    const FewRows rows = FewRows::of(p_, head_kv);
    for (int64_t r = 0; r < rows.count; ++r) {
      auto row = [&](int64_t chunk) {
        return partial + ((head_kv * chunks_ + chunk) * max_rows() + r) * partial_row();
      };
      A top = -static_cast<A>(__builtin_inf()), denominator = 0;
      for (int64_t c = 0; c < chunks_; ++c) top = top > row(c)[dim_v()] ? top : row(c)[dim_v()];
      const A shift = top == -static_cast<A>(__builtin_inf()) ? 0 : top;
      for (int64_t d = 0; d < dim_v(); ++d) sums[d] = 0;
      for (int64_t c = 0; c < chunks_; ++c) {
        const A factor = exp_of(row(c)[dim_v()] - shift);
        denominator += row(c)[dim_v() + 1] * factor;
        for (int64_t d = 0; d < dim_v(); d += kLanes<A>) store(sums + d, load(sums + d) + load(row(c) + d) * factor);
      }
      write(rows.seq, rows.head(r), rows.position(r), sums, top, denominator, sums + dim_v());
    }
    return true;
  }

  const ForwardParams& f_;
  const Problem& p_;
  const Stored stored_;
  int64_t keys_ = 0, chunks_ = 0;
};

}  // namespace ptk::PTK_ISA
