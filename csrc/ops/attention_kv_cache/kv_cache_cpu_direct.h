// Few queries against a long cache (decoding): limited by how fast keys and values can be read.
//
//   rows       all queries of all heads that share a key and value head; products by attention_cpu_stored_rows.h
//   chunks     kChunk slots at fixed places of the sequence: scores of the chunk, softmax, then P V
//   threads    every (sequence, chunk, kv head) is an item, in this order: heads of a slot share pages of memory where
//              slots lie outside. Partial results are merged in the order of the slots, so results do not depend on the
//              number of threads
#pragma once

#include "csrc/ops/attention/attention_cpu_stored_rows.h"
#include "kv_cache_cpu_common.h"

namespace ptk::PTK_ISA {

// GCC finds the widening instructions behind __builtin_convertvector only where source and target are registers.
PTK_INLINE Vec<float> widen_s8(const int8_t* p) {
#if PTK_X86_AVX512
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif PTK_ISA_LEVEL == 1
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = p[i];
  return v;
#endif
}

template <>
struct PairOf<int8_t> {
  using A = float;
  static constexpr int kStep = 2 * kLanes<A>;
  static constexpr bool kInOrder = true;
  PTK_INLINE void load_pair(const int8_t* p, Vec<A>& low, Vec<A>& high) {
    low = widen_s8(p);
    high = widen_s8(p + kLanes<A>);
  }
};

PTK_INLINE Vec<uint16_t> widen_u8(const uint8_t* p) {
#if PTK_X86_AVX512
  return (Vec<uint16_t>)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PTK_ISA_LEVEL == 1
  return (Vec<uint16_t>)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<uint16_t> v;
  for (int i = 0; i < kLanes<uint16_t>; ++i) v[i] = p[i];
  return v;
#endif
}

// Shifted into place, the bits are those of a binary16 that is 2^8 times smaller.
inline constexpr float kE4m3Unit = 256;
template <>
struct PairOf<e4m3> {
  using A = float;
  static constexpr int kStep = 2 * kLanes<A>;
  static constexpr bool kInOrder = true;
  PTK_INLINE void load_pair(const e4m3* p, Vec<A>& low, Vec<A>& high) {
    const Vec<uint16_t> code = widen_u8(&p->bits), magnitude = code & 0x7f;
    const Vec<uint16_t> nan = (Vec<uint16_t>)(magnitude == 0x7f) & 0x7e00;
    const Vec<uint16_t> half = (code & 0x80) << 8 | magnitude << 7 | nan;
    HalfBits halves[2];
    std::memcpy(halves, &half, sizeof half);
    low = widen_f16(halves[0]);
    high = widen_f16(halves[1]);
  }
};

template <class C>
class DirectAttend {
  using A = Acc<C>;
  static constexpr int kLane = kLanes<A>;

public:
  static constexpr int64_t kRows = 16;
  static bool suits(const KvCacheParams& p) { return p.heads_q / p.heads_kv * p.len_q <= kRows; }

  explicit DirectAttend(const KvCacheParams& params)
      : p_(params), group_(params.heads_q / params.heads_kv), rows_(group_ * params.len_q),
        stored_{params.dim_qk, params.dim_v, kLds, partial_row(params.dim_v)}, ld_q_(stored_.ld_q()),
        ld_v_(stored_.ld_v()) {}

  bool run() {
    char* memory = static_cast<char*>(__builtin_malloc((p_.batch + 1) * sizeof(int64_t)));
    if (!memory) return false;
    first_chunk_ = reinterpret_cast<int64_t*>(memory);
    first_chunk_[0] = 0;
    for (int64_t b = 0; b < p_.batch; ++b) {
      const Slots seen = all_seen(b);
      const int64_t chunks = seen.begin < seen.end ? (seen.end - 1) / kChunk - seen.begin / kChunk + 1 : 0;
      first_chunk_[b + 1] = first_chunk_[b] + chunks;
    }
    const bool ok = attend();
    __builtin_free(memory);
    return ok;
  }

private:
  static constexpr int64_t kChunk = 512;  // slots whose scores are held at once
  static constexpr int64_t kLds = kChunk + 64;
  static constexpr int64_t kParallelWork = 1 << 16;

  Slots all_seen(int64_t batch) const { return visible_slots(p_, batch, 0, p_.len_q - 1); }
  // Sums, maximum, denominator.
  static int64_t partial_row(int64_t dim_v) { return round_up(dim_v, StoredRows<C>::kStep) + 2; }
  int64_t partial_row() const { return stored_.ld_out; }

  bool attend() {
    const int64_t items = first_chunk_[p_.batch] * p_.heads_kv;
    partial_ = static_cast<A*>(borrow_block(most(items, 1) * rows_ * partial_row() * sizeof(A)));
    if (!partial_) return false;
    const int64_t work = items * kChunk * rows_ * (p_.dim_qk + p_.dim_v);
    const int64_t threads = work < kParallelWork ? 1 : least(num_threads(), items);
    bool ok = true;
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      if (!run_items(items * begin / threads, items * end / threads)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    const int64_t heads = ok ? p_.batch * p_.heads_kv : 0, parts = least(threads, heads);
    parallel_for(0, parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = heads * begin / parts; i < heads * end / parts; ++i)
        if (!merge(i / p_.heads_kv, i % p_.heads_kv)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return_block(partial_);
    return ok;
  }

  struct Scratch {
    A *query, *scores, *rotation;
    const C **keys, **values;
  };

  Scratch carve(Carver& carver) const {
    Scratch s;
    s.query = carver.take<A>(p_.heads_kv * rows_ * ld_q_);
    s.scores = carver.take<A>(rows_ * kLds);
    s.rotation = carver.take<A>(Rotation<A>::kScratch + ld_q_);
    s.keys = carver.take<const C*>(kChunk + StoredRows<C>::kBlock);
    s.values = carver.take<const C*>(kChunk + StoredRows<C>::kBlock);
    return s;
  }

  // Items count (sequence, chunk, head) with the head innermost.
  bool run_items(int64_t begin, int64_t end) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    int64_t batch = 0, loaded = -1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= first_chunk_[batch + 1] * p_.heads_kv) ++batch;
      for (int64_t head = 0; loaded != batch && head < p_.heads_kv; ++head) load_queries(s, batch, head);
      loaded = batch;
      const int64_t inside = i - first_chunk_[batch] * p_.heads_kv;
      run_chunk(s, batch, inside % p_.heads_kv, inside / p_.heads_kv, partial_ + i * rows_ * partial_row());
    }
    return true;
  }

