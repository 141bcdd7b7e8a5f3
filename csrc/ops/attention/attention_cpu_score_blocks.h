// What the backward does with blocks of scores beyond two products: caps, ALiBi, dropout, and the gradients of what is
// added to scores (mask, slopes, relative bias, sinks).
//
//   layout   a block holds keys x queries, as panels of kNr queries: [panel][key][query in panel]
//   order    gradients that several heads or blocks add to are summed in an order that depends on the shape alone: each
//            item of the backward owns its part of a sum, and parts are added in the order of batches and heads.
#pragma once

#include "attention_cpu_forward.h"

namespace ptk::PTK_ISA {

// Keys k0.. against queries q0.. of one head. Queries count whole panels; the rows of padding have probability 0.
struct Block {
  const Sequence& seq;
  int64_t head;
  int64_t k0, keys, q0, queries;
};

// Which queries of a block see a key, where not all of them do.
template <class A>
struct Band {
  bool is_cut;
  A first, last;  // the query of column c sees the key of row r where r + first <= c <= r + last

  explicit Band(const Block& b) {
    const int64_t offset = b.k0 - b.q0, below = offset - b.seq.high, above = offset - b.seq.low;
    is_cut = below + b.keys > 1 || above < b.queries - 1;
    // What matters is within a block's size, where every A is exact.
    constexpr int64_t kFar = 1 << 20;
    first = static_cast<A>(most(-kFar, least(kFar, below)));
    last = static_cast<A>(most(-kFar, least(kFar, above)));
  }

  inline __attribute__((always_inline)) Vec<A> cut(Vec<A> p, int64_t row, int64_t column) const {
    const Vec<A> ahead = iota<A>() + static_cast<A>(column - row);
    p = ahead < first ? Vec<A>{} : p;
    return ahead > last ? Vec<A>{} : p;
  }
};

// C = sums, in panels of kNr columns.
template <class A, int kNr>
struct StorePanels {
  A* data;
  int64_t panel;
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    store(data + column / kNr * panel + row * kNr + column % kNr, sums);
  }
};

template <class T>
struct ScoreBlocks {
  using E = Element<T>;
  using A = Acc<T>;
  static constexpr int kNr = GemmTraits<T>::kNr;
  static constexpr int64_t kKeys = detail::kUsesTiles<T> ? 128 : 8 * GemmTraits<T>::kMr, kQueries = 128;
  static constexpr int64_t kPanel = kKeys * kNr;
  // Tile loads read whole groups of rows: the last panel needs the room.
  static constexpr int64_t kSize = kQueries * kKeys + 32 * kNr;
  static_assert(kQueries % kNr == 0 && kQueries / kNr <= 64);

  struct Scratch {
    A* scores;   // then their gradients
    A* slope;    // derivative of the cap
    E* dropped;  // probabilities as they met the values
  };

  static Scratch carve(Carver& c, const Problem& p, bool is_needed) {
    Scratch s;
    s.scores = c.take<A>(is_needed ? kSize : 0);
    s.slope = c.take<A>(p.softcap != 0 ? kSize : 0);
    s.dropped = c.take<E>(p.seeds ? kSize : 0);
    return s;
  }

  // Calls body(offset in the block, key, query) for every vector of queries.
  template <class Body>
  PTK_INLINE void for_vectors(const Block& b, const Body& body) {
    for (int64_t q = 0; q < b.queries; q += kLanes<A>) {
      const int64_t column = q / kNr * kPanel + q % kNr;
      for (int64_t j = 0; j < b.keys; ++j) body(column + j * kNr, j, q);
    }
  }

  // |i + diagonal - j| of a vector of queries and a key of the block.
  PTK_INLINE Vec<A> distance(const Block& b, int64_t key, int64_t query) {
    return detail::absolute<A>(iota<A>() + static_cast<A>(b.q0 + query + b.seq.diagonal - b.k0 - key));
  }

