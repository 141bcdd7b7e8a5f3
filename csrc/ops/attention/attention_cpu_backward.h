// Backward on the CPU: gradients of attention from the saved log-sum-exp, scores recomputed block by block.
//
//   equation   P = exp(S - lse),  delta = rowsum(dO * O) - dlse,  dS = P * (dO V^T - delta)
//              dV = P^T dO,   dK = scale dS^T Q,   dQ = scale dS K
//
//   layout     everything is computed transposed, keys x queries: S^T = K Q^T, dP^T = V dO^T. P^T and dS^T then leave
//              the first two products as left operands of dV and dK, and dS^T as right operand of dQ^T = K^T dS^T: no
//              product needs a transposed score block. Panels of kNr queries hold [panel][key][query in panel].
//              Q and dO of a head are packed in both orientations, once, and reused for every block of keys.
//
//   tiling     kKeys x kQueries scores at a time; exp2 and dS happen in the epilogues of the products that make them.
//
//   threads    an item is one (batch, kv head) or, where there are few, every splits_-th block of its keys; dQ of the
//              parts is added in a fixed order. The split depends on the shape only, so results do not depend on them.
#pragma once

#include "attention_cpu_score_blocks.h"

namespace ptk::PTK_ISA {

// P^T = exp(S^T * scale + bias - lse) * weight, rows = keys, columns = queries of a block. E is what the products
// multiply.
template <class E, class A, int kNr>
struct StoreProbabilities {
  static constexpr bool kLarge = true, kStrip = true;
  E* prob;
  int64_t panel;    // elements between panels
  const A* lse;     // of the block's queries
  const A* bias;    // laid out like prob; null without a mask
  const A* weight;  // of the block's queries; null where all are 1
  A scale;
  Band<A> band;

  int64_t place(int64_t row, int64_t column) const { return column / kNr * panel + row * kNr + column % kNr; }
  inline __attribute__((always_inline)) Vec<A> probabilities(int64_t row, int64_t column, Vec<A> sums) const {
    Vec<A> x = sums * scale;
    if (bias) x += load(bias + place(row, column));
    Vec<A> p = softmax_exp2<E>((x - load(lse + column)) * static_cast<A>(kLog2E));
    if (weight) p *= load(weight + column);
    return band.is_cut ? band.cut(p, row, column) : p;
  }
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    store_as(prob + place(row, column), probabilities(row, column, sums));
  }
  // Queries are whole panels.
  void strip(int rows, int64_t row, int64_t column, int64_t, const A* sums) const {
    for (const int64_t end = row + rows; row < end; ++row, sums += kNr)
      store_pair_as(prob + place(row, column), probabilities(row, column, load(sums)),
                    probabilities(row, column + kLanes<A>, load(sums + kLanes<A>)));
  }
};

// dS^T = P^T * (dP^T - delta)
template <class E, class A, int kNr>
struct StoreScoreGradients {
  static constexpr bool kLarge = true, kStrip = true;
  const E* prob;
  E* grad;
  int64_t panel;
  const A* delta;

  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    const int64_t at = column / kNr * panel + row * kNr + column % kNr;
    store_as(grad + at, load_as(prob + at) * (sums - load(delta + column)));
  }
  void strip(int rows, int64_t row, int64_t column, int64_t, const A* sums) const {
    const Vec<A> delta0 = load(delta + column), delta1 = load(delta + column + kLanes<A>);
    for (int64_t at = column / kNr * panel + row * kNr, end = at + rows * kNr; at < end; at += kNr, sums += kNr)
      store_pair_as(grad + at, load_as(prob + at) * (load(sums) - delta0),
                    load_as(prob + at + kLanes<A>) * (load(sums + kLanes<A>) - delta1));
  }
};

// dQ^T += sums, in panels of kNr queries.
template <class A, int kNr>
struct AddToPanels {
  static constexpr bool kAddsTiles = true;
  A* data;
  int64_t panel;
  TileTarget<A> tile_target(int64_t row, int64_t column) const {
    return {data + column / kNr * panel + row * kNr, kNr};
  }
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    A* p = data + column / kNr * panel + row * kNr + column % kNr;
    store(p, load(p) + sums);
  }
};

// Whether rounding a log-sum-exp to its own magnitude may have lost something, see weigh_rows.
template <class A>
PTK_INLINE bool is_far(A lse) {
  return __builtin_isfinite(lse) && __builtin_fabs(lse) > A(64);
}