  // Row r is query r % len_q of the group's head r / len_q.
  int64_t head_of_row(int64_t head_kv, int64_t r) const { return head_kv * group_ + r / p_.len_q; }

  void load_queries(const Scratch& s, int64_t batch, int64_t head_kv) const {
    Rotation<A> rotation(p_.rotary, s.rotation);
    A* row = s.rotation + Rotation<A>::kScratch;
    for (int64_t r = 0; r < rows_; ++r) {
      read_query(p_, batch, head_of_row(head_kv, r), r % p_.len_q, rotation, row);
      StoredRows<C>::to_pairs(row, p_.dim_qk, s.query + (head_kv * rows_ + r) * ld_q_);
    }
  }

  void run_chunk(const Scratch& s, int64_t batch, int64_t head_kv, int64_t chunk, A* partial) const {
    const Slots seen = all_seen(batch);
    const int64_t place = (seen.begin / kChunk + chunk) * kChunk;
    const int64_t begin = most(seen.begin, place), end = least(seen.end, place + kChunk), n = end - begin;
    list_rows(rows_of<const C>(p_, p_.key, batch, head_kv), begin, end, s.keys);
    list_rows(rows_of<const C>(p_, p_.value, batch, head_kv), begin, end, s.values);
    StoredRows<C>::look_ahead(s.keys, s.values, n);
    stored_.score(s.query + head_kv * rows_ * ld_q_, rows_, s.keys, n, s.scores);
    for (int64_t r = 0; r < rows_; ++r) {
      A* scores = s.scores + r * kLds;
      finish_scores(p_, batch, head_of_row(head_kv, r), r % p_.len_q, begin, end, score_scale(), scores);
      A* row = partial + r * partial_row();
      const A top = row_max(scores, n), shift = top == -kInfinity<A> ? 0 : top;
      row[ld_v_] = top;
      row[ld_v_ + 1] = exp2_row(scores, scores, n, round_up(n, kLane), static_cast<A>(kLog2E), shift);
      if (p_.value_scale.data) multiply_scales(p_, p_.value_scale, batch, head_kv, begin, end, scores);
    }
    stored_.weigh(s.scores, rows_, s.values, n, partial);
  }

  // What a product of widened codes has to be multiplied with.
  A score_scale() const { return static_cast<A>(p_.scale) * code_unit(); }
  static constexpr A code_unit() { return std::is_same_v<C, e4m3> ? static_cast<A>(kE4m3Unit) : A(1); }

  static void list_rows(const CacheRows<const C>& rows, int64_t begin, int64_t end, const C** list) {
    rows.for_runs(begin, end, [&](const C* first, int64_t slot, int64_t count) {
      for (int64_t j = 0; j < count; ++j) list[slot - begin + j] = first + j * rows.stride_slot;
    });
  }

  // Partial results of the chunks of one head, in the order of the slots.
  bool merge(int64_t batch, int64_t head_kv) const {
    A* sums = static_cast<A*>(thread_scratch(2 * ld_v_ * sizeof(A)));
    if (!sums) return false;
    A* ordered = sums + ld_v_;
    const int64_t chunks = first_chunk_[batch + 1] - first_chunk_[batch];
    const A* first = partial_ + (first_chunk_[batch] * p_.heads_kv + head_kv) * rows_ * partial_row();
    for (int64_t r = 0; r < rows_; ++r) {
      auto row = [&](int64_t chunk) { return first + (chunk * p_.heads_kv * rows_ + r) * partial_row(); };
      A top = -kInfinity<A>, denominator = 0;
      for (int64_t c = 0; c < chunks; ++c) top = top > row(c)[ld_v_] ? top : row(c)[ld_v_];
      const A shift = top == -kInfinity<A> ? 0 : top;
      for (int64_t d = 0; d < ld_v_; ++d) sums[d] = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        const A factor = exp2(broadcast((row(c)[ld_v_] - shift) * static_cast<A>(kLog2E)))[0];
        denominator += row(c)[ld_v_ + 1] * factor;
        for (int64_t d = 0; d < ld_v_; d += kLane) store(sums + d, load(sums + d) + load(row(c) + d) * factor);
      }
      for (int64_t d = 0; d < ld_v_; d += kLane) store(sums + d, load(sums + d) * code_unit());
      StoredRows<C>::from_pairs(sums, ld_v_, ordered);
      finish_row(p_, batch, head_of_row(head_kv, r), r % p_.len_q, ordered, top, denominator);
    }
    return true;
  }

  const KvCacheParams& p_;
  const int64_t group_, rows_;
  const StoredRows<C> stored_;
  const int64_t ld_q_, ld_v_;
  int64_t* first_chunk_ = nullptr;
  A* partial_ = nullptr;
};

}  // namespace ptk::PTK_ISA
