// Forward on the CPU: softmax(scale Q K^T + mask) V without the matrix of scores.
//
//   equation   per block of keys:  m' = max(m, rowmax S),  P = exp(S - m'),  l = l exp(m - m') + rowsum P,
//              O = O exp(m - m') + P V;   at the end  out = O / l,  lse = m + log l
//
//   layout     one head's K^T and V are packed once into the engine's panels, in the thread's own memory, and reused
//              for every block of queries and every query head of the group.
//
//   tiling     kQueries x kKeys scores at a time; S (and P for 16-bit products) stay in L2, a panel of K or V in L1.
//
//   threads    blocks of queries are dealt out in runs of equal cost; each is computed in an order that does not depend
//              on the run it is in, so results do not depend on the number of threads.
#pragma once

#include "attention_cpu_common.h"

namespace ptk::PTK_ISA {

// O = O * factor + sums, the rescaling of the online softmax fused into the
// product.
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

template <class A>
PTK_INLINE A row_max(const A* s, int64_t n) {
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
  return reduce_max<A>(max(m0, m1));
}

// p[j] = 2^((s[j] - shift) * scale) for j < n, zeros up to n_padded; returns the sum. p may be s. The difference comes
// first: scores near the largest number would overflow if they were scaled before.
template <class A, class P>
PTK_INLINE A exp2_row(const A* s, P* p, int64_t n, int64_t n_padded, A scale, A shift) {
  Vec<A> sum0{}, sum1{};
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>) {
    Vec<A> p0 = softmax_exp2<P>((load(s + j) - shift) * scale);
    Vec<A> p1 = softmax_exp2<P>((load(s + j + kLanes<A>) - shift) * scale);
    sum0 += p0;
    sum1 += p1;
    store_as(p + j, p0);
    store_as(p + j + kLanes<A>, p1);
  }
  // Rows are padded to whole vectors, so the rest is computed in full and the
  // lanes past n are cleared.
  const Vec<A> lane = iota<A>();
  for (; j < n_padded; j += kLanes<A>) {
    Vec<A> v = softmax_exp2<P>((load(s + j) - shift) * scale);
    v = lane < static_cast<A>(n - j) ? v : Vec<A>{};
    sum0 += v;
    store_as(p + j, v);
  }
  return reduce_add<A>(sum0 + sum1);
}

template <class T>
class TiledForward {
  using E = Element<T>;
  using A = Acc<T>;
  using Traits = GemmTraits<T>;
  static constexpr bool kSeparateP = !std::is_same_v<E, A>;

public:
  static constexpr int64_t kQueries = detail::kUsesTiles<T> ? 128 : 8 * Traits::kMr;
  static constexpr int64_t kKeys = 256;

  explicit TiledForward(const ForwardParams& params) : f_(params), p_(params.problem) {
    const int64_t rows = p_.batch * p_.heads_q * p_.len_q;
    queries_ = least(kQueries, most(Traits::kMr, round_up(rows / (4 * num_threads()) + 1, Traits::kMr)));
  }