template <class T>
class TiledBackward {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  using Blocks = ScoreBlocks<T>;
  static constexpr int kNr = Traits::kNr;

public:
  static constexpr int64_t kKeys = Blocks::kKeys, kQueries = Blocks::kQueries;

  explicit TiledBackward(const BackwardParams& params)
      : b_(params), p_(params.problem), group_(p_.heads_q / p_.heads_kv), turns_(turns_of(params)), sums_(params) {
    // Every split packs all queries: it should have keys enough to be worth it.
    splits_ = most(1, least(kItems / slices(), p_.len_k / most(kLeastKeysOfSplit, p_.len_q / 4)));
    is_shaped_ = p_.softcap != 0 || p_.alibi.data || p_.seeds || sums_.needs_score_gradients();
  }

  // False when memory ran out.
  bool run() {
    const bool split_dq = splits_ > 1 && b_.grad_query.data;
    bool ok = sums_.allocate(splits_);
    if (ok && split_dq) {
      dq_parts_ = static_cast<A*>(__builtin_malloc(slices() * group_ * splits_ * dq_size() * sizeof(A)));
      ok = dq_parts_;
    }
    const int64_t items = slices() * splits_;
    const bool is_small = p_.batch * p_.heads_q * p_.len_q * p_.len_k * (p_.dim_qk + p_.dim_v) < kParallelWork;
    for (int64_t turn = 0; ok && turn < turns_.count(); ++turn) {
      auto item = [&](int64_t i) {
        if (!run_item(turn, i / splits_, i % splits_)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      };
      if (is_small) {
        for (int64_t i = 0; i < items; ++i) item(i);
      } else {
        parallel_items(items, item);
      }
      if (ok && split_dq)
        parallel_items(slices() * group_, [&](int64_t i) { add_parts(turn, i / group_, i % group_); });
    }
    if (ok) sums_.finish();
    __builtin_free(dq_parts_);
    return ok;
  }

private:
  static constexpr int64_t kParallelWork = 1 << 16;
  static constexpr int64_t kItems = 8, kLeastKeysOfSplit = 128;
  static constexpr int64_t kPad = 64 / sizeof(E);
  static constexpr int64_t kPanel = Blocks::kPanel;

  // Heads that add to the same elements of the mask's gradient take turns; the slices of a turn share none.
  struct Turns {
    bool batch, heads;  // which of the two dimensions is gone through in turns
    int64_t batches, heads_kv;
    int64_t count() const { return (batch ? batches : 1) * (heads ? heads_kv : 1); }
    int64_t batch_of(int64_t turn, int64_t slice) const {
      return batch ? turn / (heads ? heads_kv : 1) : slice / (heads ? 1 : heads_kv);
    }
    int64_t head_of(int64_t turn, int64_t slice) const { return (heads ? turn : slice) % heads_kv; }
  };

  static Turns turns_of(const BackwardParams& b) {
    const bool is_full = GradientSums<T>::is_full_mask(b);
    const int64_t* strides = b.grad_mask.strides;
    return {is_full && strides[0] == 0, is_full && strides[1] == 0, b.problem.batch, b.problem.heads_kv};
  }

  int64_t slices() const { return p_.batch * p_.heads_kv / turns_.count(); }

  // Every split_-th block of keys of a kv head, against all of its query heads.
  struct Item {
    Sequence seq;
    int64_t head_kv, split, slice;
    int64_t queries;     // rows, rounded up to panels
    int64_t key_blocks;  // of this split
  };

  bool needs_ds() const { return b_.grad_query.data || b_.grad_key.data || sums_.needs_score_gradients(); }
  int64_t dq_size() const { return round_up(p_.len_q, kNr) * p_.dim_qk; }
  int64_t ld_k() const { return padded_k<T>(p_.dim_qk) + kPad; }
  int64_t ld_v() const { return padded_k<T>(p_.dim_v) + kPad; }
  static constexpr int64_t kLdKt = round_up(kKeys, Traits::kKStep) + kPad;
  int64_t key_blocks_of(int64_t len_k, int64_t split) const {
    return ((len_k + kKeys - 1) / kKeys - split + splits_ - 1) / splits_;
  }

  struct Scratch {
    E *q_t, *q, *do_t, *d_o;  // one head: panels of queries over dims (_t),
                              // panels of dims over queries
    A *lse, *delta, *weight, *dq;
    E *k, *k_t, *v;  // one block of keys, rows
    E *prob, *ds, *ds_packed;
    A* bias;
    typename Blocks::Scratch shaped;
    A *dk, *dv;
  };

  Scratch carve(Carver& c) const {
    const int64_t queries = round_up(p_.len_q, kNr);
    Scratch s;
    s.q_t = c.take<E>(padded_k<T>(p_.dim_qk) * queries);
    s.q = c.take<E>(queries * padded_n<T>(p_.dim_qk));
    s.do_t = c.take<E>(padded_k<T>(p_.dim_v) * queries);
    s.d_o = c.take<E>(queries * padded_n<T>(p_.dim_v));
    s.lse = c.take<A>(queries);
    s.delta = c.take<A>(queries);
    s.weight = c.take<A>(queries);
    s.dq = c.take<A>(dq_size());
    s.k = c.take<E>(round_up(kKeys, 32) * ld_k());
    s.k_t = c.take<E>(round_up(p_.dim_qk, 32) * kLdKt);
    s.v = c.take<E>(round_up(kKeys, 32) * ld_v());
    s.prob = c.take<E>(Blocks::kSize);
    s.ds = c.take<E>(Blocks::kSize);
    s.ds_packed = Traits::kPack > 1 ? c.take<E>(Blocks::kSize) : s.ds;
    s.bias = c.take<A>(has_bias(p_) ? Blocks::kSize : 0);
    s.shaped = Blocks::carve(c, p_, is_shaped_);
    const int64_t kept = (group_ > 1 ? key_blocks_of(p_.len_k, 0) : 1) * kKeys;
    s.dk = c.take<A>(kept * padded_n<T>(p_.dim_qk));
    s.dv = c.take<A>(kept * padded_n<T>(p_.dim_v));
    return s;
  }

  bool run_item(int64_t turn, int64_t slice, int64_t split) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    const Sequence seq = sequence_of(p_, turns_.batch_of(turn, slice));
    const Item item{seq,   turns_.head_of(turn, slice), split,
                    slice, round_up(seq.len_q, kNr),    key_blocks_of(seq.len_k, split)};
    for (int64_t g = 0; g < group_; ++g) run_head(s, item, g);
    release_large_scratch();
    return true;
  }

