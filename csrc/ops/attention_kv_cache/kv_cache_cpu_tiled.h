// Many queries against the cache (prefill in chunks, many heads to a key head): tiled as the forward of attention.
//
//   rows       all queries of all heads that share a key and value head, query by query: row r is query r / group of
//   head
//              r % group. The head's slots are gathered from their pages and packed once per thread
//   tiling     kQueries x kKeys scores at a time, softmax between two products of the engine
//   types      G is what the engine multiplies. Codes of quantised caches are exact in every G; scales meet the scores
//              (keys) and the probabilities (values)
//   threads    blocks of rows are dealt out in runs of equal cost, each computed in an order of its own
#pragma once

#include "kv_cache_cpu_append.h"
#include "kv_cache_cpu_direct.h"

namespace ptk::PTK_ISA {

// ---- stored rows as the engine's elements

inline constexpr int64_t kGatherStep = 2 * kLanes<float>;
// Between rows that gather_slots() writes: as long as whole steps.
PTK_INLINE int64_t gathered_row_of(const KvCacheParams& p) {
  return round_up(most(p.dim_qk, p.dim_v), kGatherStep);
}

// Numbers of any cache type are exact in every element type they are converted to.
template <class E, class C>
static void convert_stored(const C* row, int64_t n, E* out) {
  if constexpr (std::is_same_v<C, E>) {
    std::memcpy(out, row, n * sizeof(E));
  } else if constexpr (sizeof(C) == 1 && sizeof(E) != 8) {
    using Pair = PairOf<C>;
    int64_t d = 0;
    auto write = [&](const C* from, E* to) {
      Vec<float> low, high;
      Pair::load_pair(from, low, high);
      const float unit = std::is_same_v<C, e4m3> ? kE4m3Unit : 1;
      store_as(to, low * unit);
      store_as(to + kLanes<float>, high * unit);
    };
    for (; d + Pair::kStep <= n; d += Pair::kStep) write(row + d, out + d);
    if (d < n) {
      C buffer[Pair::kStep] = {};
      for (int64_t i = d; i < n; ++i) buffer[i - d] = row[i];
      write(buffer, out + d);  // gathered rows are as long as whole steps
    }
  } else if constexpr (std::is_same_v<C, int8_t>) {
    for (int64_t d = 0; d < n; ++d) out[d] = row[d];
  } else if constexpr (std::is_same_v<C, e4m3>) {
    for (int64_t d = 0; d < n; ++d) {
      Vec<float> low, high;
      C buffer[PairOf<C>::kStep] = {row[d]};
      PairOf<C>::load_pair(buffer, low, high);
      out[d] = low[0] * kE4m3Unit;
    }
  } else if constexpr (std::is_same_v<Acc<C>, E>) {
    pack_row(row, 1, n, n, out);
  }
}

template <class E>
static void gather_slots(const KvCacheParams& p, const CacheView& view, int64_t batch, int64_t head, int64_t begin,
                         int64_t end, int64_t dim, E* out) {
  const auto from = [&](auto type) {
    using C = decltype(type);
    const auto rows = rows_of<const C>(p, view, batch, head);
    const int64_t ld = gathered_row_of(p);
    rows.for_runs(begin, end, [&](const C* first, int64_t slot, int64_t count) {
      for (int64_t j = 0; j < count; ++j)
        convert_stored(first + j * rows.stride_slot, dim, out + (slot - begin + j) * ld);
    });
  };
  if (p.cache_type == CacheType::s8) return from(int8_t());
  if (p.cache_type == CacheType::e4m3) return from(e4m3());
  with_type(p.dtype, from);
}

template <class G>
class TiledAttend {
  using E = Element<G>;
  using A = Acc<G>;
  using Traits = GemmTraits<G>;
  static constexpr bool kSeparateP = !std::is_same_v<E, A>;

public:
  explicit TiledAttend(const KvCacheParams& params)
      : p_(params), group_(params.heads_q / params.heads_kv), rows_(group_ * params.len_q),
        blocks_((rows_ + kQueries - 1) / kQueries) {}