  // False when memory ran out.
  bool run() {
    blocks_per_head_ = (p_.len_q + queries_ - 1) / queries_;
    head_cost_ = 0;
    for (int64_t i = 0; i < blocks_per_head_; ++i) head_cost_ += block_cost(i);
    const int64_t work = p_.batch * p_.heads_q * head_cost_ * queries_ * (p_.dim_qk + p_.dim_v);
    const int64_t threads = work < kParallelWork ? 1 : least(num_threads(), p_.batch * p_.heads_q * blocks_per_head_);
    bool ok = true;
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      if (!run_blocks(first_block(begin, threads), first_block(end, threads)))
        __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  static constexpr int64_t kParallelWork = 1 << 17;
  static constexpr int64_t kPad = 64 / sizeof(A);
  static constexpr int64_t kLds = kKeys + kPad;
  static constexpr int64_t kLdp = kSeparateP ? kKeys + 64 / static_cast<int64_t>(sizeof(E)) : kLds;

  int64_t keys_end(int64_t block) const { return visible_keys(p_, least(p_.len_q, (block + 1) * queries_) - 1); }
  int64_t block_cost(int64_t block) const { return keys_end(block) + kCostOfABlock; }
  static constexpr int64_t kCostOfABlock = 32;

  // Where the share of thread `t` begins, counting blocks over all heads.
  int64_t first_block(int64_t t, int64_t threads) const {
    const int64_t heads = p_.batch * p_.heads_q;
    if (t == threads) return heads * blocks_per_head_;
    int64_t cost = heads * head_cost_ / threads * t;
    const int64_t head = cost / head_cost_;
    cost -= head * head_cost_;
    int64_t block = 0;
    for (; block < blocks_per_head_ && cost >= block_cost(block); ++block) cost -= block_cost(block);
    return head * blocks_per_head_ + block;
  }

  struct Scratch {
    E *k, *v, *q, *prob;
    A *scores, *out, *max, *sum, *factor;
  };

  int64_t ldq() const { return padded_k<T>(p_.dim_qk) + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t panel_k() const { return padded_k<T>(p_.dim_qk) * Traits::kNr; }
  int64_t panel_v() const { return padded_k<T>(keys_packed()) * Traits::kNr; }
  int64_t keys_packed() const { return visible_keys(p_, p_.len_q - 1); }

  Scratch carve(Carver& carver) const {
    Scratch s;
    s.k = carver.take<E>(panel_k() * padded_n<T>(keys_packed()) / Traits::kNr);
    s.v = carver.take<E>(panel_v() * padded_n<T>(p_.dim_v) / Traits::kNr);
    s.q = carver.take<E>(round_up(queries_, 32) * ldq());
    s.scores = carver.take<A>(round_up(queries_, 32) * kLds);
    s.prob = kSeparateP ? carver.take<E>(round_up(queries_, 32) * kLdp) : reinterpret_cast<E*>(s.scores);
    s.out = carver.take<A>(queries_ * padded_n<T>(p_.dim_v));
    s.max = carver.take<A>(queries_);
    s.sum = carver.take<A>(queries_);
    s.factor = carver.take<A>(queries_);
    return s;
  }

  bool run_blocks(int64_t begin, int64_t end) const {
    if (begin >= end) return true;
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    const int64_t group = p_.heads_q / p_.heads_kv;
    int64_t packed_head = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks_per_head_, head_kv = head / group;
      if (head_kv != packed_head) pack_head(s, head_kv);
      packed_head = head_kv;
      run_block(s, head / p_.heads_q, head % p_.heads_q, i % blocks_per_head_ * queries_);
    }
    release_large_scratch();
    return true;
  }

  void pack_head(const Scratch& s, int64_t head_kv) const {
    const auto key = head_of<T>(f_.key, head_kv / p_.heads_kv, head_kv % p_.heads_kv);
    const auto value = head_of<T>(f_.value, head_kv / p_.heads_kv, head_kv % p_.heads_kv);
    pack_b<T>(key.data, key.stride_dim, key.stride_row, p_.dim_qk, keys_packed(), s.k, padded_k<T>(p_.dim_qk));
    pack_b<T>(value.data, value.stride_row, value.stride_dim, keys_packed(), p_.dim_v, s.v, padded_k<T>(keys_packed()));
  }

  void run_block(const Scratch& s, int64_t batch, int64_t head, int64_t q0) const {
    const int64_t rows = least(queries_, p_.len_q - q0), ldo = padded_n<T>(p_.dim_v);
    const auto query = head_of<T>(f_.query, batch, head);
    pack_a<T>(query.row(q0), query.stride_row, query.stride_dim, rows, p_.dim_qk, s.q, ldq());
    // Softmax takes maxima before it multiplies by the scale; the sign must be
    // in the scores by then.
    if (p_.scale < 0) negate(s.q, rows * ldq());
    if (p_.scale == 0) std::memset(s.q, 0, rows * ldq() * sizeof(E));
    for (int64_t i = 0; i < rows; ++i) {
      s.max[i] = -static_cast<A>(__builtin_inf());
      s.sum[i] = 0;
    }
    const int64_t keys_end = visible_keys(p_, q0 + rows - 1);
    for (int64_t k0 = 0; k0 < keys_end; k0 += kKeys) {
      const int64_t keys = least(kKeys, keys_end - k0);
      gemm<T>(rows, padded_n<T>(keys), p_.dim_qk, s.q, ldq(), s.k + k0 / Traits::kNr * panel_k(), panel_k(),
              StoreSums<A>{s.scores, kLds});
      softmax_block(s, batch, head, q0, rows, k0, keys);
      const E* v = s.v + k0 * Traits::kNr;
      if (k0 == 0) {
        gemm<T>(rows, ldo, keys, s.prob, kLdp, v, panel_v(), StoreSums<A>{s.out, ldo});
      } else {
        gemm<T>(rows, ldo, keys, s.prob, kLdp, v, panel_v(), RescaleAndAdd<A>{s.out, ldo, s.factor});
      }
    }
    write_block(s, batch, head, q0, rows);
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

  // Scores enter softmax as the product left them, their scale folded into exp2; a mask is added to scaled scores.
  // Never 0, which would turn the maximum -inf of a row not yet begun into NaN.
  A score_unit() const {
    const bool is_scaled = p_.mask_kind != MaskKind::none || p_.scale == 0;
    return is_scaled ? A(1) : static_cast<A>(__builtin_fabs(p_.scale));
  }

  // Scores to probabilities relative to the running maximum, which it advances, as are the running sums.
  void softmax_block(const Scratch& s, int64_t batch, int64_t head, int64_t q0, int64_t rows, int64_t k0,
                     int64_t keys) const {
    with_mask<T>(p_, batch, head, [&](auto* mask) {
      for (int64_t i = 0; i < rows; ++i)
        detail::apply_mask_row(s.scores + i * kLds, keys, static_cast<A>(__builtin_fabs(p_.scale)),
                               mask + (q0 + i) * p_.mask.strides[2] + k0 * p_.mask.strides[3], p_.mask.strides[3]);
    });
    const A scale = score_unit() * static_cast<A>(kLog2E);
    const int64_t padded = round_up(padded_k<T>(keys), kLanes<A>);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t valid = most(0, least(keys, visible_keys(p_, q0 + i) - k0));
      const A* scores = s.scores + i * kLds;
      const A before = s.max[i], block_max = row_max(scores, valid);
      const A after = before > block_max ? before : block_max;
      // A row that has seen only -inf keeps shift 0: its probabilities come out 0, not NaN.
      const A shift = after == -static_cast<A>(__builtin_inf()) ? 0 : after;
      const A factor = exp2(broadcast((before - shift) * scale))[0];
      const A sum = exp2_row(scores, s.prob + i * kLdp, valid, padded, scale, shift);
      s.max[i] = after;
      s.sum[i] = s.sum[i] * factor + sum;
      s.factor[i] = factor;
    }
  }

  void write_block(const Scratch& s, int64_t batch, int64_t head, int64_t q0, int64_t rows) const {
    const int64_t ldo = padded_n<T>(p_.dim_v);
    const auto out = head_of<T>(f_.out, batch, head);
    A* lse = static_cast<A*>(f_.lse) + (batch * p_.heads_q + head) * p_.len_q + q0;
    for (int64_t i = 0; i < rows; ++i)
      write_row<T>(s.out + i * ldo, s.max[i] * score_unit(), s.sum[i], p_.dim_v, out.row(q0 + i), lse + i);
  }

  const ForwardParams& f_;
  const Problem& p_;
  int64_t queries_, blocks_per_head_ = 0, head_cost_ = 0;
};

}  // namespace ptk::PTK_ISA