  // What is added to the scores of a block: rows of the mask and of the relative bias, transposed in registers.
  static void fill_bias(const Problem& p, const Block& b, A* bias) {
    constexpr int lanes = kLanes<A>;
    alignas(64) A rows[lanes][round_up(kKeys, lanes)];
    for (int64_t q = 0; q < b.queries; q += lanes) {
      // Rows of padding repeat the last: their probabilities are 0 whatever is added.
      for (int i = 0; i < lanes; ++i) fill_bias_row(p, b, least(b.q0 + q + i, b.seq.len_q - 1), rows[i]);
      A* column = bias + q / kNr * kPanel + q % kNr;
      for (int64_t j = 0; j < b.keys; j += lanes) {
        Vec<A> tile[lanes];
        for (int i = 0; i < lanes; ++i) tile[i] = load(rows[i] + j);
        transpose<A>(tile);
        for (int i = 0; i < lanes && j + i < b.keys; ++i) store(column + (j + i) * kNr, tile[i]);
      }
    }
  }

  static void fill_bias_row(const Problem& p, const Block& b, int64_t row, A* to) {
    const int64_t* strides = p.mask.strides;
    if (p.mask_block > 1) {
      std::memset(to, 0, b.keys * sizeof(A));
      hide_blocks(p, b.seq.batch, b.head, row, b.k0, b.keys, to);
    } else {
      with_mask<T>(p, b.seq.batch, b.head, [&](auto* mask) {
        detail::bias_row(mask + row * strides[2] + b.k0 * strides[3], strides[3], b.keys, to);
      });
    }
    if (!p.relative_bias.data) return;
    const A* relative = relative_bias_of<A>(p, b.seq.batch, b.head) + b.k0 - row;
    if (p.mask_kind == MaskKind::none) {
      std::memcpy(to, relative, b.keys * sizeof(A));
    } else {
      for (int64_t j = 0; j < b.keys; ++j) to[j] += relative[j];
    }
  }

  // Products to scores.
  static void shape(const Problem& p, const Block& b, const Scratch& s, const A* bias) {
    A* x = s.scores;
    const A scale = static_cast<A>(p.scale);
    if (p.softcap != 0) {
      const A cap = static_cast<A>(p.softcap), unit = scale / cap;
      for_vectors(b, [&](int64_t at, int64_t, int64_t) __attribute__((always_inline)) {
        const Vec<A> t = detail::tanh_of<A>(load(x + at) * unit);
        store(x + at, t * cap);
        store(s.slope + at, A(1) - t * t);
      });
    } else {
      for_vectors(b, [&](int64_t at, int64_t, int64_t)
                         __attribute__((always_inline)) { store(x + at, load(x + at) * scale); });
    }
    if (p.alibi.data) {
      const A slope = head_value<A>(p.alibi, b.seq.batch, b.head);
      for_vectors(b, [&](int64_t at, int64_t key, int64_t query) __attribute__((always_inline)) {
        store(x + at, load(x + at) - distance(b, key, query) * slope);
      });
    }
    if (bias) {
      for_vectors(b, [&](int64_t at, int64_t, int64_t)
                         __attribute__((always_inline)) { store(x + at, load(x + at) + load(bias + at)); });
    }
  }

  // Scores to probabilities; lse and weight (null: 1) are the block's own.
  static void exponentiate(const Block& b, const A* scores, const A* lse, const A* weight, E* prob) {
    const Band<A> band(b);
    for (int64_t q = 0; q < b.queries; q += kLanes<A>) {
      const int64_t column = q / kNr * kPanel + q % kNr;
      const Vec<A> shift = load(lse + q), factor = weight ? load(weight + q) : broadcast(A(1));
      for (int64_t j = 0; j < b.keys; ++j) {
        const int64_t at = column + j * kNr;
        Vec<A> p = softmax_exp2<E>((load(scores + at) - shift) * static_cast<A>(kLog2E)) * factor;
        if (band.is_cut) p = band.cut(p, j, q);
        store_as(prob + at, p);
      }
    }
  }

