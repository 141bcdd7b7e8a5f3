// Few queries against a long cache (decoding): limited by how fast keys and values can be read.
//
//   rows       all queries of all heads that share a key and value head, so that a stored row is read, and widened,
//              once for up to four of them
//   chunks     kChunk slots at fixed places of the sequence: scores of the chunk (sums over dim stay in registers and
//   are
//              transposed once per vector of scores), softmax, then P V through kBlock rows of values that stay in L1
//   memory     rows are addressed through a list of pointers, so that pages and strides cost nothing in the loops, and
//              are prefetched a fixed number of rows ahead, which the hardware does not do across pages
//   threads    every (sequence, kv head, chunk) is an item; partial results are merged in the order of the slots, so
//              results do not depend on the number of threads
#pragma once

#include "kv_cache_cpu_common.h"

namespace ptk::PTK_ISA {

// Two vectors of consecutive stored values. Where it saves instructions they come in another order: value i of the pair
// is lane place(i) of both.
template <class C>
struct PairOf {
  using A = Acc<C>;
  static constexpr int kStep = 2 * kLanes<A>;
  static constexpr int place(int i) { return i; }
  PTK_INLINE void load_pair(const C* p, Vec<A>& low, Vec<A>& high) {
    low = load_as(p);
    high = load_as(p + kLanes<A>);
  }
};

template <>
struct PairOf<bf16> {
  using A = float;
  static constexpr int kStep = 2 * kLanes<A>;
  static constexpr int place(int i) { return i / 2 + i % 2 * kLanes<A>; }
  PTK_INLINE void load_pair(const bf16* p, Vec<A>& low, Vec<A>& high) {
    const Vec<uint32_t> both = load(reinterpret_cast<const uint32_t*>(p));
    low = bit_cast<Vec<float>>(both << 16);
    high = bit_cast<Vec<float>>(both & 0xffff0000u);
  }
};

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
  static constexpr int place(int i) { return i; }
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
  static constexpr int place(int i) { return i; }
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
  using Pair = PairOf<C>;
  static constexpr int kStep = Pair::kStep;
  static constexpr int kLane = kLanes<A>;

public:
  static constexpr int64_t kRows = 16;
  static bool suits(const KvCacheParams& p) { return p.heads_q / p.heads_kv * p.len_q <= kRows; }

  explicit DirectAttend(const KvCacheParams& params)
      : p_(params), group_(params.heads_q / params.heads_kv), rows_(group_ * params.len_q),
        ld_q_(round_up(params.dim_qk, kStep)), ld_v_(round_up(params.dim_v, kStep)) {}

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
  static constexpr int64_t kBlock = 32;   // rows of values that stay in L1 while all of dim_v is summed, and rows
                                          // between a prefetch and the use
  static constexpr int64_t kLds = kChunk + 64;
  static constexpr int64_t kParallelWork = 1 << 16;

  Slots all_seen(int64_t batch) const { return visible_slots(p_, batch, 0, p_.len_q - 1); }
  int64_t partial_row() const { return ld_v_ + 2; }  // sums, maximum, denominator

