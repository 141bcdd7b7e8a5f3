// Forward on the CPU under batch invariance: a row's bits do not depend on what else is in the call.
//
//   equation   per block b of kInvariantKeys keys, counted from the first key of the sequence:
//                m_b = rowmax S_b,  P_b = exp(S_b - m_b),  l_b = rowsum P_b,  O_b = P_b V_b
//              and, in the order of the blocks:
//                m' = max(m, m_b),  l = l exp(m - m') + l_b exp(m_b - m'),  O = O exp(m - m') + O_b exp(m_b - m')
//
//   invariance The engine sums a row's products in one order, however many rows are beside it. A block is relative to
//              its own maximum and knows nothing of the blocks before it, so that it may be computed anywhere and
//              joined later. A block of which a row sees nothing adds exact zeros, and is as good as left out; so is a
//              key. Scores are scaled before anything is added to them, whether anything is or not.
//
//   layout     as in attention_cpu_forward.h, but values are packed block by block
//
//   tiling     Many rows: a head is packed once per thread, then blocks of kQueries rows meet its blocks of keys one
//              after the other, and joining is the epilogue of P V. Few rows (decoding): every block of keys is an
//              item, packed where it is used; results are joined at the end. Heads that share a key head are rows of
//              one block where all of them fit.
#pragma once

#include "attention_cpu_forward.h"
#include "attention_cpu_invariant_rows.h"

namespace ptk::PTK_ISA {

// A product that is rounded before it is added: which of two products is contracted with the sum would be the
// compiler's choice, at each place it is inlined at.
template <class A>
PTK_INLINE Vec<A> joined(Vec<A> before, Vec<A> factor, Vec<A> sums, Vec<A> share) {
  Vec<A> added = sums * share;
  PTK_OPAQUE(added);
  return multiply_add<A>(before, factor, added);
}

// The scale is read from memory: as a value it would keep one of the registers that the sums need.
template <class A>
struct ScaleAndStore {
  A* to;
  int64_t ld;
  const A* scale;
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    store(to + row * ld + column, sums * broadcast(*scale));
  }
};

template <class A>
struct JoinSums {
  A* out;
  int64_t ld;
  const A *factor, *share;
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    A* p = out + row * ld + column;
    store(p, joined<A>(load(p), broadcast(factor[row]), sums, broadcast(share[row])));
  }
};

// The rows of attention's own operands.
template <class T>
class TensorRows final : public InvariantRows<T> {
  using Base = InvariantRows<T>;
  using E = Element<T>;

public:
  explicit TensorRows(const ForwardParams& params) : f_(params), p_(params.problem) {}

  Sequence sequence(int64_t batch) const override { return sequence_of(p_, batch); }
  void load_queries(const Sequence& seq, int64_t head, int64_t first, int64_t rows, E* to, int64_t ld) const override {
    const auto query = head_of<T>(f_.query, seq.batch, head, seq.first_q + first);
    pack_a<T>(query.data, query.stride_row, query.stride_dim, rows, p_.dim_qk, to, ld);
  }
  void pack_keys(const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, E*, E* to) const override {
    const auto key = head_of<T>(f_.key, seq.batch, head_kv, seq.first_k + k0);
    pack_b<T>(key.data, key.stride_dim, key.stride_row, p_.dim_qk, keys, to, padded_k<T>(p_.dim_qk));
  }
  void pack_values(const Sequence& seq, int64_t head_kv, int64_t k0, int64_t keys, E*, E* to) const override {
    const auto value = head_of<T>(f_.value, seq.batch, head_kv, seq.first_k + k0);
    Base::pack_value_panels(value.data, value.stride_row, value.stride_dim, keys, p_.dim_v, to);
  }

private:
  const ForwardParams& f_;
  const Problem& p_;
};

