// Forward on the CPU: softmax(scores) V without the matrix of scores.
//
//   equation   per block of keys:  m' = max(m, rowmax S),  P = exp(S - m'),  l = l exp(m - m') + rowsum P,
//              O = O exp(m - m') + P V;   at the end  out = O / l,  lse = m + log l
//
//   layout     one head's K^T and V are packed once into the engine's panels, in the thread's own memory, and reused
//              for every block of queries and every query head of the group.
//
//   tiling     kQueries x kKeys scores at a time; S (and P for 16-bit products) stay in L2, a panel of K or V in L1.
//              Keys that no row of the block sees are neither packed nor multiplied.
//
//   threads    blocks of queries are dealt out in runs of equal cost; each is computed in an order that does not depend
//              on the run it is in, so results do not depend on the number of threads.
#pragma once

#include "attention_cpu_scores.h"

namespace ptk::PTK_ISA {

// O = O * factor + sums, the rescaling of the online softmax fused into the product.
template <class A>
struct RescaleAndAdd {
  A* out;
  int64_t ld;
  const A* factor;
  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<A> sums, int64_t) const {
    A* p = out + row * ld + column;
    store(p, load(p) * factor[row] + sums);
  }
};

// As exact as its result can show: P is what the probabilities are rounded to.
template <class P>
PTK_INLINE Vec<Acc<P>> softmax_exp2(Vec<Acc<P>> x) {
  if constexpr (sizeof(P) == 2) {
    return exp2<4>(x);
  } else {
    return exp2(x);
  }
}

// Lane by lane.
template <class A>
PTK_INLINE Vec<A> row_maxima(const A* s, int64_t n) {
  const A lowest = -static_cast<A>(__builtin_inf());
  Vec<A> m0 = broadcast(lowest), m1 = m0;
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>) {
    m0 = max(m0, load(s + j));
    m1 = max(m1, load(s + j + kLanes<A>));
  }
  // Rows are padded to whole vectors; what lies past n does not count.
  const Vec<A> lane = iota<A>();
  for (; j < n; j += kLanes<A>) m1 = max(m1, lane < static_cast<A>(n - j) ? load(s + j) : broadcast(lowest));
  return max(m0, m1);
}

template <class A>
PTK_INLINE A row_max(const A* s, int64_t n) {
  return reduce_max<A>(row_maxima(s, n));
}

namespace detail {

// p[j] = 2^exponent(s[j]) for j < n, zeros up to n_padded; returns the sums lane by lane. p may be s.
template <class A, class P, class Exponent>
PTK_INLINE Vec<A> exp2_sums(const A* s, P* p, int64_t n, int64_t n_padded, const Exponent& exponent) {
  Vec<A> sum0{}, sum1{};
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>) {
    Vec<A> p0 = softmax_exp2<P>(exponent(load(s + j)));
    Vec<A> p1 = softmax_exp2<P>(exponent(load(s + j + kLanes<A>)));
    sum0 += p0;
    sum1 += p1;
    store_pair_as(p + j, p0, p1);
  }
  // Rows are padded to whole vectors, so the rest is computed in full and the lanes past n are cleared. Every vector
  // goes to the sum that its place names, wherever n is: a row's sum is the same whether keys are hidden or not there.
  const Vec<A> lane = iota<A>();
  for (; j < n_padded; j += kLanes<A>) {
    Vec<A> v = softmax_exp2<P>(exponent(load(s + j)));
    v = lane < static_cast<A>(n - j) ? v : Vec<A>{};
    const Vec<A> added = sum0 + v;
    sum0 = sum1;
    sum1 = added;
    store_as(p + j, v);
  }
  return sum0 + sum1;
}

}  // namespace detail

// p[j] = 2^((s[j] - shift) * scale) for j < n, zeros up to n_padded; returns the sums lane by lane. p may be s.
template <class A, class P>
PTK_INLINE Vec<A> exp2_row_sums(const A* s, P* p, int64_t n, int64_t n_padded, A scale, A shift) {
  // One operation less. It multiplies all of a row by what the offset was rounded by, which 16 bits do not show, and
  // overflows with scores near the largest number.
  if (sizeof(P) == 2 && __builtin_fabs(shift * scale) < A(1e37)) {
    // Rounded by itself: which of the two products is contracted would be the compiler's choice.
    Vec<A> offset = broadcast(shift * scale);
    PTK_OPAQUE(offset);
    return detail::exp2_sums(s, p, n, n_padded,
                             [=](Vec<A> x) __attribute__((always_inline)) { return x * scale - offset; });
  }
  return detail::exp2_sums(s, p, n, n_padded,
                           [=](Vec<A> x) __attribute__((always_inline)) { return (x - shift) * scale; });
}

