// Forward on the CPU for few queries (decoding): keys and values are read once, in place, never packed.
//
//   layout     key and value rows contiguous in dim; the few query rows of a group of heads in the thread's own memory
//
//   tiling     chunks of kChunk keys: scores of the chunk (a vector of keys at a time, transposed in registers),
//              softmax, then P V with a slice of the output row in registers
//
//   threads    every (batch, kv head, chunk) is an item of its own; partial results of the chunks are merged afterwards
//              in the order of the keys, so results do not depend on the number of threads
#pragma once

#include "attention_cpu_forward.h"

namespace ptk::PTK_ISA {

template <class T>
class DirectForward {
  using A = Acc<T>;

public:
  static constexpr int64_t kRows = 8;

  // For keys and values whose rows are contiguous.
  static bool suits(const Problem& p) { return p.heads_q / p.heads_kv * p.len_q <= kRows; }

  explicit DirectForward(const ForwardParams& params) : f_(params), p_(params.problem) {}

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
  static constexpr int64_t kChunk = 512;
  static constexpr int64_t kParallelWork = 1 << 16;

  int64_t max_rows() const { return p_.heads_q / p_.heads_kv * p_.len_q; }
  int64_t dim_q() const { return round_up(p_.dim_qk, kLanes<A>); }
  int64_t dim_v() const { return round_up(p_.dim_v, kLanes<A>); }
  // Sums, maximum and denominator of one row of one chunk.
  int64_t partial_row() const { return dim_v() + 2; }

  // The rows of a group of heads against one kv head: row r is query position r % len_q of head r / len_q.
  struct Rows {
    Sequence seq;
    int64_t first_head, count, begin;  // begin: the first key that any of them sees

    int64_t head(int64_t r) const { return first_head + r / seq.len_q; }
    int64_t position(int64_t r) const { return r % seq.len_q; }
  };

  Rows rows_of(int64_t head_kv) const {
    const int64_t group = p_.heads_q / p_.heads_kv;
    const Sequence seq = sequence_of(p_, head_kv / p_.heads_kv);
    return {seq, head_kv % p_.heads_kv * group, group * seq.len_q, seq.first_key(0)};
  }

  bool run_chunk(int64_t head_kv, int64_t chunk, A* partial) const {
    Carver count;
    count.take<A>(max_rows() * (dim_q() + kChunk) + dim_v());
    char* memory = static_cast<char*>(thread_scratch(count.bytes()));
    if (!memory) return false;
    A* q = reinterpret_cast<A*>(memory);
    A* scores = q + max_rows() * dim_q();
    A* sums = scores + max_rows() * kChunk;

    const Rows rows = rows_of(head_kv);
    if (rows.count == 0) return true;
    const Sequence& seq = rows.seq;
    const int64_t k0 = rows.begin + chunk * kChunk;
    const int64_t keys = most(0, least(kChunk, seq.end_key(seq.len_q - 1) - k0));
    const auto key = head_of<T>(f_.key, seq.batch, head_kv % p_.heads_kv, seq.first_k);
    const auto value = head_of<T>(f_.value, seq.batch, head_kv % p_.heads_kv, seq.first_k);
    for (int64_t r = 0; r < rows.count; ++r) load_query(seq, rows.head(r), rows.position(r), q + r * dim_q());
    score_keys(q, rows.count, key.row(k0), key.stride_row, keys, scores);
    for (int64_t r = 0; r < rows.count; ++r) {
      A* s = scores + r * kChunk;
      A* row = partial ? partial + ((head_kv * chunks_ + chunk) * max_rows() + r) * partial_row() : sums;
      const int64_t i = rows.position(r), valid = most(0, least(keys, seq.end_key(i) - k0));
      A top;
      const A sum = softmax_chunk(seq, rows.head(r), i, k0, valid, round_up(keys, kLanes<A>), s, top);
      weigh_values(s, valid, value.row(k0), value.stride_row, row);
      if (partial) {
        row[dim_v()] = top;
        row[dim_v() + 1] = sum;
      } else {
        write(seq, rows.head(r), i, sums, top, sum);
      }
    }
    return true;
  }