template <class T>
class InvariantForward {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  static constexpr bool kSeparateP = !std::is_same_v<E, A>;
  static constexpr int kLane = kLanes<A>;

public:
  InvariantForward(const Problem& problem, const InvariantRows<T>& operands, const View& out, void* lse)
      : p_(problem), operands_(operands), out_(out), lse_(static_cast<A*>(lse)), scale_(static_cast<A>(problem.scale)) {
    for (int64_t b = 0; b < p_.batch; ++b) longest_ = most(longest_, operands_.sequence(b).len_q);
    const int64_t group = p_.heads_q / p_.heads_kv;
    fold_ = group * longest_ <= kQueries ? group : 1;
  }

  // False when memory ran out.
  bool run() { return fold_ * longest_ <= kFewRows ? run_few() : run_many(); }

private:
  static constexpr int64_t kQueries = detail::kUsesTiles<T> ? 128 : 8 * Traits::kMr, kFewRows = 16;
  static constexpr int64_t kKeys = kInvariantKeys, kNr = Traits::kNr;
  static constexpr int64_t kParallelWork = 1 << 17, kCostOfABlock = 32;
  static constexpr int64_t kLds = kKeys + 64 / sizeof(A);
  static constexpr int64_t kLdp = kSeparateP ? kKeys + 64 / static_cast<int64_t>(sizeof(E)) : kLds;

  // Consecutive rows: of one query head, or of all fold_ heads that share a key head, position by position.
  struct Rows {
    const Sequence& seq;
    int64_t first_head, fold, first, count;

    int64_t head(int64_t r) const { return first_head + (first + r) % fold; }
    int64_t position(int64_t r) const { return (first + r) / fold; }
    int64_t first_key() const { return seq.first_key(position(0)); }
    int64_t end_key() const { return seq.end_key(position(count - 1)); }
  };

  // Of keys in a block, or of blocks.
  struct Range {
    int64_t begin, end;
  };
  static Range blocks_of(const Sequence& seq) {
    if (seq.len_q == 0) return {0, 0};
    const int64_t begin = seq.first_key(0), end = seq.end_key(seq.len_q - 1);
    return begin < end ? Range{begin / kKeys, (end - 1) / kKeys + 1} : Range{0, 0};
  }
  // Keys of a block that any row of the sequence may see: those behind are not read.
  static int64_t keys_of(const Sequence& seq, int64_t block) {
    return least(kKeys, seq.end_key(seq.len_q - 1) - block * kKeys);
  }

  int64_t heads() const { return p_.heads_q / fold_; }
  int64_t head_kv_of(int64_t head) const { return head * fold_ / (p_.heads_q / p_.heads_kv); }
  int64_t ldq() const { return padded_k<T>(p_.dim_qk) + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t ldo() const { return padded_n<T>(p_.dim_v); }
  int64_t key_panel() const { return padded_k<T>(p_.dim_qk) * kNr; }
  int64_t key_block() const { return kKeys / kNr * key_panel(); }
  int64_t value_block() const { return ldo() / kNr * InvariantRows<T>::kValuePanel; }

  struct Statistics {
    A *max, *sum;
  };
  struct Scratch {
    E *key, *value, *gathered, *query, *prob;
    A *scores, *out, *factor, *share;
    Statistics block, all;
  };

  Scratch carve(Carver& carver, int64_t rows, int64_t blocks) const {
    const int64_t padded = round_up(rows, 32);
    Scratch s;
    s.key = carver.take<E>(blocks * key_block());
    s.value = carver.take<E>(blocks * value_block());
    s.gathered = carver.take<E>(kKeys * operands_.gathered_row());
    s.query = carver.take<E>(padded * ldq());
    s.scores = carver.take<A>(padded * kLds);
    s.prob = kSeparateP ? carver.take<E>(padded * kLdp) : reinterpret_cast<E*>(s.scores);
    s.out = carver.take<A>(rows * ldo());
    for (A** statistic : {&s.factor, &s.share, &s.block.max, &s.block.sum, &s.all.max, &s.all.sum})
      *statistic = carver.take<A>(padded);
    return s;
  }

  template <class Body>
  bool with_scratch(int64_t rows, int64_t blocks, const Body& body) const {
    Carver count;
    carve(count, rows, blocks);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver, rows, blocks);
    TileScope tiles;
    body(s);
    release_large_scratch();
    return true;
  }