template <class A, class P>
PTK_INLINE A exp2_row(const A* s, P* p, int64_t n, int64_t n_padded, A scale, A shift) {
  return reduce_add<A>(exp2_row_sums(s, p, n, n_padded, scale, shift));
}

// G is what the engine multiplies: T, or pieces of float32.
template <class T, class G = T>
class TiledForward {
  using E = Element<G>;
  using A = Acc<T>;
  using Traits = GemmTraits<G>;
  static constexpr bool kInPieces = !std::is_same_v<G, T>;
  static constexpr bool kSeparateP = !std::is_same_v<E, A>;

public:
  static constexpr int64_t kQueries = detail::kUsesTiles<G> ? 128 : 8 * Traits::kMr;
  static constexpr int64_t kKeys = 256;

  explicit TiledForward(const ForwardParams& params) : f_(params), p_(params.problem) {
    const int64_t rows = p_.heads_q * (p_.first_q ? p_.total_q : p_.batch * p_.len_q);
    // Where a window or a mask of blocks begins depends on the block of queries, and with it how keys fall into blocks:
    // the size must not depend on the number of threads then.
    const int64_t parts = p_.left < kUnbounded || p_.mask_block > 1 ? 16 : 4 * num_threads();
    queries_ = least(kQueries, most(Traits::kMr, round_up(rows / parts + 1, Traits::kMr)));
  }