  // One query head of an item. Gradients of keys and values are kept over the heads of a group.
  void run_head(const Scratch& s, const Item& item, int64_t g) const {
    const int64_t head = item.head_kv * group_ + g;
    A* dq = dq_parts_ ? dq_parts_ + ((item.slice * group_ + g) * splits_ + item.split) * dq_size() : s.dq;
    pack_queries(s, item, head);
    const bool has_weights = weigh_rows(s, item, head);
    if (item.split == 0) sums_.add_rows(item.seq, head, s.lse, s.delta, has_weights ? s.weight : nullptr);
    if (b_.grad_query.data) std::memset(dq, 0, item.queries * p_.dim_qk * sizeof(A));
    for (int64_t i = 0; i < item.key_blocks; ++i) {
      const int64_t kept = group_ > 1 ? i * kKeys : 0;
      A* dk = s.dk + kept * padded_n<T>(p_.dim_qk);
      A* dv = s.dv + kept * padded_n<T>(p_.dim_v);
      const int64_t k0 = (i * splits_ + item.split) * kKeys;
      if (g == 0) {
        const int64_t keys = least(kKeys, item.seq.len_k - k0);
        std::memset(dk, 0, keys * padded_n<T>(p_.dim_qk) * sizeof(A));
        std::memset(dv, 0, keys * padded_n<T>(p_.dim_v) * sizeof(A));
      }
      run_keys(s, item, head, k0, dk, dv, dq, has_weights);
      if (g == group_ - 1) write_keys(item, k0, dk, dv);
    }
    if (b_.grad_query.data && !dq_parts_) write_queries(item.seq, head, dq);
  }

