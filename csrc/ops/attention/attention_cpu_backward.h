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

#include "attention_cpu_forward.h"

namespace ptk::PTK_ISA {

// P^T = exp(S^T * scale + bias - lse) * weight, rows = keys, columns = queries of a block. E is what the products
// multiply.
template <class E, class A, int kNr>
struct StoreProbabilities {
  static constexpr bool kLarge = true;
  E* prob;
  int64_t panel;    // elements between panels
  const A* lse;     // of the block's queries
  const A* bias;    // laid out like prob; null without a mask
  const A* weight;  // of the block's queries; null where all are 1
  A scale;
  bool is_diagonal;   // the causal boundary runs through this block:
  int64_t first_key;  // key of row 0 minus query of column 0

  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    const int64_t at = column / kNr * panel + row * kNr + column % kNr;
    Vec<A> x = sums * scale;
    if (bias) x += load(bias + at);
    Vec<A> p = softmax_exp2<E>((x - load(lse + column)) * static_cast<A>(kLog2E));
    if (weight) p *= load(weight + column);
    if (is_diagonal) p = iota<A>() + static_cast<A>(column) < static_cast<A>(row + first_key) ? Vec<A>{} : p;
    store_as(prob + at, p);
  }
};

// dS^T = P^T * (dP^T - delta)
template <class E, class A, int kNr>
struct StoreScoreGradients {
  static constexpr bool kLarge = true;
  const E* prob;
  E* grad;
  int64_t panel;
  const A* delta;

  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    const int64_t at = column / kNr * panel + row * kNr + column % kNr;
    store_as(grad + at, load_as(prob + at) * (sums - load(delta + column)));
  }
};

// dQ^T += sums, in panels of kNr queries.
template <class A, int kNr>
struct AddToPanels {
  A* data;
  int64_t panel;
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    A* p = data + column / kNr * panel + row * kNr + column % kNr;
    store(p, load(p) + sums);
  }
};

template <class T>
class TiledBackward {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  static constexpr int kNr = Traits::kNr;

public:
  static constexpr int64_t kKeys = detail::kUsesTiles<T> ? 128 : 8 * Traits::kMr;
  static constexpr int64_t kQueries = 128;
  static_assert(kQueries % kNr == 0 && kQueries / kNr <= 64);

  explicit TiledBackward(const BackwardParams& params)
      : b_(params), p_(params.problem), group_(p_.heads_q / p_.heads_kv), queries_(round_up(p_.len_q, kNr)),
        key_blocks_((p_.len_k + kKeys - 1) / kKeys) {
    splits_ = most(1, least(kItems / (p_.batch * p_.heads_kv), p_.len_k / kLeastKeysOfSplit));
  }