  bool attend() {
    const int64_t items = first_chunk_[p_.batch] * p_.heads_kv;
    partial_ = static_cast<A*>(__builtin_malloc(most(items, 1) * rows_ * partial_row() * sizeof(A)));
    if (!partial_) return false;
    const int64_t work = items * kChunk * rows_ * (p_.dim_qk + p_.dim_v);
    const int64_t threads = work < kParallelWork ? 1 : least(num_threads(), items);
    bool ok = true;
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      if (!run_items(items * begin / threads, items * end / threads)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    for (int64_t b = 0; ok && b < p_.batch; ++b)
      for (int64_t head = 0; ok && head < p_.heads_kv; ++head) ok = merge(b, head);
    __builtin_free(partial_);
    return ok;
  }

  struct Scratch {
    A *query, *scores, *rotation;
    const C **keys, **values;
  };

  Scratch carve(Carver& carver) const {
    Scratch s;
    s.query = carver.take<A>(rows_ * ld_q_);
    s.scores = carver.take<A>(rows_ * kLds);
    s.rotation = carver.take<A>(Rotation<A>::kScratch + ld_q_);
    s.keys = carver.take<const C*>(kChunk + kBlock);
    s.values = carver.take<const C*>(kChunk + kBlock);
    return s;
  }

  // Items count (sequence, head, chunk) with the chunk innermost.
  bool run_items(int64_t begin, int64_t end) const {
    Carver count;
    carve(count);
    Carver carver{static_cast<char*>(thread_scratch(count.bytes()))};
    if (!carver.next) return false;
    const Scratch s = carve(carver);
    int64_t batch = 0, loaded = -1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= first_chunk_[batch + 1] * p_.heads_kv) ++batch;
      const int64_t chunks = first_chunk_[batch + 1] - first_chunk_[batch];
      const int64_t inside = i - first_chunk_[batch] * p_.heads_kv, head = inside / chunks;
      if (loaded != batch * p_.heads_kv + head) load_queries(s, batch, head);
      loaded = batch * p_.heads_kv + head;
      run_chunk(s, batch, head, inside % chunks, partial_ + i * rows_ * partial_row());
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
      for (int64_t d = p_.dim_qk; d < ld_q_; ++d) row[d] = 0;
      for (int64_t d = 0; d < ld_q_; ++d) s.query[r * ld_q_ + d / kStep * kStep + Pair::place(d % kStep)] = row[d];
    }
  }

  void run_chunk(const Scratch& s, int64_t batch, int64_t head_kv, int64_t chunk, A* partial) const {
    const Slots seen = all_seen(batch);
    const int64_t place = (seen.begin / kChunk + chunk) * kChunk;
    const int64_t begin = most(seen.begin, place), end = least(seen.end, place + kChunk), n = end - begin;
    list_rows(rows_of<const C>(p_, p_.key, batch, head_kv), begin, end, s.keys);
    list_rows(rows_of<const C>(p_, p_.value, batch, head_kv), begin, end, s.values);
    for (int64_t j = 0; j < kBlock; ++j) {
      s.keys[n + j] = s.values[least(j, n - 1)];
      s.values[n + j] = s.values[n - 1];
    }
    for_rows([&](auto count, int64_t r) { score_keys<count()>(s.query + r * ld_q_, s.keys, n, s.scores + r * kLds); });
    for (int64_t r = 0; r < rows_; ++r) {
      A* scores = s.scores + r * kLds;
      finish_scores(p_, batch, head_of_row(head_kv, r), r % p_.len_q, begin, end, score_scale(), scores);
      A* row = partial + r * partial_row();
      const A top = row_max(scores, n), shift = top == -kInfinity<A> ? 0 : top;
      row[ld_v_] = top;
      row[ld_v_ + 1] = exp2_row(scores, scores, n, round_up(n, kLane), static_cast<A>(kLog2E), shift);
      if (p_.value_scale.data) multiply_scales(p_, p_.value_scale, batch, head_kv, begin, end, scores);
    }
    for_rows([&](auto count, int64_t r) {
      weigh_values<count()>(s.scores + r * kLds, s.values, n, partial + r * partial_row());
    });
  }

  // What a product of widened codes has to be multiplied with.
  A score_scale() const { return static_cast<A>(p_.scale) * code_unit(); }
  static constexpr A code_unit() { return std::is_same_v<C, e4m3> ? static_cast<A>(kE4m3Unit) : A(1); }

  static void list_rows(const CacheRows<const C>& rows, int64_t begin, int64_t end, const C** list) {
    rows.for_runs(begin, end, [&](const C* first, int64_t slot, int64_t count) {
      for (int64_t j = 0; j < count; ++j) list[slot - begin + j] = first + j * rows.stride_slot;
    });
  }

  // Calls body(R, r) for runs of R = 4, 2, 1 rows that begin at row r.
  template <class Body>
  inline __attribute__((always_inline)) void for_rows(const Body& body) const {
    int64_t r = 0;
    if constexpr (kLane >= 4)
      for (; r + 4 <= rows_; r += 4) body(std::integral_constant<int, 4>{}, r);
    for (; r + 2 <= rows_; r += 2) body(std::integral_constant<int, 2>{}, r);
    if (r < rows_) body(std::integral_constant<int, 1>{}, r);
  }

  static inline __attribute__((always_inline)) void load_tail(const C* p, int64_t n, Vec<A>& low, Vec<A>& high) {
    C buffer[kStep] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    Pair::load_pair(buffer, low, high);
  }

  // A row at a time and in the order of memory: that is what the hardware's own prefetching recognises and runs ahead
  // of.
  static inline __attribute__((always_inline)) void prefetch_row(const C* row, int64_t n) {
    for (int64_t d = 0; d < n; d += 64 / static_cast<int64_t>(sizeof(C))) __builtin_prefetch(row + d);
  }

  // scores[r][j] of R queries: the sums of kLane (query, key) pairs at a time, G keys in each pass over dim.
  template <int R>
  void score_keys(const A* q, const C* const* keys, int64_t n, A* scores) const {
    constexpr int J = kLane / R, G = J > 1 ? 2 : 1;
    for (int64_t j = 0; j < n; j += J) {
      Vec<A> sum[kLane] = {};
#pragma GCC unroll 8
      for (int g = 0; g < J; g += G) {
        const C* k[G];
#pragma GCC unroll 2
        for (int i = 0; i < G; ++i) {
          k[i] = keys[least(j + g + i, n - 1)];
          prefetch_row(keys[least(j + g + i + kBlock, n + kBlock - 1)], p_.dim_qk);
        }
        multiply_keys<R, G, J>(q, k, sum + g);
      }
      transpose<A>(sum);
      Vec<A> total = sum[0];
#pragma GCC unroll 16
      for (int i = 1; i < kLane; ++i) total += sum[i];
      A by_pair[kLane];
      store(by_pair, total);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) std::memcpy(scores + r * kLds + j, by_pair + r * J, J * sizeof(A));
    }
  }

  // sum[r * J + i] += products of query r and key i.
  template <int R, int G, int J>
  inline __attribute__((always_inline)) void multiply_keys(const A* q, const C* const (&k)[G], Vec<A>* sum) const {
    const int64_t full = p_.dim_qk / kStep * kStep, tail = p_.dim_qk - full;
    Vec<A> low[G], high[G];
    auto add = [&](int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> q0 = load(q + r * ld_q_ + d), q1 = load(q + r * ld_q_ + d + kLane);
#pragma GCC unroll 2
        for (int i = 0; i < G; ++i) {
          sum[r * J + i] += q0 * low[i];
          sum[r * J + i] += q1 * high[i];
        }
      }
    };
    for (int64_t d = 0; d < full; d += kStep) {
#pragma GCC unroll 2
      for (int i = 0; i < G; ++i) Pair::load_pair(k[i] + d, low[i], high[i]);
      add(d);
    }
    if (tail) {
#pragma GCC unroll 2
      for (int i = 0; i < G; ++i) load_tail(k[i] + full, tail, low[i], high[i]);
      add(full);
    }
  }

  // out[r] = sum over j of p[r][j] values[j], in the order of the pairs.
  template <int R>
  void weigh_values(const A* p, const C* const* values, int64_t n, A* out) const {
    for (int r = 0; r < R; ++r) std::memset(out + r * partial_row(), 0, ld_v_ * sizeof(A));
    constexpr int wide = 4 / R;
    const int64_t full = p_.dim_v / kStep * kStep;
    const int64_t slices = (full / kStep + wide - 1) / wide, ahead = slices ? (kBlock + slices - 1) / slices : kBlock;
    for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
      const int64_t count = least(kBlock, n - j0);
      int64_t d = 0, next = 0;
      // The rows of the next block, a share of them before each slice of this one.
      auto prefetch = [&]() __attribute__((always_inline)) {
        for (const int64_t end = least(next + ahead, count); next < end; ++next)
          prefetch_row(values[j0 + kBlock + next], p_.dim_v);
      };
      if constexpr (wide > 1)
        for (; d + wide * kStep <= full; d += wide * kStep) {
          prefetch();
          weigh_slice<R, wide>(p + j0, values + j0, count, d, out);
        }
      for (; d < full; d += kStep) {
        prefetch();
        weigh_slice<R, 1>(p + j0, values + j0, count, d, out);
      }
      if (d < p_.dim_v) weigh_tail<R>(p + j0, values + j0, count, d, out);
    }
  }

  // S pairs of vectors of the sums in registers.
  template <int R, int S>
  inline __attribute__((always_inline)) void weigh_slice(const A* p, const C* const* values, int64_t count, int64_t d,
                                                         A* out) const {
    Vec<A> sum[R][2 * S];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2 * S; ++i) sum[r][i] = load(out + r * partial_row() + d + i * kLane);
    for (int64_t j = 0; j < count; ++j) {
      const C* v = values[j] + d;
      Vec<A> x[2 * S];
#pragma GCC unroll 4
      for (int i = 0; i < S; ++i) Pair::load_pair(v + i * kStep, x[2 * i], x[2 * i + 1]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> weight = broadcast(p[r * kLds + j]);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * S; ++i) sum[r][i] += weight * x[i];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2 * S; ++i) store(out + r * partial_row() + d + i * kLane, sum[r][i]);
  }

  template <int R>
  void weigh_tail(const A* p, const C* const* values, int64_t count, int64_t d, A* out) const {
    Vec<A> sum[R][2];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) sum[r][i] = load(out + r * partial_row() + d + i * kLane);
    for (int64_t j = 0; j < count; ++j) {
      Vec<A> x[2];
      load_tail(values[j] + d, p_.dim_v - d, x[0], x[1]);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) sum[r][i] += broadcast(p[r * kLds + j]) * x[i];
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) store(out + r * partial_row() + d + i * kLane, sum[r][i]);
  }

  // Partial results of the chunks of one head, in the order of the slots.
  bool merge(int64_t batch, int64_t head_kv) const {
    A* sums = static_cast<A*>(thread_scratch(2 * ld_v_ * sizeof(A)));
    if (!sums) return false;
    A* ordered = sums + ld_v_;
    const int64_t chunks = first_chunk_[batch + 1] - first_chunk_[batch];
    const A* first = partial_ + (first_chunk_[batch] * p_.heads_kv + head_kv * chunks) * rows_ * partial_row();
    for (int64_t r = 0; r < rows_; ++r) {
      auto row = [&](int64_t chunk) { return first + (chunk * rows_ + r) * partial_row(); };
      A top = -kInfinity<A>, denominator = 0;
      for (int64_t c = 0; c < chunks; ++c) top = top > row(c)[ld_v_] ? top : row(c)[ld_v_];
      const A shift = top == -kInfinity<A> ? 0 : top;
      for (int64_t d = 0; d < ld_v_; ++d) sums[d] = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        const A factor = exp2(broadcast((row(c)[ld_v_] - shift) * static_cast<A>(kLog2E)))[0];
        denominator += row(c)[ld_v_ + 1] * factor;
        for (int64_t d = 0; d < ld_v_; d += kLane) store(sums + d, load(sums + d) + load(row(c) + d) * factor);
      }
      for (int64_t d = 0; d < ld_v_; ++d) ordered[d] = sums[d / kStep * kStep + Pair::place(d % kStep)] * code_unit();
      finish_row(p_, batch, head_of_row(head_kv, r), r % p_.len_q, ordered, top, denominator);
    }
    return true;
  }

  const KvCacheParams& p_;
  const int64_t group_, rows_, ld_q_, ld_v_;
  int64_t* first_chunk_ = nullptr;
  A* partial_ = nullptr;
};

}  // namespace ptk::PTK_ISA