  void pack_queries(const Scratch& s, const Item& item, int64_t head) const {
    const Sequence& seq = item.seq;
    const auto q = head_of<T>(b_.query, seq.batch, head, seq.first_q);
    const auto d_o = head_of<T>(b_.grad_out, seq.batch, head, seq.first_q);
    const auto out = head_of<T>(b_.out, seq.batch, head, seq.first_q);
    pack_b<T>(q.data, q.stride_dim, q.stride_row, p_.dim_qk, seq.len_q, s.q_t, padded_k<T>(p_.dim_qk));
    if (b_.grad_key.data) pack_b<T>(q.data, q.stride_row, q.stride_dim, seq.len_q, p_.dim_qk, s.q, item.queries);
    if (needs_ds())
      pack_b<T>(d_o.data, d_o.stride_dim, d_o.stride_row, p_.dim_v, seq.len_q, s.do_t, padded_k<T>(p_.dim_v));
    if (b_.grad_value.data)
      pack_b<T>(d_o.data, d_o.stride_row, d_o.stride_dim, seq.len_q, p_.dim_v, s.d_o, item.queries);
    const int64_t offset = lse_offset(p_, seq, head);
    const A* lse = static_cast<const A*>(b_.lse) + offset;
    const A* grad_lse = b_.grad_lse ? static_cast<const A*>(b_.grad_lse) + offset : nullptr;
    const A infinity = static_cast<A>(__builtin_inf());
    for (int64_t i = 0; i < item.queries; ++i) {
      // Rows without keys, and rows of padding, get probabilities 2^(-inf) = 0.
      const bool is_empty = i >= seq.len_q || lse[i] == -infinity;
      s.lse[i] = is_empty ? infinity : lse[i];
      s.delta[i] = is_empty ? 0 : dot(d_o, out, i) - (grad_lse ? grad_lse[i] : 0);
    }
  }

  A dot(const HeadView<const T>& x, const HeadView<const T>& y, int64_t row) const {
    const T *a = x.row(row), *b = y.row(row);
    Vec<A> sum{};
    int64_t d = 0;
    if (x.stride_dim == 1 && y.stride_dim == 1)
      for (; d + kLanes<A> <= p_.dim_v; d += kLanes<A>) sum += load_as(a + d) * load_as(b + d);
    A total = reduce_add<A>(sum);
    for (; d < p_.dim_v; ++d) total += load_scalar(a + d * x.stride_dim) * load_scalar(b + d * y.stride_dim);
    return total;
  }

  // The blocks of queries that see any of a block of keys: from first, in steps of kQueries, to end.
  struct Span {
    int64_t first, end;
  };
  static Span queries_of(const Sequence& seq, int64_t k0, int64_t keys) {
    return {seq.first_row(k0) / kQueries * kQueries, seq.end_row(k0, keys)};
  }

  // Whether a mask of blocks leaves anything to do for a block of queries.
  bool sees_any(const Sequence& seq, int64_t head, int64_t k0, int64_t keys, int64_t q0) const {
    return sees_keys(p_, seq.batch, head, q0, least(kQueries, seq.len_q - q0), k0, keys);
  }

  // All queries of one head against one block of keys.
  void run_keys(const Scratch& s, const Item& item, int64_t head, int64_t k0, A* dk, A* dv, A* dq,
                bool has_weights) const {
    const int64_t keys = least(kKeys, item.seq.len_k - k0);
    const Span span = queries_of(item.seq, k0, keys);
    if (span.first >= span.end) return;
    const auto key = head_of<T>(b_.key, item.seq.batch, item.head_kv, item.seq.first_k);
    const auto value = head_of<T>(b_.value, item.seq.batch, item.head_kv, item.seq.first_k);
    pack_a<T>(key.row(k0), key.stride_row, key.stride_dim, keys, p_.dim_qk, s.k, ld_k());
    if (needs_ds()) pack_a<T>(value.row(k0), value.stride_row, value.stride_dim, keys, p_.dim_v, s.v, ld_v());
    if (b_.grad_query.data) pack_a<T>(key.row(k0), key.stride_dim, key.stride_row, p_.dim_qk, keys, s.k_t, kLdKt);
    for (int64_t q0 = span.first; q0 < span.end; q0 += kQueries) {
      if (!sees_any(item.seq, head, k0, keys, q0)) continue;
      const Block block{item.seq, head, k0, keys, q0, least(kQueries, item.queries - q0)};
      run_block(s, item, block, dk, dv, dq, has_weights);
    }
  }