  // False when memory ran out.
  bool run() {
    const bool split_dq = splits_ > 1 && b_.grad_query.data;
    if (split_dq) {
      dq_parts_ = static_cast<A*>(__builtin_malloc(p_.batch * p_.heads_q * splits_ * dq_size() * sizeof(A)));
      if (!dq_parts_) return false;
    }
    bool ok = true;
    auto item = [&](int64_t i) {
      if (!run_item(i / splits_, i % splits_)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    };
    const int64_t items = p_.batch * p_.heads_kv * splits_;
    if (p_.batch * p_.heads_q * p_.len_q * p_.len_k * (p_.dim_qk + p_.dim_v) < kParallelWork) {
      for (int64_t i = 0; i < items; ++i) item(i);
    } else {
      parallel_items(items, item);
    }
    if (split_dq) {
      if (ok) parallel_items(p_.batch * p_.heads_q, [&](int64_t head) { add_parts(head); });
      __builtin_free(dq_parts_);
    }
    return ok;
  }

private:
  static constexpr int64_t kParallelWork = 1 << 16;
  static constexpr int64_t kItems = 8, kLeastKeysOfSplit = 512;
  static constexpr int64_t kPad = 64 / sizeof(E);
  static constexpr int64_t kPanel = kKeys * kNr;

  bool needs_ds() const { return b_.grad_query.data || b_.grad_key.data; }
  int64_t dq_size() const { return queries_ * p_.dim_qk; }
  int64_t ld_k() const { return padded_k<T>(p_.dim_qk) + kPad; }
  int64_t ld_v() const { return padded_k<T>(p_.dim_v) + kPad; }
  static constexpr int64_t kLdKt = round_up(kKeys, Traits::kKStep) + kPad;
  int64_t key_blocks_of(int64_t split) const { return (key_blocks_ - split + splits_ - 1) / splits_; }

  struct Scratch {
    E *q_t, *q, *do_t, *d_o;  // one head: panels of queries over dims (_t),
                              // panels of dims over queries
    A *lse, *delta, *weight, *dq;
    E *k, *k_t, *v;  // one block of keys, rows
    E *prob, *ds, *ds_packed;
    A *bias, *dk, *dv;
  };

  Scratch carve(Carver& c) const {
    Scratch s;
    s.q_t = c.take<E>(padded_k<T>(p_.dim_qk) * queries_);
    s.q = c.take<E>(queries_ * padded_n<T>(p_.dim_qk));
    s.do_t = c.take<E>(padded_k<T>(p_.dim_v) * queries_);
    s.d_o = c.take<E>(queries_ * padded_n<T>(p_.dim_v));
    s.lse = c.take<A>(queries_);
    s.delta = c.take<A>(queries_);
    s.weight = c.take<A>(queries_);
    s.dq = c.take<A>(dq_size());
    s.k = c.take<E>(round_up(kKeys, 32) * ld_k());
    s.k_t = c.take<E>(round_up(p_.dim_qk, 32) * kLdKt);
    s.v = c.take<E>(round_up(kKeys, 32) * ld_v());
    // Tile loads read whole groups of rows: the last panel needs the room.
    constexpr int64_t block = kQueries * kKeys + 32 * kNr;
    s.prob = c.take<E>(block);
    s.ds = c.take<E>(block);
    s.ds_packed = Traits::kPack > 1 ? c.take<E>(block) : s.ds;
    s.bias = c.take<A>(p_.mask_kind == MaskKind::none ? 0 : block);
    const int64_t kept = (group_ > 1 ? key_blocks_of(0) : 1) * kKeys;
    s.dk = c.take<A>(kept * padded_n<T>(p_.dim_qk));
    s.dv = c.take<A>(kept * padded_n<T>(p_.dim_v));
    return s;
  }

  bool run_item(int64_t head_kv, int64_t split) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    const int64_t batch = head_kv / p_.heads_kv;
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = head_kv % p_.heads_kv * group_ + g;
      A* dq = dq_parts_ ? dq_parts_ + ((batch * p_.heads_q + head) * splits_ + split) * dq_size() : s.dq;
      pack_queries(s, batch, head);
      const bool has_weights = weigh_rows(s, batch, head);
      if (b_.grad_query.data) std::memset(dq, 0, dq_size() * sizeof(A));
      for (int64_t i = 0; i < key_blocks_of(split); ++i) {
        const int64_t kept = group_ > 1 ? i * kKeys : 0;
        A* dk = s.dk + kept * padded_n<T>(p_.dim_qk);
        A* dv = s.dv + kept * padded_n<T>(p_.dim_v);
        const int64_t k0 = (i * splits_ + split) * kKeys;
        if (g == 0) {
          const int64_t keys = least(kKeys, p_.len_k - k0);
          std::memset(dk, 0, keys * padded_n<T>(p_.dim_qk) * sizeof(A));
          std::memset(dv, 0, keys * padded_n<T>(p_.dim_v) * sizeof(A));
        }
        run_keys(s, batch, head, k0, dk, dv, dq, has_weights);
        if (g == group_ - 1) write_keys(batch, head_kv % p_.heads_kv, k0, dk, dv);
      }
      if (b_.grad_query.data && !dq_parts_) write_queries(batch, head, dq);
    }
    release_large_scratch();
    return true;
  }

  void pack_queries(const Scratch& s, int64_t batch, int64_t head) const {
    const auto q = head_of<T>(b_.query, batch, head), d_o = head_of<T>(b_.grad_out, batch, head);
    const auto out = head_of<T>(b_.out, batch, head);
    pack_b<T>(q.data, q.stride_dim, q.stride_row, p_.dim_qk, p_.len_q, s.q_t, padded_k<T>(p_.dim_qk));
    if (b_.grad_key.data) pack_b<T>(q.data, q.stride_row, q.stride_dim, p_.len_q, p_.dim_qk, s.q, queries_);
    if (needs_ds())
      pack_b<T>(d_o.data, d_o.stride_dim, d_o.stride_row, p_.dim_v, p_.len_q, s.do_t, padded_k<T>(p_.dim_v));
    if (b_.grad_value.data) pack_b<T>(d_o.data, d_o.stride_row, d_o.stride_dim, p_.len_q, p_.dim_v, s.d_o, queries_);
    const A* lse = static_cast<const A*>(b_.lse) + (batch * p_.heads_q + head) * p_.len_q;
    const A* grad_lse =
        b_.grad_lse ? static_cast<const A*>(b_.grad_lse) + (lse - static_cast<const A*>(b_.lse)) : nullptr;
    const A infinity = static_cast<A>(__builtin_inf());
    for (int64_t i = 0; i < queries_; ++i) {
      // Rows without keys, and rows of padding, get probabilities 2^(-inf) = 0.
      const bool is_empty = i >= p_.len_q || lse[i] == -infinity;
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

  // All queries of one head against one block of keys.
  void run_keys(const Scratch& s, int64_t batch, int64_t head, int64_t k0, A* dk, A* dv, A* dq,
                bool has_weights) const {
    const int64_t keys = least(kKeys, p_.len_k - k0), head_kv = head / group_;
    const int64_t first_query = p_.is_causal ? k0 / kQueries * kQueries : 0;
    if (first_query >= p_.len_q) return;
    const auto key = head_of<T>(b_.key, batch, head_kv), value = head_of<T>(b_.value, batch, head_kv);
    pack_a<T>(key.row(k0), key.stride_row, key.stride_dim, keys, p_.dim_qk, s.k, ld_k());
    if (needs_ds()) pack_a<T>(value.row(k0), value.stride_row, value.stride_dim, keys, p_.dim_v, s.v, ld_v());
    if (b_.grad_query.data) pack_a<T>(key.row(k0), key.stride_dim, key.stride_row, p_.dim_qk, keys, s.k_t, kLdKt);
    for (int64_t q0 = first_query; q0 < p_.len_q; q0 += kQueries)
      run_block(s, batch, head, k0, keys, q0, dk, dv, dq, has_weights);
  }

  void probabilities(const Scratch& s, int64_t batch, int64_t head, int64_t k0, int64_t keys, int64_t q0,
                     const A* weight) const {
    const int64_t queries = least(kQueries, queries_ - q0), panel = padded_k<T>(p_.dim_qk) * kNr;
    const bool has_mask = p_.mask_kind != MaskKind::none, is_diagonal = p_.is_causal && q0 < k0 + keys - 1;
    if (has_mask) fill_bias(s.bias, batch, head, k0, keys, q0);
    gemm<T>(keys, queries, p_.dim_qk, s.k, ld_k(), s.q_t + q0 / kNr * panel, panel,
            StoreProbabilities<E, A, kNr>{s.prob, kPanel, s.lse + q0, has_mask ? s.bias : nullptr, weight,
                                          static_cast<A>(p_.scale), is_diagonal, k0 - q0});
  }

  // The log-sum-exp of a row is rounded to its own magnitude: at -1e9, where masks put rows without a key, log(n) is
  // lost in it and exp(S - lse) would sum to n. Rows that far out are summed again, and weighed by what their sum lacks
  // to 1.
  bool weigh_rows(const Scratch& s, int64_t batch, int64_t head) const {
    constexpr A kSafe = 64;
    auto is_far = [&](int64_t i) { return __builtin_isfinite(s.lse[i]) && __builtin_fabs(s.lse[i]) > kSafe; };
    int64_t far = 0;
    for (int64_t i = 0; i < queries_; ++i) far += is_far(i);
    if (far == 0) return false;
    std::memset(s.weight, 0, queries_ * sizeof(A));
    for (int64_t k0 = 0; k0 < p_.len_k; k0 += kKeys) {
      const int64_t keys = least(kKeys, p_.len_k - k0);
      const auto key = head_of<T>(b_.key, batch, head / group_);
      pack_a<T>(key.row(k0), key.stride_row, key.stride_dim, keys, p_.dim_qk, s.k, ld_k());
      for (int64_t q0 = p_.is_causal ? k0 / kQueries * kQueries : 0; q0 < p_.len_q; q0 += kQueries) {
        probabilities(s, batch, head, k0, keys, q0, nullptr);
        for (int64_t i = q0; i < least(q0 + kQueries, queries_); i += kLanes<A>) {
          const E* column = s.prob + (i - q0) / kNr * kPanel + i % kNr;
          Vec<A> sum = load(s.weight + i);
          for (int64_t j = 0; j < keys; ++j) sum += load_as(column + j * kNr);
          store(s.weight + i, sum);
        }
      }
    }
    for (int64_t i = 0; i < queries_; ++i) s.weight[i] = is_far(i) ? 1 / s.weight[i] : 1;
    return true;
  }

  void run_block(const Scratch& s, int64_t batch, int64_t head, int64_t k0, int64_t keys, int64_t q0, A* dk, A* dv,
                 A* dq, bool has_weights) const {
    const int64_t queries = least(kQueries, queries_ - q0), panels = queries / kNr;
    const int64_t panel_v = padded_k<T>(p_.dim_v) * kNr;
    probabilities(s, batch, head, k0, keys, q0, has_weights ? s.weight + q0 : nullptr);
    GemmBlock<T> blocks[kQueries / kNr];
    if (b_.grad_value.data) {
      for (int64_t i = 0; i < panels; ++i) blocks[i] = {s.prob + i * kPanel, s.d_o + (q0 + i * kNr) * kNr};
      const int64_t ld = padded_n<T>(p_.dim_v);
      gemm<T>(keys, ld, kNr, blocks, panels, kNr, queries_ * kNr, AddSums<A>{dv, ld});
    }
    if (!needs_ds()) return;
    gemm<T>(keys, queries, p_.dim_v, s.v, ld_v(), s.do_t + q0 / kNr * panel_v, panel_v,
            StoreScoreGradients<E, A, kNr>{s.prob, s.ds, kPanel, s.delta + q0});
    if (b_.grad_key.data) {
      for (int64_t i = 0; i < panels; ++i) blocks[i] = {s.ds + i * kPanel, s.q + (q0 + i * kNr) * kNr};
      const int64_t ld = padded_n<T>(p_.dim_qk);
      gemm<T>(keys, ld, kNr, blocks, panels, kNr, queries_ * kNr, AddSums<A>{dk, ld});
    }
    if (b_.grad_query.data) {
      if constexpr (Traits::kPack > 1) {
        for (int64_t i = 0; i < panels; ++i)
          pack_b_panel<T>(s.ds + i * kPanel, kNr, 1, keys, kNr, s.ds_packed + i * kPanel, padded_k<T>(keys));
      }
      gemm<T>(p_.dim_qk, queries, keys, s.k_t, kLdKt, s.ds_packed, kPanel,
              AddToPanels<A, kNr>{dq + q0 / kNr * p_.dim_qk * kNr, p_.dim_qk * kNr});
    }
  }

  // The mask of a block, transposed into the layout of prob.
  void fill_bias(A* bias, int64_t batch, int64_t head, int64_t k0, int64_t keys, int64_t q0) const {
    with_mask<T>(p_, batch, head, [&](auto* mask) {
      using M = std::remove_const_t<std::remove_pointer_t<decltype(mask)>>;
      for (int64_t i = 0; i < kQueries && q0 + i < queries_; ++i) {
        const auto* row = mask + (q0 + i) * p_.mask.strides[2] + k0 * p_.mask.strides[3];
        A* column = bias + i / kNr * kPanel + i % kNr;
        for (int64_t j = 0; j < keys; ++j)
          column[j * kNr] = q0 + i < p_.len_q ? detail::mask_bias<M, A>(row[j * p_.mask.strides[3]]) : A(0);
      }
    });
  }

  void write_keys(int64_t batch, int64_t head_kv, int64_t k0, const A* dk, const A* dv) const {
    const int64_t keys = least(kKeys, p_.len_k - k0);
    auto write = [&](const View& view, const A* from, int64_t dim, A scale) {
      if (!view.data) return;
      const auto to = head_of<T>(view, batch, head_kv);
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t d = 0; d < dim; d += kLanes<A>)
          store_as_partial(to.row(k0 + j) + d, load(from + j * padded_n<T>(dim) + d) * scale, dim - d);
    };
    write(b_.grad_key, dk, p_.dim_qk, static_cast<A>(p_.scale));
    write(b_.grad_value, dv, p_.dim_v, A(1));
  }

  // From panels [dim][kNr queries] to rows of queries, a register transpose at
  // a time.
  void write_queries(int64_t batch, int64_t head, const A* dq) const {
    constexpr int lanes = kLanes<A>;
    const auto to = head_of<T>(b_.grad_query, batch, head);
    for (int64_t q0 = 0; q0 < p_.len_q; q0 += lanes) {
      const A* panel = dq + q0 / kNr * p_.dim_qk * kNr + q0 % kNr;
      for (int64_t d0 = 0; d0 < p_.dim_qk; d0 += lanes) {
        Vec<A> tile[lanes];
        for (int i = 0; i < lanes; ++i) tile[i] = load(panel + least(d0 + i, p_.dim_qk - 1) * kNr);
        transpose<A>(tile);
        for (int i = 0; i < lanes && q0 + i < p_.len_q; ++i)
          store_as_partial(to.row(q0 + i) + d0, tile[i] * static_cast<A>(p_.scale), p_.dim_qk - d0);
      }
    }
  }

  void add_parts(int64_t head) const {
    A* sum = dq_parts_ + head * splits_ * dq_size();
    for (int64_t part = 1; part < splits_; ++part)
      for (int64_t i = 0; i < dq_size(); i += kLanes<A>)
        store(sum + i, load(sum + i) + load(sum + part * dq_size() + i));
    write_queries(head / p_.heads_q, head % p_.heads_q, sum);
  }

  const BackwardParams& b_;
  const Problem& p_;
  const int64_t group_, queries_, key_blocks_;
  int64_t splits_;
  A* dq_parts_ = nullptr;
};

}  // namespace ptk::PTK_ISA