  // ---- many rows

  int64_t row_blocks(const Sequence& seq) const { return (seq.len_q * fold_ + kQueries - 1) / kQueries; }
  Rows rows_of(const Sequence& seq, int64_t head, int64_t block) const {
    return {seq, head * fold_, fold_, block * kQueries, least(kQueries, seq.len_q * fold_ - block * kQueries)};
  }
  int64_t block_cost(const Sequence& seq, int64_t block) const {
    const Rows rows = rows_of(seq, 0, block);
    return most(0, rows.end_key() - rows.first_key()) + kCostOfABlock;
  }

  bool run_many() const {
    int64_t cost = 0, longest = 0;
    for (int64_t b = 0; b < p_.batch; ++b) {
      const Sequence seq = operands_.sequence(b);
      const Range blocks = blocks_of(seq);
      longest = most(longest, blocks.end - blocks.begin);
      for (int64_t i = 0; i < row_blocks(seq); ++i) cost += block_cost(seq, i) * heads();
    }
    const int64_t threads = cost * kQueries * (p_.dim_qk + p_.dim_v) < kParallelWork ? 1 : num_threads();
    bool ok = true;
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      const bool done = with_scratch(
          kQueries, longest, [&](const Scratch& s) { run_share(s, cost * begin / threads, cost * end / threads); });
      if (!done) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

  // The blocks of rows whose cost begins in [begin, end).
  void run_share(const Scratch& s, int64_t begin, int64_t end) const {
    int64_t cost = 0;
    for (int64_t b = 0; b < p_.batch && cost < end; ++b) {
      const Sequence seq = operands_.sequence(b);
      int64_t packed_head = -1;
      for (int64_t head = 0; head < heads() && cost < end; ++head) {
        for (int64_t i = 0; i < row_blocks(seq) && cost < end; ++i) {
          if (cost >= begin) {
            if (packed_head != head_kv_of(head)) pack_head(s, seq, head_kv_of(head));
            packed_head = head_kv_of(head);
            run_block(s, rows_of(seq, head, i), packed_head);
          }
          cost += block_cost(seq, i);
        }
      }
    }
  }

  void pack_head(const Scratch& s, const Sequence& seq, int64_t head_kv) const {
    const Range blocks = blocks_of(seq);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t at = block - blocks.begin, keys = keys_of(seq, block);
      operands_.pack_keys(seq, head_kv, block * kKeys, keys, s.gathered, s.key + at * key_block());
      operands_.pack_values(seq, head_kv, block * kKeys, keys, s.gathered, s.value + at * value_block());
    }
  }

  void run_block(const Scratch& s, const Rows& rows, int64_t head_kv) const {
    load_queries(s, rows);
    begin_rows(s, rows.count);
    const int64_t begin = rows.first_key() / kKeys, end = (rows.end_key() + kKeys - 1) / kKeys;
    const int64_t packed = blocks_of(rows.seq).begin;
    for (int64_t block = begin; block < end; ++block) {
      const Range seen = range_of(rows, block);
      if (!sees_block(rows, block, seen)) continue;
      weigh(s, rows, head_kv, block, seen, s.key + (block - packed) * key_block(), s.block);
      join(s.block, s, rows.count);
      multiply_values(s, rows, seen, s.value + (block - packed) * value_block(),
                      JoinSums<A>{s.out, ldo(), s.factor, s.share});
    }
    write(s, rows);
  }