  // Scores of row i become probabilities relative to their maximum, `top`; returns their sum before dropout.
  A softmax_chunk(const Sequence& seq, int64_t head, int64_t i, int64_t k0, int64_t valid, int64_t padded, A* s,
                  A& top) const {
    const A lowest = -static_cast<A>(__builtin_inf());
    if (has_shaped_scores(p_)) shape_rows<T>(p_, seq, head, s, kChunk, i, 1, k0, valid, A(1));
    const int64_t hidden = least(valid, seq.first_key(i) - k0);
    for (int64_t j = 0; j < hidden; ++j) s[j] = lowest;
    top = row_max(s, valid);
    const A sum = exp2_row(s, s, valid, padded, static_cast<A>(kLog2E), top == lowest ? 0 : top);
    if (p_.seeds) drop_rows(Dropout::of(p_, seq.batch, head), s, kChunk, i, 1, k0, valid);
    return sum;
  }

  void load_query(const Sequence& seq, int64_t head, int64_t i, A* q) const {
    const auto query = head_of<T>(f_.query, seq.batch, head, seq.first_q);
    const A scale = static_cast<A>(p_.scale);
    for (int64_t d = 0; d < p_.dim_qk; ++d) q[d] = load_scalar(query.row(i) + d * query.stride_dim) * scale;
    for (int64_t d = p_.dim_qk; d < dim_q(); ++d) q[d] = 0;
  }

  // A vector's worth of keys at a time: lane sums of every key's products, transposed and added once.
  void score_keys(const A* q, int64_t rows, const T* k, int64_t stride, int64_t keys, A* scores) const {
    constexpr int lanes = kLanes<A>;
    const int64_t dim_full = p_.dim_qk / lanes * lanes, rest = p_.dim_qk - dim_full;
    for (int64_t j = 0; j < keys; j += lanes) {
      const int64_t last = keys - j - 1;
      for (int64_t r = 0; r < rows; ++r) {
        const A* query = q + r * dim_q();
        Vec<A> sum[lanes] = {};
        for (int64_t d = 0; d < dim_full; d += lanes) {
          const Vec<A> x = load(query + d);
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) sum[i] += x * load_as(k + (j + least(i, last)) * stride + d);
        }
        if (rest) {
          const Vec<A> x = load(query + dim_full);
          for (int i = 0; i < lanes; ++i)
            sum[i] += x * load_as_partial(k + (j + least(i, last)) * stride + dim_full, rest);
        }
        transpose<A>(sum);
        Vec<A> total = sum[0];
        for (int i = 1; i < lanes; ++i) total += sum[i];
        store(scores + r * kChunk + j, total);
      }
    }
  }

  void weigh_values(const A* p, int64_t keys, const T* v, int64_t stride, A* out) const {
    constexpr int lanes = kLanes<A>, slices = 8;
    int64_t d = 0;
    for (; d + slices * lanes <= p_.dim_v; d += slices * lanes) {
      Vec<A> sum[slices] = {};
      for (int64_t j = 0; j < keys; ++j) {
        const Vec<A> x = broadcast(p[j]);
#pragma GCC unroll 8
        for (int i = 0; i < slices; ++i) sum[i] += x * load_as(v + j * stride + d + i * lanes);
      }
      for (int i = 0; i < slices; ++i) store(out + d + i * lanes, sum[i]);
    }
    for (; d < p_.dim_v; d += lanes) {
      Vec<A> sum{};
      for (int64_t j = 0; j < keys; ++j) sum += broadcast(p[j]) * load_as_partial(v + j * stride + d, p_.dim_v - d);
      store(out + d, sum);
    }
  }

  void write(const Sequence& seq, int64_t head, int64_t i, A* sums, A shift, A denominator) const {
    if (p_.sinks.data) join_sink(head_value<A>(p_.sinks, seq.batch, head), sums, p_.dim_v, shift, denominator);
    const auto out = head_of<T>(f_.out, seq.batch, head, seq.first_q);
    A* lse = static_cast<A*>(f_.lse) + lse_offset(p_, seq, head) + i;
    write_row<T>(sums, shift, denominator, p_.dim_v, out.row(i), lse, kept_share<A>(p_));
  }

  bool merge(int64_t head_kv, const A* partial) const {
    A* sums = static_cast<A*>(thread_scratch(dim_v() * sizeof(A)));
    if (!sums) return false;
    const Rows rows = rows_of(head_kv);
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
      write(rows.seq, rows.head(r), rows.position(r), sums, top, denominator);
    }
    return true;
  }

  const ForwardParams& f_;
  const Problem& p_;
  int64_t keys_ = 0, chunks_ = 0;
};

}  // namespace ptk::PTK_ISA