  // dropped = prob / kept share where kept, 0 where dropped. The generator's lanes are keys, the block's are queries.
  static void drop(const Problem& p, const Block& b, const E* prob, E* dropped) {
    constexpr int lanes = kLanes<float>, rows = Dropout::kRows;
    const Dropout dropout = Dropout::of(p, b.seq.batch, b.head);
    const A factor = 1 / kept_share<A>(p);
    for (int64_t q = 0; q < b.queries; q += lanes) {
      const int64_t column = q / kNr * kPanel + q % kNr;
      for (int64_t j = 0; j < b.keys; j += lanes) {
        Vec<float> tile[lanes];
        for (int i = 0; i < lanes; i += rows) {
          Vec<int32_t> keep[rows];
          dropout.draw((b.q0 + q + i) / rows, b.k0 + j, keep);
          for (int m = 0; m < least(rows, lanes); ++m)
            tile[i + m] = bit_cast<Vec<float>>(keep[lanes < rows ? (q + m) % rows : m]);
        }
        transpose<float>(tile);
        for (int i = 0; i < lanes && j + i < b.keys; ++i) {
          const int64_t at = column + (j + i) * kNr;
          detail::keep_lanes<E>(prob + at, bit_cast<Vec<int32_t>>(tile[i]), factor, dropped + at);
        }
      }
    }
  }

  // dS = dropped * dP - P * delta, over dP; `dropped` is P itself without dropout.
  static void to_score_gradients(const Block& b, A* grads, const E* prob, const E* dropped, const A* delta) {
    for_vectors(b, [&](int64_t at, int64_t, int64_t query) __attribute__((always_inline)) {
      store(grads + at, load_as(dropped + at) * load(grads + at) - load_as(prob + at) * load(delta + query));
    });
  }

  // Gradients of scores to gradients of scale * product, as the products take them.
  static void to_product_gradients(const Problem& p, const Block& b, const Scratch& s, E* ds) {
    if (p.softcap != 0) {
      for_vectors(b, [&](int64_t at, int64_t, int64_t) __attribute__((always_inline)) {
        store_as(ds + at, load(s.scores + at) * load(s.slope + at));
      });
    } else {
      for_vectors(b, [&](int64_t at, int64_t, int64_t)
                         __attribute__((always_inline)) { store_as(ds + at, load(s.scores + at)); });
    }
  }
};

// Whether something is added to scores pair by pair.
PTK_INLINE bool has_bias(const Problem& p) {
  return p.mask_kind != MaskKind::none || p.relative_bias.data;
}

// Gradients of mask, slopes, sinks and relative bias: parts summed while blocks are computed, and their sums.
template <class T>
class GradientSums {
  using A = Acc<T>;
  using Blocks = ScoreBlocks<T>;

public:
  explicit GradientSums(const BackwardParams& b) : b_(b), p_(b.problem) {}
  ~GradientSums() { __builtin_free(memory_); }
  GradientSums(const GradientSums&) = delete;
  GradientSums& operator=(const GradientSums&) = delete;

  // A gradient for every pair of row and key; otherwise it is summed over rows, or over keys, where softmax makes it a
  // function of the row alone.
  static bool is_full_mask(const BackwardParams& b) {
    return b.grad_mask.data && b.grad_mask.strides[2] != 0 && b.grad_mask.strides[3] != 0;
  }

  bool needs_score_gradients() const {
    return b_.grad_alibi.data || b_.grad_relative.data || is_full_mask(b_) || has_key_sums();
  }

  // False when memory ran out.
  bool allocate(int64_t splits) {
    splits_ = splits;
    const int64_t heads = p_.batch * p_.heads_q;
    const int64_t keys = has_key_sums() ? heads * p_.len_k : 0, rows = has_row_sums() ? heads * p_.len_q : 0;
    const int64_t slopes = b_.grad_alibi.data ? heads * splits : 0, sinks = b_.grad_sinks.data ? heads : 0;
    const int64_t relative = b_.grad_relative.data ? heads * splits * p_.distances : 0;
    const int64_t all = keys + rows + slopes + sinks + relative;
    if (all == 0) return true;
    memory_ = static_cast<double*>(__builtin_calloc(all, sizeof(double)));
    keys_ = memory_;
    rows_ = keys_ + keys;
    slopes_ = rows_ + rows;
    sinks_ = slopes_ + slopes;
    relative_ = sinks_ + sinks;
    return memory_;
  }