  bool run() {
    int64_t cost = 0;
    longest_ = 0;
    for (int64_t b = 0; b < p_.batch; ++b) {
      longest_ = most(longest_, head_slots(b).end - first_packed(b));
      cost += sequence_cost(b) * p_.heads_kv;
    }
    const int64_t count = p_.batch * p_.heads_kv * blocks_;
    const int64_t work = cost * kQueries * (p_.dim_qk + p_.dim_v);
    const int64_t threads = work < kParallelWork ? 1 : least(num_threads(), count);
    bool ok = true;
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      if (!run_share(cost * begin / threads, cost * end / threads)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  static constexpr int64_t kQueries = detail::kUsesTiles<G> ? 128 : 8 * Traits::kMr;
  static constexpr int64_t kKeys = 256;
  static constexpr int64_t kParallelWork = 1 << 17;
  static constexpr int64_t kCostOfABlock = 32;
  static constexpr int64_t kLds = kKeys + 64 / sizeof(A);
  static constexpr int64_t kLdp = kSeparateP ? kKeys + 64 / static_cast<int64_t>(sizeof(E)) : kLds;

  int64_t rows_of_block(int64_t block) const { return least(kQueries, rows_ - block * kQueries); }
  Slots block_slots(int64_t batch, int64_t block) const {
    const int64_t row = block * kQueries;
    return visible_slots(p_, batch, row / group_, (row + rows_of_block(block) - 1) / group_);
  }
  Slots head_slots(int64_t batch) const { return visible_slots(p_, batch, 0, p_.len_q - 1); }
  // Blocks of keys begin at multiples of kKeys of the sequence.
  int64_t first_packed(int64_t batch) const { return head_slots(batch).begin / kKeys * kKeys; }

  int64_t block_cost(int64_t batch, int64_t block) const {
    const Slots slots = block_slots(batch, block);
    return slots.end - slots.begin + kCostOfABlock;
  }
  int64_t sequence_cost(int64_t batch) const {
    int64_t cost = 0;
    for (int64_t block = 0; block < blocks_; ++block) cost += block_cost(batch, block);
    return cost;
  }

  struct Scratch {
    E *key, *value, *query, *prob;
    E* gathered;
    A *scores, *out, *row, *rotation, *max, *sum, *factor;
  };

  int64_t ld_q() const { return padded_k<G>(p_.dim_qk) + 64 / static_cast<int64_t>(sizeof(E)); }
  int64_t ld_g() const { return gathered_row_of(p_); }
  int64_t panel_k() const { return padded_k<G>(p_.dim_qk) * Traits::kNr; }
  int64_t key_block() const { return kKeys / Traits::kNr * panel_k(); }
  static constexpr int64_t kPanelV = kKeys * Traits::kNr;
  int64_t value_block() const { return padded_n<G>(p_.dim_v) / Traits::kNr * kPanelV; }

  Scratch carve(Carver& carver) const {
    const int64_t key_blocks = (longest_ + kKeys - 1) / kKeys, rows = round_up(kQueries, 32);
    Scratch s;
    s.key = carver.take<E>(key_blocks * key_block());
    s.value = carver.take<E>(key_blocks * value_block());
    s.query = carver.take<E>(rows * ld_q());
    s.gathered = carver.take<E>(kKeys * ld_g());
    s.scores = carver.take<A>(rows * kLds);
    s.prob = kSeparateP ? carver.take<E>(rows * kLdp) : reinterpret_cast<E*>(s.scores);
    s.out = carver.take<A>(kQueries * padded_n<G>(p_.dim_v));
    s.row = carver.take<A>(ld_g());
    s.rotation = carver.take<A>(Rotation<A>::kScratch);
    s.max = carver.take<A>(kQueries);
    s.sum = carver.take<A>(kQueries);
    s.factor = carver.take<A>(kQueries);
    return s;
  }

  // The blocks whose cost begins in [begin, end).
  bool run_share(int64_t begin, int64_t end) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    TileScope tiles;
    int64_t cost = 0;
    for (int64_t b = 0; b < p_.batch && cost < end; ++b) {
      for (int64_t head = 0; head < p_.heads_kv && cost < end; ++head) {
        bool is_packed = false;
        for (int64_t block = 0; block < blocks_ && cost < end; ++block) {
          if (cost >= begin) {
            if (!is_packed) pack_head(s, b, head);
            is_packed = true;
            run_block(s, b, head, block);
          }
          cost += block_cost(b, block);
        }
      }
    }
    release_large_scratch();
    return true;
  }

  void pack_head(const Scratch& s, int64_t batch, int64_t head) const {
    const Slots slots = head_slots(batch);
    for (int64_t k0 = first_packed(batch); k0 < slots.end; k0 += kKeys) {
      const int64_t begin = most(k0, slots.begin), keys = least(k0 + kKeys, slots.end) - begin;
      const int64_t block = (k0 - first_packed(batch)) / kKeys;
      gather_slots(p_, p_.key, batch, head, begin, begin + keys, p_.dim_qk, s.gathered);
      pack_b<E>(s.gathered, 1, ld_g(), p_.dim_qk, keys, reinterpret_cast<ElementB<E>*>(s.key + block * key_block()),
                padded_k<G>(p_.dim_qk));
      gather_slots(p_, p_.value, batch, head, begin, begin + keys, p_.dim_v, s.gathered);
      for (int64_t n0 = 0; n0 < p_.dim_v; n0 += Traits::kNr)
        pack_b_panel<E>(s.gathered + n0, ld_g(), 1, keys, least(Traits::kNr, p_.dim_v - n0),
                        reinterpret_cast<ElementB<E>*>(s.value + block * value_block() + n0 / Traits::kNr * kPanelV),
                        padded_k<G>(keys));
    }
  }

  void run_block(const Scratch& s, int64_t batch, int64_t head_kv, int64_t block) const {
    const int64_t row0 = block * kQueries, rows = rows_of_block(block), ldo = padded_n<G>(p_.dim_v);
    load_queries(s, batch, head_kv, row0, rows);
    for (int64_t i = 0; i < rows; ++i) {
      s.max[i] = -kInfinity<A>;
      s.sum[i] = 0;
    }
    const Slots all = head_slots(batch), slots = block_slots(batch, block);
    bool is_first = true;
    for (int64_t k0 = slots.begin / kKeys * kKeys; k0 < slots.end; k0 += kKeys) {
      const int64_t packed = (k0 - first_packed(batch)) / kKeys, begin = most(k0, all.begin);
      const int64_t packed_keys = least(k0 + kKeys, all.end) - begin, keys = least(k0 + kKeys, slots.end) - begin;
      gemm<G>(rows, padded_n<G>(keys), p_.dim_qk, s.query, ld_q(), s.key + packed * key_block(), panel_k(),
              StoreSums<A>{s.scores, kLds});
      softmax_block(s, batch, head_kv, row0, rows, begin, keys, packed_keys);
      const E* v = s.value + packed * value_block();
      if (is_first) {
        gemm<G>(rows, ldo, packed_keys, s.prob, kLdp, v, kPanelV, StoreSums<A>{s.out, ldo});
      } else {
        gemm<G>(rows, ldo, packed_keys, s.prob, kLdp, v, kPanelV, RescaleAndAdd<A>{s.out, ldo, s.factor});
      }
      is_first = false;
    }
    if (is_first) std::memset(s.out, 0, rows * ldo * sizeof(A));
    for (int64_t i = 0; i < rows; ++i)
      finish_row(p_, batch, head_of(head_kv, row0 + i), (row0 + i) / group_, s.out + i * ldo, s.max[i], s.sum[i]);
  }

  int64_t head_of(int64_t head_kv, int64_t row) const { return head_kv * group_ + row % group_; }

  void load_queries(const Scratch& s, int64_t batch, int64_t head_kv, int64_t row0, int64_t rows) const {
    Rotation<A> rotation(p_.rotary, s.rotation);
    for (int64_t i = 0; i < rows; ++i) {
      read_query(p_, batch, head_of(head_kv, row0 + i), (row0 + i) / group_, rotation, s.row);
      E* out = s.query + i * ld_q();
      for (int64_t d = 0; d < p_.dim_qk; ++d) {
        if constexpr (kSeparateP) {
          out[d] = round_to<E>(s.row[d]);
        } else {
          out[d] = s.row[d];
        }
      }
      for (int64_t d = p_.dim_qk; d < padded_k<G>(p_.dim_qk); ++d) out[d] = E{};
    }
  }

  // Scores to probabilities relative to the running maximum, which it advances, as are the running sums. Probabilities
  // of packed keys that no row of the block sees are zeros.
  void softmax_block(const Scratch& s, int64_t batch, int64_t head_kv, int64_t row0, int64_t rows, int64_t begin,
                     int64_t keys, int64_t packed_keys) const {
    const A log2e = static_cast<A>(kLog2E);
    const int64_t padded = round_up(padded_k<G>(packed_keys), kLanes<A>);
    for (int64_t i = 0; i < rows; ++i) {
      A* scores = s.scores + i * kLds;
      finish_scores(p_, batch, head_of(head_kv, row0 + i), (row0 + i) / group_, begin, begin + keys,
                    static_cast<A>(p_.scale), scores);
      const A before = s.max[i], block_max = row_max(scores, keys);
      const A after = before > block_max ? before : block_max;
      const A shift = after == -kInfinity<A> ? 0 : after;
      const A factor = exp2(broadcast((before - shift) * log2e))[0];
      A sum;
      if (p_.value_scale.data) {
        sum = exp2_row(scores, scores, keys, padded, log2e, shift);
        multiply_scales(p_, p_.value_scale, batch, head_kv, begin, begin + keys, scores);
        if constexpr (kSeparateP)
          for (int64_t j = 0; j < padded; j += kLanes<A>) store_as(s.prob + i * kLdp + j, load(scores + j));
      } else {
        sum = exp2_row(scores, s.prob + i * kLdp, keys, padded, log2e, shift);
      }
      s.max[i] = after;
      s.sum[i] = s.sum[i] * factor + sum;
      s.factor[i] = factor;
    }
  }

  const KvCacheParams& p_;
  const int64_t group_, rows_, blocks_;
  int64_t longest_ = 0;
};

}  // namespace ptk::PTK_ISA