  // False when memory ran out.
  bool run() {
    int64_t total_cost = 0, blocks = 0;
    for (int64_t group = 0; group < groups(); ++group) {
      const Sequence seq = sequence(group, 0);
      total_cost += heads_of_group() * head_cost(seq);
      blocks += heads_of_group() * blocks_of(seq);
      if (seq.len_q > 0) keys_capacity_ = most(keys_capacity_, packed_end(seq) - packed_begin(seq));
    }
    const int64_t work = total_cost * queries_ * (p_.dim_qk + p_.dim_v);
    const int64_t threads = work < kParallelWork ? 1 : least(num_threads(), blocks);
    bool ok = true;
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      if (!run_blocks(first_block(total_cost, begin, threads), first_block(total_cost, end, threads)))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  static constexpr int64_t kParallelWork = 1 << 17;
  static constexpr int64_t kPad = 64 / sizeof(A);
  static constexpr int64_t kLds = kKeys + kPad;
  static constexpr int64_t kLdp = kSeparateP ? kPlanes<G> * (kKeys + 64 / static_cast<int64_t>(sizeof(E))) : kLds;
  static constexpr int64_t kCostOfABlock = 32;

  // Heads of sequences of one length are counted through as one group; packed sequences are a group each.
  int64_t groups() const { return p_.first_q ? p_.batch : 1; }
  int64_t heads_of_group() const { return p_.first_q ? p_.heads_q : p_.batch * p_.heads_q; }
  Sequence sequence(int64_t group, int64_t head) const {
    return sequence_of(p_, p_.first_q ? group : head / p_.heads_q);
  }

  // The keys that a sequence's rows see, from a whole panel on.
  static int64_t packed_begin(const Sequence& seq) { return seq.first_key(0) / Traits::kNr * Traits::kNr; }
  static int64_t packed_end(const Sequence& seq) { return most(packed_begin(seq), seq.end_key(seq.len_q - 1)); }

  int64_t blocks_of(const Sequence& seq) const { return (seq.len_q + queries_ - 1) / queries_; }
  int64_t block_cost(const Sequence& seq, int64_t block) const {
    const int64_t last = least(seq.len_q, (block + 1) * queries_) - 1;
    return most(0, seq.end_key(last) - seq.first_key(block * queries_)) + kCostOfABlock;
  }
  int64_t head_cost(const Sequence& seq) const {
    int64_t cost = 0;
    for (int64_t i = 0; i < blocks_of(seq); ++i) cost += block_cost(seq, i);
    return cost;
  }

  // A block of queries; they are computed in the order of group, head, block.
  struct Position {
    int64_t group, head, block;
    bool operator<(const Position& other) const {
      return group != other.group ? group < other.group : head != other.head ? head < other.head : block < other.block;
    }
  };

  // Where the share of thread `t` begins.
  Position first_block(int64_t total_cost, int64_t t, int64_t threads) const {
    if (t == threads) return {groups(), 0, 0};
    int64_t cost = total_cost / threads * t;
    for (int64_t group = 0; group < groups(); ++group) {
      const Sequence seq = sequence(group, 0);
      const int64_t of_head = head_cost(seq), of_group = of_head * heads_of_group();
      if (cost >= of_group) {
        cost -= of_group;
        continue;
      }
      Position at{group, cost / of_head, 0};
      for (cost %= of_head; at.block < blocks_of(seq) && cost >= block_cost(seq, at.block); ++at.block)
        cost -= block_cost(seq, at.block);
      return at;
    }
    return {groups(), 0, 0};
  }

  struct Scratch {
    E *k, *v, *q, *prob;
    A *scores, *out, *max, *sum, *factor;
  };

  int64_t ldq() const { return kPlanes<G> * (padded_k<G>(p_.dim_qk) + 64 / static_cast<int64_t>(sizeof(E))); }
  int64_t panel_k() const { return kPlanes<G> * padded_k<G>(p_.dim_qk) * Traits::kNr; }
  static int64_t panel_v(int64_t keys) { return kPlanes<G> * padded_k<G>(keys) * Traits::kNr; }

  Scratch carve(Carver& carver) const {
    Scratch s;
    s.k = carver.take<E>(panel_k() * padded_n<G>(keys_capacity_) / Traits::kNr);
    s.v = carver.take<E>(panel_v(keys_capacity_) * padded_n<G>(p_.dim_v) / Traits::kNr);
    s.q = carver.take<E>(round_up(queries_, 32) * ldq());
    s.scores = carver.take<A>(round_up(queries_, 32) * kLds);
    s.prob = kSeparateP ? carver.take<E>(round_up(queries_, 32) * kLdp) : reinterpret_cast<E*>(s.scores);
    s.out = carver.take<A>(queries_ * padded_n<G>(p_.dim_v));
    s.max = carver.take<A>(round_up(queries_, kLanes<A>));
    s.sum = carver.take<A>(round_up(queries_, kLanes<A>));
    s.factor = carver.take<A>(round_up(queries_, kLanes<A>));
    return s;
  }

  bool run_blocks(Position begin, Position end) const {
    if (!(begin < end)) return true;
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    const int64_t group_size = p_.heads_q / p_.heads_kv;
    for (Position at = begin; at < end; ++at.group, at.head = 0) {
      int64_t packed_head = -1;
      for (; at.head < heads_of_group() && at < end; ++at.head, at.block = 0) {
        const Sequence seq = sequence(at.group, at.head);
        for (; at.block < blocks_of(seq) && at < end; ++at.block) {
          const int64_t head_kv = at.head / group_size;
          if (head_kv != packed_head) pack_head(s, seq, head_kv % p_.heads_kv);
          packed_head = head_kv;
          run_block(s, seq, at.head % p_.heads_q, at.block * queries_);
        }
      }
    }
    release_large_scratch();
    return true;
  }

  void pack_head(const Scratch& s, const Sequence& seq, int64_t head_kv) const {
    const int64_t begin = packed_begin(seq), keys = packed_end(seq) - begin;
    const auto key = head_of<T>(f_.key, seq.batch, head_kv, seq.first_k + begin);
    const auto value = head_of<T>(f_.value, seq.batch, head_kv, seq.first_k + begin);
    if constexpr (kInPieces) {
      pack_b_pieces<G>(key.data, key.stride_dim, key.stride_row, p_.dim_qk, keys, s.k, panel_k());
      pack_b_pieces<G>(value.data, value.stride_row, value.stride_dim, keys, p_.dim_v, s.v, panel_v(keys));
    } else {
      pack_b<T>(key.data, key.stride_dim, key.stride_row, p_.dim_qk, keys, s.k, padded_k<G>(p_.dim_qk));
      pack_b<T>(value.data, value.stride_row, value.stride_dim, keys, p_.dim_v, s.v, padded_k<G>(keys));
    }
  }

  // Up to kKeys keys, whole panels of them but for the last.
  struct Run {
    int64_t begin, end;
  };

  // The first keys from k0 on that a mask of blocks lets any of the rows see; from `end` on where there are none.
  Run next_run(const Sequence& seq, int64_t head, int64_t q0, int64_t rows, int64_t k0, int64_t end) const {
    const int64_t size = p_.mask_block;
    if (size == 1) return {k0, least(end, k0 + kKeys)};
    const auto sees = [&](int64_t block) { return sees_keys(p_, seq.batch, head, q0, rows, block * size, 1); };
    int64_t block = k0 / size;
    while (block * size < end && !sees(block)) ++block;
    if (block * size >= end) return {end, end};
    const int64_t begin = most(k0, block * size / Traits::kNr * Traits::kNr);
    while (block * size < least(end, begin + kKeys) && sees(block)) ++block;
    return {begin, least(least(end, begin + kKeys), round_up(block * size, Traits::kNr))};
  }

  void run_block(const Scratch& s, const Sequence& seq, int64_t head, int64_t q0) const {
    const int64_t rows = least(queries_, seq.len_q - q0), ldo = padded_n<G>(p_.dim_v);
    const auto query = head_of<T>(f_.query, seq.batch, head, seq.first_q);
    if constexpr (kInPieces) {
      pack_a_pieces<G>(query.row(q0), query.stride_row, query.stride_dim, rows, p_.dim_qk, s.q, ldq());
    } else {
      pack_a<T>(query.row(q0), query.stride_row, query.stride_dim, rows, p_.dim_qk, s.q, ldq());
    }
    // Softmax takes maxima before it multiplies by the scale; the sign must be in the scores by then.
    if (p_.scale < 0) negate(s.q, rows * ldq());
    if (p_.scale == 0) std::memset(s.q, 0, rows * ldq() * sizeof(E));
    for (int64_t i = 0; i < rows; i += kLanes<A>) {
      store(s.max + i, broadcast(-static_cast<A>(__builtin_inf())));
      store(s.sum + i, Vec<A>{});
    }
    const int64_t packed = packed_begin(seq), panel = panel_v(packed_end(seq) - packed);
    const int64_t end = seq.end_key(q0 + rows - 1), begin = seq.first_key(q0) / Traits::kNr * Traits::kNr;
    bool is_first = true;
    for (Run run = next_run(seq, head, q0, rows, begin, end); run.begin < end;
         run = next_run(seq, head, q0, rows, run.end, end)) {
      const int64_t k0 = run.begin, keys = run.end - k0;
      multiply(rows, padded_n<G>(keys), p_.dim_qk, s.q, ldq(), s.k + (k0 - packed) / Traits::kNr * panel_k(), panel_k(),
               StoreSums<A>{s.scores, kLds});
      softmax_block(s, seq, head, q0, rows, k0, keys);
      const E* v = s.v + (k0 - packed) * Traits::kNr;
      if (is_first) {
        multiply(rows, ldo, keys, s.prob, kLdp, v, panel, StoreSums<A>{s.out, ldo});
      } else {
        multiply(rows, ldo, keys, s.prob, kLdp, v, panel, RescaleAndAdd<A>{s.out, ldo, s.factor});
      }
      is_first = false;
    }
    if (is_first) std::memset(s.out, 0, rows * ldo * sizeof(A));
    write_block(s, seq, head, q0, rows);
  }

  template <class Epilogue>
  static inline __attribute__((always_inline)) void multiply(int64_t m, int64_t n, int64_t k, const E* a, int64_t lda,
                                                             const E* b, int64_t panel_stride,
                                                             const Epilogue& epilogue) {
    if constexpr (kInPieces) {
      gemm_pieces<G>(m, n, k, a, lda, b, panel_stride, epilogue);
    } else {
      gemm<T>(m, n, k, a, lda, b, panel_stride, epilogue);
    }
  }

  static void negate(E* q, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (sizeof(E) == 2) {
        q[i].bits ^= 0x8000;
      } else {
        q[i] = -q[i];
      }
    }
  }