  void probabilities(const Scratch& s, const Block& block, const A* weight) const {
    const int64_t panel = padded_k<T>(p_.dim_qk) * kNr;
    const A* bias = has_bias(p_) ? s.bias : nullptr;
    const E* q_t = s.q_t + block.q0 / kNr * panel;
    if (bias) Blocks::fill_bias(p_, block, s.bias);
    if (is_shaped_) {
      gemm<T>(block.keys, block.queries, p_.dim_qk, s.k, ld_k(), q_t, panel,
              StorePanels<A, kNr>{s.shaped.scores, kPanel});
      Blocks::shape(p_, block, s.shaped, bias);
      Blocks::exponentiate(block, s.shaped.scores, s.lse + block.q0, weight, s.prob);
    } else {
      gemm<T>(block.keys, block.queries, p_.dim_qk, s.k, ld_k(), q_t, panel,
              StoreProbabilities<E, A, kNr>{s.prob, kPanel, s.lse + block.q0, bias, weight, static_cast<A>(p_.scale),
                                            Band<A>(block)});
    }
  }

  // The log-sum-exp of a row is rounded to its own magnitude: at -1e9, where masks put rows without a key, log(n) is
  // lost in it and exp(S - lse) would sum to n. Rows that far out are summed again, and weighed by what their sum lacks
  // to 1.
  bool weigh_rows(const Scratch& s, const Item& item, int64_t head) const {
    int64_t far = 0;
    for (int64_t i = 0; i < item.queries; ++i) far += is_far(s.lse[i]);
    if (far == 0) return false;
    const Sequence& seq = item.seq;
    std::memset(s.weight, 0, item.queries * sizeof(A));
    if (p_.sinks.data) {
      const A sink = head_value<A>(p_.sinks, seq.batch, head);
      for (int64_t i = 0; i < item.queries; ++i) s.weight[i] = exp_of(sink - s.lse[i]);
    }
    for (int64_t k0 = 0; k0 < seq.len_k; k0 += kKeys) {
      const int64_t keys = least(kKeys, seq.len_k - k0);
      const Span span = queries_of(seq, k0, keys);
      const auto key = head_of<T>(b_.key, seq.batch, item.head_kv, seq.first_k);
      pack_a<T>(key.row(k0), key.stride_row, key.stride_dim, keys, p_.dim_qk, s.k, ld_k());
      for (int64_t q0 = span.first; q0 < span.end; q0 += kQueries) {
        if (!sees_any(seq, head, k0, keys, q0)) continue;
        const Block block{seq, head, k0, keys, q0, least(kQueries, item.queries - q0)};
        probabilities(s, block, nullptr);
        for (int64_t i = 0; i < block.queries; i += kLanes<A>) {
          const E* column = s.prob + i / kNr * kPanel + i % kNr;
          Vec<A> sum = load(s.weight + q0 + i);
          for (int64_t j = 0; j < keys; ++j) sum += load_as(column + j * kNr);
          store(s.weight + q0 + i, sum);
        }
      }
    }
    for (int64_t i = 0; i < item.queries; ++i) s.weight[i] = is_far(s.lse[i]) ? 1 / s.weight[i] : 1;
    return true;
  }