  // Whether a mask of blocks, or the lack of one, lets a row see any of it: nothing is looked up for heads in one
  // block.
  bool sees_block(const Rows& rows, int64_t block, const Range& seen) const {
    return seen.begin < seen.end &&
           (rows.fold > 1 || sees_keys(p_, rows.seq.batch, rows.head(0), rows.first, rows.count,
                                       block * kKeys + seen.begin, seen.end - seen.begin));
  }

  // ---- few rows

  int64_t few_rows() const { return fold_ * longest_; }
  // Sums, maxima and denominators of the rows of a head and one block of keys.
  int64_t partial_size() const { return few_rows() * ldo() + 2 * round_up(few_rows(), kLane); }
  Statistics statistics_of(A* partial) const {
    A* max = partial + few_rows() * ldo();
    return {max, max + round_up(few_rows(), kLane)};
  }

  bool run_few() {
    int64_t blocks = 0;
    for (int64_t b = 0; b < p_.batch; ++b) blocks += count_of(b);
    const int64_t items = blocks * heads();
    A* partial = static_cast<A*>(borrow_block(most(items, 1) * partial_size() * sizeof(A)));
    if (!partial) return false;
    const int64_t work = items * kKeys * few_rows() * (p_.dim_qk + p_.dim_v);
    const int64_t threads = work < kParallelWork ? 1 : num_threads();
    bool ok = true;
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      const bool done = with_scratch(few_rows(), 1, [&](const Scratch& s) {
        run_items(s, items * begin / threads, items * end / threads, partial);
      });
      if (!done) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    const int64_t joins = p_.batch * heads();
    parallel_for(0, ok ? least(threads, joins) : 0, [&](int64_t begin, int64_t end) {
      const int64_t parts = least(threads, joins);
      const bool done = with_scratch(
          few_rows(), 1, [&](const Scratch& s) { join_heads(s, joins * begin / parts, joins * end / parts, partial); });
      if (!done) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return_block(partial);
    return ok;
  }

  int64_t count_of(int64_t batch) const {
    const Range blocks = blocks_of(operands_.sequence(batch));
    return blocks.end - blocks.begin;
  }

  // Items count (sequence, head, block of keys) with the block innermost.
  void run_items(const Scratch& s, int64_t begin, int64_t end, A* partial) const {
    int64_t item = 0;
    for (int64_t b = 0; b < p_.batch && item < end; ++b) {
      const Sequence seq = operands_.sequence(b);
      const Range blocks = blocks_of(seq);
      for (int64_t head = 0; head < heads() && item < end; ++head) {
        const Rows rows{seq, head * fold_, fold_, 0, seq.len_q * fold_};
        bool is_loaded = false;
        for (int64_t block = blocks.begin; block < blocks.end && item < end; ++block, ++item) {
          if (item < begin) continue;
          if (!is_loaded) load_queries(s, rows);
          is_loaded = true;
          run_item(s, rows, head_kv_of(head), block, partial + item * partial_size());
        }
      }
    }
  }

  void run_item(const Scratch& s, const Rows& rows, int64_t head_kv, int64_t block, A* partial) const {
    const int64_t keys = keys_of(rows.seq, block);
    const Range seen = range_of(rows, block);
    operands_.pack_keys(rows.seq, head_kv, block * kKeys, keys, s.gathered, s.key);
    weigh(s, rows, head_kv, block, seen, s.key, statistics_of(partial));
    operands_.pack_values(rows.seq, head_kv, block * kKeys, keys, s.gathered, s.value);
    multiply_values(s, rows, seen, s.value, StoreSums<A>{partial, ldo()});
  }

  void join_heads(const Scratch& s, int64_t begin, int64_t end, A* partial) const {
    for (int64_t b = 0, i = 0; b < p_.batch; ++b) {
      const Sequence seq = operands_.sequence(b);
      const int64_t blocks = count_of(b);
      for (int64_t head = 0; head < heads(); ++head, ++i, partial += blocks * partial_size()) {
        if (i < begin || i >= end) continue;
        const Rows rows{seq, head * fold_, fold_, 0, seq.len_q * fold_};
        begin_rows(s, rows.count);
        for (int64_t block = 0; block < blocks; ++block) {
          A* of_block = partial + block * partial_size();
          join(statistics_of(of_block), s, rows.count);
          const JoinSums<A> sums{s.out, ldo(), s.factor, s.share};
          for (int64_t r = 0; r < rows.count; ++r)
            for (int64_t d = 0; d < ldo(); d += kLane) sums(r, d, load(of_block + r * ldo() + d), kLane);
        }
        write(s, rows);
      }
    }
  }

  // ---- one block of keys

  void load_queries(const Scratch& s, const Rows& rows) const {
    const int64_t step = rows.fold == 1 ? rows.count : 1;
    for (int64_t r = 0; r < rows.count; r += step)
      operands_.load_queries(rows.seq, rows.head(r), rows.position(r), step, s.query + r * ldq(), ldq());
  }

  void begin_rows(const Scratch& s, int64_t rows) const {
    std::memset(s.out, 0, rows * ldo() * sizeof(A));
    for (int64_t i = 0; i < rows; i += kLane) {
      store(s.all.max + i, broadcast(-static_cast<A>(__builtin_inf())));
      store(s.all.sum + i, Vec<A>{});
    }
  }

  // Keys of a block that any of the rows may see, from a whole panel on, counted from the block's first.
  static Range range_of(const Rows& rows, int64_t block) {
    const int64_t k0 = block * kKeys;
    const int64_t begin = most(0, rows.first_key() - k0) / kNr * kNr;
    return {begin, most(begin, least(kKeys, rows.end_key() - k0))};
  }

  // Probabilities of a block's keys relative to the rows' maxima among them.
  void weigh(const Scratch& s, const Rows& rows, int64_t head_kv, int64_t block, const Range& seen, const E* key,
             const Statistics& of_block) const {
    const int64_t k0 = block * kKeys + seen.begin, keys = seen.end - seen.begin;
    A* scores = s.scores + seen.begin;
    gemm<T>(rows.count, padded_n<T>(keys), p_.dim_qk, s.query, ldq(), key + seen.begin / kNr * key_panel(), key_panel(),
            ScaleAndStore<A>{scores, kLds, &scale_});
    if (operands_.has_key_scales())
      for (int64_t r = 0; r < rows.count; ++r) operands_.scale_keys(rows.seq, head_kv, k0, keys, scores + r * kLds);
    const int64_t step = rows.fold == 1 ? rows.count : 1;
    if (has_shaped_scores(p_))
      for (int64_t r = 0; r < rows.count; r += step)
        shape_rows<T>(p_, rows.seq, rows.head(r), scores + r * kLds, kLds, rows.position(r), step, k0, keys, A(1));
    for (int64_t r = 0; r < rows.count; r += kLane) softmax(s, rows, r, head_kv, k0, keys, seen.begin, of_block);
    if (p_.seeds)
      for (int64_t r = 0; r < rows.count; r += step)
        drop_rows(Dropout::of(p_, rows.seq.batch, rows.head(r)), s.prob + r * kLdp + seen.begin, kLdp, rows.position(r),
                  step, k0, keys);
  }

  // Of as many rows as a vector has lanes.
  void softmax(const Scratch& s, const Rows& rows, int64_t first, int64_t head_kv, int64_t k0, int64_t keys,
               int64_t column, const Statistics& of_block) const {
    const A lowest = -static_cast<A>(__builtin_inf());
    const int64_t padded = round_up(padded_k<T>(keys), kLane), count = least(kLane, rows.count - first);
    int64_t valid[kLane];
    Vec<A> part[kLane];
#pragma GCC unroll 1
    for (int64_t i = 0; i < kLane; ++i) {
      const int64_t position = rows.position(first + i);
      valid[i] = i < count ? most(0, least(keys, rows.seq.end_key(position) - k0)) : 0;
      A* scores = s.scores + (first + i) * kLds + column;
      const int64_t hidden = least(valid[i], rows.seq.first_key(position) - k0);
      for (int64_t j = 0; j < hidden; ++j) scores[j] = lowest;
      part[i] = row_maxima(scores, valid[i]);
    }
    const Vec<A> top = maxima_of_lanes<A>(part);
    A shift[kLane];
    store(shift, top == lowest ? Vec<A>{} : top);
#pragma GCC unroll 1
    for (int64_t i = 0; i < kLane; ++i) {
      part[i] = Vec<A>{};
      if (i >= count) continue;
      A* scores = s.scores + (first + i) * kLds + column;
      E* prob = s.prob + (first + i) * kLdp + column;
      const A log2e = static_cast<A>(kLog2E);
      if (operands_.has_value_scales()) {
        part[i] = exp2_row_sums(scores, scores, valid[i], padded, log2e, shift[i]);
        operands_.scale_values(rows.seq, head_kv, k0, keys, scores);
        if constexpr (kSeparateP)
          for (int64_t j = 0; j < padded; j += kLane) store_as(prob + j, load(scores + j));
      } else {
        part[i] = exp2_row_sums(scores, prob, valid[i], padded, log2e, shift[i]);
      }
    }
    store(of_block.max + first, top);
    store(of_block.sum + first, sums_of_lanes<A>(part));
  }

  template <class Epilogue>
  void multiply_values(const Scratch& s, const Rows& rows, const Range& seen, const E* value,
                       const Epilogue& epilogue) const {
    gemm<T>(rows.count, ldo(), seen.end - seen.begin, s.prob + seen.begin, kLdp, value + seen.begin * kNr,
            InvariantRows<T>::kValuePanel, epilogue);
  }

  // Maxima and sums of a block enter those of the rows; factor and share are what sums so far and those of the block
  // are multiplied with.
  static void join(const Statistics& of_block, const Scratch& s, int64_t rows) {
    const A lowest = -static_cast<A>(__builtin_inf()), log2e = static_cast<A>(kLog2E);
    for (int64_t r = 0; r < rows; r += kLane) {
      const Vec<A> before = load(s.all.max + r), block = load(of_block.max + r), after = max(before, block);
      const Vec<A> shift = after == lowest ? Vec<A>{} : after;
      const Vec<A> factor = exp2((before - shift) * log2e), share = exp2((block - shift) * log2e);
      store(s.all.sum + r, joined<A>(load(s.all.sum + r), factor, load(of_block.sum + r), share));
      store(s.all.max + r, after);
      store(s.factor + r, factor);
      store(s.share + r, share);
    }
  }

  void write(const Scratch& s, const Rows& rows) const {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t head = rows.head(r), position = rows.position(r), batch = rows.seq.batch;
      A* sums = s.out + r * ldo();
      A shift = s.all.max[r], denominator = s.all.sum[r];
      if (p_.sinks.data) join_sink(head_value<A>(p_.sinks, batch, head), sums, p_.dim_v, shift, denominator);
      write_row<T>(sums, shift, denominator, p_.dim_v, head_of<T>(out_, batch, head, rows.seq.first_q).row(position),
                   lse_ + lse_offset(p_, rows.seq, head) + position, kept_share<A>(p_));
    }
  }

  const Problem& p_;
  const InvariantRows<T>& operands_;
  const View& out_;
  A* lse_;
  const A scale_;
  int64_t longest_ = 0, fold_ = 1;
};

template <class T>
bool attend_invariantly(const Problem& problem, const InvariantRows<T>& rows, const View& out, void* lse) {
  return InvariantForward<T>(problem, rows, out, lse).run();
}

}  // namespace ptk::PTK_ISA