  // Scores enter softmax as the product left them, their scale folded into exp2, unless they are shaped.
  // Never 0, which would turn the maximum -inf of a row not yet begun into NaN.
  A score_unit() const {
    const bool is_scaled = has_shaped_scores(p_) || p_.scale == 0;
    return is_scaled ? A(1) : static_cast<A>(__builtin_fabs(p_.scale));
  }

  // Scores to probabilities relative to the running maximum, which it advances, as are the running sums.
  void softmax_block(const Scratch& s, const Sequence& seq, int64_t head, int64_t q0, int64_t rows, int64_t k0,
                     int64_t keys) const {
    if (has_shaped_scores(p_))
      shape_rows<T>(p_, seq, head, s.scores, kLds, q0, rows, k0, keys, static_cast<A>(__builtin_fabs(p_.scale)));
    for (int64_t i = 0; i < rows; i += kLanes<A>) softmax_rows(s, seq, q0, i, least(kLanes<A>, rows - i), k0, keys);
    for (int plane = 0; p_.seeds && plane < kPlanes<G>; ++plane)
      drop_rows(Dropout::of(p_, seq.batch, head), s.prob + plane * kLdp / 2, kLdp, q0, rows, k0, keys);
  }

  // Of as many rows as a vector has lanes, so that what there is to do once per row is done for all of them at once.
  void softmax_rows(const Scratch& s, const Sequence& seq, int64_t q0, int64_t first, int64_t count, int64_t k0,
                    int64_t keys) const {
    const A lowest = -static_cast<A>(__builtin_inf());
    const A scale = score_unit() * static_cast<A>(kLog2E);
    const int64_t padded = round_up(padded_k<G>(keys), kLanes<A>);
    int64_t valid[kLanes<A>];
    Vec<A> part[kLanes<A>];
#pragma GCC unroll 1
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      const int64_t row = q0 + first + i;
      valid[i] = i < count ? most(0, least(keys, seq.end_key(row) - k0)) : 0;
      A* scores = s.scores + (first + i) * kLds;
      const int64_t hidden = least(valid[i], seq.first_key(row) - k0);
      for (int64_t j = 0; j < hidden; ++j) scores[j] = lowest;
      part[i] = row_maxima(scores, valid[i]);
    }
    const Vec<A> before = load(s.max + first), after = max(before, maxima_of_lanes<A>(part));
    // A row that has seen only -inf keeps shift 0: its probabilities come out 0, not NaN.
    const Vec<A> shift = after == lowest ? Vec<A>{} : after, factor = exp2((before - shift) * scale);
    A shift_of[kLanes<A>];
    store(shift_of, shift);
#pragma GCC unroll 1
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      part[i] = Vec<A>{};
      if (i >= count) continue;
      A* scores = s.scores + (first + i) * kLds;
      E* prob = s.prob + (first + i) * kLdp;
      if constexpr (kInPieces) {
        part[i] = exp2_row_sums(scores, scores, valid[i], padded, scale, shift_of[i]);
        split_row(scores, 1, padded, padded, prob, kPlanes<G> > 1 ? prob + kLdp / 2 : nullptr);
      } else {
        part[i] = exp2_row_sums(scores, prob, valid[i], padded, scale, shift_of[i]);
      }
    }
    store(s.max + first, after);
    store(s.sum + first, load(s.sum + first) * factor + sums_of_lanes<A>(part));
    store(s.factor + first, factor);
  }

  void write_block(const Scratch& s, const Sequence& seq, int64_t head, int64_t q0, int64_t rows) const {
    const int64_t ldo = padded_n<G>(p_.dim_v);
    const auto out = head_of<T>(f_.out, seq.batch, head, seq.first_q);
    A* lse = static_cast<A*>(f_.lse) + lse_offset(p_, seq, head) + q0;
    for (int64_t i = 0; i < rows; ++i) {
      A* sums = s.out + i * ldo;
      A shift = s.max[i] * score_unit(), denominator = s.sum[i];
      if (p_.sinks.data) join_sink(head_value<A>(p_.sinks, seq.batch, head), sums, p_.dim_v, shift, denominator);
      write_row<T>(sums, shift, denominator, p_.dim_v, out.row(q0 + i), lse + i, kept_share<A>(p_));
    }
  }

  const ForwardParams& f_;
  const Problem& p_;
  int64_t queries_, keys_capacity_ = 0;
};

}  // namespace ptk::PTK_ISA