  void run_block(const Scratch& s, const Item& item, const Block& block, A* dk, A* dv, A* dq, bool has_weights) const {
    const int64_t keys = block.keys, q0 = block.q0, panels = block.queries / kNr;
    const int64_t panel_v = padded_k<T>(p_.dim_v) * kNr;
    probabilities(s, block, has_weights ? s.weight + q0 : nullptr);
    const E* kept = s.prob;
    if (p_.seeds) {
      Blocks::drop(p_, block, s.prob, s.shaped.dropped);
      kept = s.shaped.dropped;
    }
    GemmBlock<T> blocks[kQueries / kNr];
    if (b_.grad_value.data) {
      for (int64_t i = 0; i < panels; ++i) blocks[i] = {kept + i * kPanel, s.d_o + (q0 + i * kNr) * kNr};
      const int64_t ld = padded_n<T>(p_.dim_v);
      gemm<T>(keys, ld, kNr, blocks, panels, kNr, item.queries * kNr, AddSums<A>{dv, ld});
    }
    if (!needs_ds()) return;
    const E* do_t = s.do_t + q0 / kNr * panel_v;
    if (is_shaped_) {
      gemm<T>(keys, block.queries, p_.dim_v, s.v, ld_v(), do_t, panel_v, StorePanels<A, kNr>{s.shaped.scores, kPanel});
      Blocks::to_score_gradients(block, s.shaped.scores, s.prob, kept, s.delta + q0);
      sums_.add_block(block, item.split, s.shaped.scores);
      Blocks::to_product_gradients(p_, block, s.shaped, s.ds);
    } else {
      gemm<T>(keys, block.queries, p_.dim_v, s.v, ld_v(), do_t, panel_v,
              StoreScoreGradients<E, A, kNr>{s.prob, s.ds, kPanel, s.delta + q0});
    }
    if (b_.grad_key.data) {
      for (int64_t i = 0; i < panels; ++i) blocks[i] = {s.ds + i * kPanel, s.q + (q0 + i * kNr) * kNr};
      const int64_t ld = padded_n<T>(p_.dim_qk);
      gemm<T>(keys, ld, kNr, blocks, panels, kNr, item.queries * kNr, AddSums<A>{dk, ld});
    }
    if (b_.grad_query.data) {
      if constexpr (Traits::kPack > 1) {
        for (int64_t i = 0; i < panels; ++i)
          pack_b_panel<T>(s.ds + i * kPanel, kNr, 1, keys, kNr, s.ds_packed + i * kPanel, padded_k<T>(keys));
      }
      gemm<T>(p_.dim_qk, block.queries, keys, s.k_t, kLdKt, s.ds_packed, kPanel,
              AddToPanels<A, kNr>{dq + q0 / kNr * p_.dim_qk * kNr, p_.dim_qk * kNr});
    }
  }

  void write_keys(const Item& item, int64_t k0, const A* dk, const A* dv) const {
    const int64_t keys = least(kKeys, item.seq.len_k - k0);
    auto write = [&](const View& view, const A* from, int64_t dim, A scale) {
      if (!view.data) return;
      const auto to = head_of<T>(view, item.seq.batch, item.head_kv, item.seq.first_k);
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t d = 0; d < dim; d += kLanes<A>)
          store_as_partial(to.row(k0 + j) + d, load(from + j * padded_n<T>(dim) + d) * scale, dim - d);
    };
    write(b_.grad_key, dk, p_.dim_qk, static_cast<A>(p_.scale));
    write(b_.grad_value, dv, p_.dim_v, A(1));
  }

  // From panels [dim][kNr queries] to rows of queries, a register transpose at a time.
  void write_queries(const Sequence& seq, int64_t head, const A* dq) const {
    constexpr int lanes = kLanes<A>;
    const auto to = head_of<T>(b_.grad_query, seq.batch, head, seq.first_q);
    for (int64_t q0 = 0; q0 < seq.len_q; q0 += lanes) {
      const A* panel = dq + q0 / kNr * p_.dim_qk * kNr + q0 % kNr;
      for (int64_t d0 = 0; d0 < p_.dim_qk; d0 += lanes) {
        Vec<A> tile[lanes];
        for (int i = 0; i < lanes; ++i) tile[i] = load(panel + least(d0 + i, p_.dim_qk - 1) * kNr);
        transpose<A>(tile);
        for (int i = 0; i < lanes && q0 + i < seq.len_q; ++i)
          store_as_partial(to.row(q0 + i) + d0, tile[i] * static_cast<A>(p_.scale), p_.dim_qk - d0);
      }
    }
  }

  void add_parts(int64_t turn, int64_t slice, int64_t g) const {
    const Sequence seq = sequence_of(p_, turns_.batch_of(turn, slice));
    const int64_t used = round_up(seq.len_q, kNr) * p_.dim_qk;
    A* sum = dq_parts_ + (slice * group_ + g) * splits_ * dq_size();
    for (int64_t part = 1; part < splits_; ++part)
      for (int64_t i = 0; i < used; i += kLanes<A>) store(sum + i, load(sum + i) + load(sum + part * dq_size() + i));
    write_queries(seq, turns_.head_of(turn, slice) * group_ + g, sum);
  }

  const BackwardParams& b_;
  const Problem& p_;
  const int64_t group_;
  const Turns turns_;
  GradientSums<T> sums_;
  int64_t splits_;
  bool is_shaped_;
  A* dq_parts_ = nullptr;
};

}  // namespace ptk::PTK_ISA