  // Of all rows of a head: lse is inf in rows without keys, delta = rowsum(dO * O) - dlse.
  void add_rows(const Sequence& seq, int64_t head, const A* lse, const A* delta, const A* weight) const {
    if (!has_row_sums() && !b_.grad_sinks.data) return;
    const int64_t of_head = seq.batch * p_.heads_q + head;
    const A* grad_lse = b_.grad_lse ? static_cast<const A*>(b_.grad_lse) + lse_offset(p_, seq, head) : nullptr;
    const A sink = p_.sinks.data ? head_value<A>(p_.sinks, seq.batch, head) : -static_cast<A>(__builtin_inf());
    for (int64_t i = 0; i < seq.len_q; ++i) {
      if (lse[i] == static_cast<A>(__builtin_inf())) continue;
      const double at_sink = exp_of(sink - lse[i]) * (weight ? weight[i] : A(1)) * delta[i];
      if (has_row_sums()) rows_[of_head * p_.len_q + i] = (grad_lse ? grad_lse[i] : A(0)) + at_sink;
      if (b_.grad_sinks.data) sinks_[of_head] -= at_sink;
    }
  }

  // Of a block of score gradients.
  void add_block(const Block& b, int64_t split, const A* grads) const {
    const int64_t of_head = b.seq.batch * p_.heads_q + b.head;
    if (b_.grad_alibi.data) slopes_[of_head * splits_ + split] -= distance_sum(b, grads);
    if (b_.grad_relative.data)
      add_to_distances(b, grads, relative_ + (split * p_.batch * p_.heads_q + of_head) * p_.distances);
    if (has_key_sums()) {
      for (int64_t j = 0; j < b.keys; ++j) {
        Vec<A> sum{};
        for (int64_t q = 0; q < b.queries; q += kLanes<A>)
          sum += load(grads + q / Blocks::kNr * Blocks::kPanel + j * Blocks::kNr + q % Blocks::kNr);
        keys_[of_head * p_.len_k + b.k0 + j] += reduce_add<A>(sum);
      }
    } else if (is_full_mask(b_)) {
      add_to_mask(b, grads);
    }
  }

  void finish() const {
    const int64_t* mask = b_.grad_mask.strides;
    if (has_key_sums()) reduce(keys_, p_.len_k, b_.grad_mask.data, mask[0], mask[1], mask[3]);
    if (has_row_sums()) reduce(rows_, p_.len_q, b_.grad_mask.data, mask[0], mask[1], mask[2]);
    const View &slopes = b_.grad_alibi, &sinks = b_.grad_sinks;
    if (slopes.data) reduce(slopes_, splits_, slopes.data, slopes.strides[0], slopes.strides[1], 0);
    if (sinks.data) reduce(sinks_, 1, sinks.data, sinks.strides[0], sinks.strides[1], 0);
    if (const View& relative = b_.grad_relative; relative.data) {
      const int64_t of_split = p_.batch * p_.heads_q * p_.distances;
      for (int64_t split = 1; split < splits_; ++split)
        for (int64_t i = 0; i < of_split; ++i) relative_[i] += relative_[split * of_split + i];
      reduce(relative_, p_.distances, relative.data, relative.strides[0], relative.strides[1], relative.strides[2]);
    }
  }

private:
  bool has_row_sums() const { return b_.grad_mask.data && b_.grad_mask.strides[3] == 0; }
  bool has_key_sums() const {
    return b_.grad_mask.data && b_.grad_mask.strides[3] != 0 && b_.grad_mask.strides[2] == 0;
  }

  static double distance_sum(const Block& b, const A* grads) {
    double total = 0;
    for (int64_t q = 0; q < b.queries; q += kLanes<A>) {
      Vec<A> sum{};
      const A* column = grads + q / Blocks::kNr * Blocks::kPanel + q % Blocks::kNr;
      for (int64_t j = 0; j < b.keys; ++j) sum += load(column + j * Blocks::kNr) * Blocks::distance(b, j, q);
      total += reduce_add<A>(sum);
    }
    return total;
  }

  // Sums of the block's diagonals. Lanes are queries, along which distances fall. Neighbouring vectors of a key go
  // first: those of the next key overlap them, and would wait for their stores.
  void add_to_distances(const Block& b, const A* grads, double* sums) const {
    constexpr int lanes = kLanes<A>;
    A part[Blocks::kKeys + Blocks::kQueries + lanes] = {};
    for (int64_t j = 0; j < b.keys; ++j) {
      for (int64_t q = 0; q < b.queries; q += lanes) {
        Vec<A> row = load(grads + q / Blocks::kNr * Blocks::kPanel + j * Blocks::kNr + q % Blocks::kNr);
        A* at = part + j + b.queries - q - lanes;
        store(at, load(at) + reversed<A>(row, std::make_integer_sequence<int, lanes>{}));
      }
    }
    // Rows of padding, whose gradients are 0, would lie before the first distance.
    const int64_t first = b.k0 - b.q0 - b.queries + 1 + p_.distance_zero;
    for (int64_t i = most(0, -first); i < b.keys + b.queries - 1; ++i) sums[first + i] += part[i];
  }

  template <class Of, int... I>
  PTK_INLINE Vec<Of> reversed(Vec<Of> v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (kLanes<Of> - 1 - I)...);
  }

  // Rows of the mask's gradient are contiguous; the block is transposed in registers on its way.
  void add_to_mask(const Block& b, const A* grads) const {
    constexpr int lanes = kLanes<A>;
    A* mask =
        static_cast<A*>(b_.grad_mask.data) + b.seq.batch * b_.grad_mask.strides[0] + b.head * b_.grad_mask.strides[1];
    for (int64_t q = 0; q < b.queries; q += lanes) {
      const A* column = grads + q / Blocks::kNr * Blocks::kPanel + q % Blocks::kNr;
      for (int64_t j = 0; j < b.keys; j += lanes) {
        Vec<A> tile[lanes];
        for (int i = 0; i < lanes; ++i) tile[i] = load(column + least(j + i, b.keys - 1) * Blocks::kNr);
        transpose<A>(tile);
        for (int i = 0; i < lanes && b.q0 + q + i < b.seq.len_q; ++i) {
          A* row = mask + (b.q0 + q + i) * b_.grad_mask.strides[2] + b.k0 + j;
          store_partial(row, load_partial(row, b.keys - j) + tile[i], b.keys - j);
        }
      }
    }
  }

  // to[batch, head, i] = parts[batch, head, i] summed over the dimensions in which `to` has stride 0.
  void reduce(const double* parts, int64_t n, void* data, int64_t stride_batch, int64_t stride_head,
              int64_t stride) const {
    A* to = static_cast<A*>(data);
    const int64_t batches = stride_batch ? p_.batch : 1, heads = stride_head ? p_.heads_q : 1, columns = stride ? n : 1;
    for (int64_t i = 0; i < batches * heads * columns; ++i) {
      const int64_t batch = i / columns / heads, head = i / columns % heads, column = i % columns;
      double sum = 0;
      for (int64_t b = batch; b < (stride_batch ? batch + 1 : p_.batch); ++b)
        for (int64_t h = head; h < (stride_head ? head + 1 : p_.heads_q); ++h)
          for (int64_t c = column; c < (stride ? column + 1 : n); ++c) sum += parts[(b * p_.heads_q + h) * n + c];
      to[batch * stride_batch + head * stride_head + column * stride] = static_cast<A>(sum);
    }
  }

  const BackwardParams& b_;
  const Problem& p_;
  int64_t splits_ = 1;
  double *memory_ = nullptr, *keys_ = nullptr, *rows_ = nullptr, *slopes_ = nullptr, *sinks_ = nullptr,
         *relative_ = nullptr;
};

}  // namespace ptk::PTK_ISA
