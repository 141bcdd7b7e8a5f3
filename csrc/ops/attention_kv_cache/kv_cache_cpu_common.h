// What the kernels of the cache share: where slots lie, what a query sees, rotation, changes to scores, finished rows.
#pragma once

#include "csrc/ops/attention/attention_cpu_forward.h"
#include "csrc/ops/attention_kv_cache/kv_cache.h"

namespace ptk::PTK_ISA {

struct e4m3 {
  uint8_t bits;
};

// Calls body with a value of the type that dtype names.
template <class Body>
PTK_INLINE auto with_type(DType dtype, const Body& body) {
  switch (dtype) {
  case DType::f64:
    return body(double());
  case DType::f32:
    return body(float());
  case DType::bf16:
    return body(bf16());
  case DType::f16:
    return body(f16());
  }
  __builtin_unreachable();
}

template <class A>
inline constexpr A kInfinity = static_cast<A>(__builtin_inf());

// ---- what a query sees

struct Slots {
  int64_t begin, end;
};

PTK_INLINE int64_t position_of(const KvCacheParams& p, int64_t batch, int64_t i) {
  return p.total[batch] - p.len_q + i;
}

PTK_INLINE Slots visible_slots(const KvCacheParams& p, int64_t batch, int64_t i) {
  const int64_t position = position_of(p, batch, i);
  Slots slots{p.leftpad[batch], p.total[batch]};
  if (p.is_causal) slots.end = least(slots.end, position + 1);
  if (p.window_right >= 0 && p.window_right < p.total[batch])
    slots.end = least(slots.end, position + 1 + p.window_right);
  if (p.window_left >= 0 && p.window_left < p.total[batch]) slots.begin = most(slots.begin, position - p.window_left);
  slots.end = most(slots.begin, slots.end);
  return slots;
}

// All that queries i <= last see between them; later queries see no fewer slots at the end and none earlier.
PTK_INLINE Slots visible_slots(const KvCacheParams& p, int64_t batch, int64_t first, int64_t last) {
  return {visible_slots(p, batch, first).begin, visible_slots(p, batch, last).end};
}

// ---- where slots lie

template <class C>
struct CacheRows {
  C* data;
  const int64_t* blocks;
  int64_t page, stride_block, stride_slot;

  // Calls body(first row, slot, rows) for the runs of slots that lie at one stride.
  template <class Body>
  inline __attribute__((always_inline)) void for_runs(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t slot = begin; slot < end;) {
      const int64_t inside = slot % page, count = least(page - inside, end - slot);
      body(data + blocks[slot / page] * stride_block + inside * stride_slot, slot, count);
      slot += count;
    }
  }
};

template <class C>
PTK_INLINE CacheRows<C> rows_of(const KvCacheParams& p, const CacheView& view, int64_t batch, int64_t head) {
  return {static_cast<C*>(view.data) + head * view.stride_head, p.blocks + batch * p.blocks_per_sequence, p.page,
          view.stride_block, view.stride_slot};
}
PTK_INLINE CacheRows<float> rows_of(const KvCacheParams& p, const ScaleView& view, int64_t batch, int64_t head) {
  return {view.data + head * view.stride_head, p.blocks + batch * p.blocks_per_sequence, p.page, view.stride_block,
          view.stride_slot};
}

// values[j - begin] *= the scale of slot j.
template <class A>
static void multiply_scales(const KvCacheParams& p, const ScaleView& scale, int64_t batch, int64_t head, int64_t begin,
                            int64_t end, A* values) {
  rows_of(p, scale, batch, head).for_runs(begin, end, [&](const float* s, int64_t slot, int64_t count) {
    A* v = values + (slot - begin);
    for (int64_t j = 0; j < count; ++j) v[j] *= static_cast<A>(s[j * scale.stride_slot]);
  });
}

// ---- rows as numbers

// n values at any stride, in the arithmetic type.
template <class A>
static void read_row(DType dtype, const void* data, int64_t offset, int64_t stride, int64_t n, A* row) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* p = static_cast<const T*>(data) + offset;
    for (int64_t d = 0; d < n; ++d) row[d] = static_cast<A>(load_scalar(p + d * stride));
  });
}

// Rotates pairs of a row by the angles of a position. Products are rounded before they are added, as they are in the
// composition, so that what is stored has the composition's bits.
template <class A>
class Rotation {
public:
  static constexpr int64_t kScratch = 4 * (512 / 2 + kLanes<A>);

  Rotation(const Rotary& rotary, A* scratch)
      : r_(rotary), half_(rotary.dim / 2), cos_(scratch), sin_(scratch + kScratch / 4), x_(scratch + kScratch / 2),
        y_(scratch + kScratch / 4 * 3) {}

  explicit operator bool() const { return r_.cos != nullptr; }

  void move_to(int64_t position) {
    read_row(r_.dtype, r_.cos, position * r_.cos_strides[0], r_.cos_strides[1], half_, cos_);
    read_row(r_.dtype, r_.sin, position * r_.sin_strides[0], r_.sin_strides[1], half_, sin_);
  }

  void apply(A* row) const {
    const int64_t step = r_.interleaved ? 2 : 1, second = r_.interleaved ? 1 : half_;
    for (int64_t i = 0; i < half_; ++i) {
      x_[i] = row[i * step];
      y_[i] = row[i * step + second];
    }
    for (int64_t i = 0; i < half_; i += kLanes<A>) {
      const Vec<A> x = load(x_ + i), y = load(y_ + i), c = load(cos_ + i), s = load(sin_ + i);
      Vec<A> xc = x * c, ys = y * s, xs = x * s, yc = y * c;
      PTK_OPAQUE(xc);
      PTK_OPAQUE(ys);
      PTK_OPAQUE(xs);
      PTK_OPAQUE(yc);
      store(x_ + i, xc - ys);
      store(y_ + i, xs + yc);
    }
    for (int64_t i = 0; i < half_; ++i) {
      row[i * step] = x_[i];
      row[i * step + second] = y_[i];
    }
  }

private:
  const Rotary& r_;
  int64_t half_;
  A *cos_, *sin_, *x_, *y_;
};

// Where query i is rotated to: with a direction in the mask its own slot, without one the first new slot for all.
PTK_INLINE int64_t rotary_position(const KvCacheParams& p, int64_t batch, int64_t i) {
  const bool is_directed = p.is_causal || p.window_left >= 0 || p.window_right >= 0;
  return p.total[batch] - p.len_new + (is_directed ? i : 0);
}

template <class A>
static void read_query(const KvCacheParams& p, int64_t batch, int64_t head, int64_t i, Rotation<A>& rotation, A* row) {
  const auto& s = p.query.strides;
  read_row(p.dtype, p.query.data, batch * s[0] + head * s[1] + i * s[2], s[3], p.dim_qk, row);
  if (rotation) {
    rotation.move_to(rotary_position(p, batch, i));
    rotation.apply(row);
  }
}

// ---- scores

PTK_INLINE Vec<double> tanh_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// Absolute error below 1.3e-7. Near 0, where 1 - 2^.. would cancel, the odd Taylor polynomial.
PTK_INLINE Vec<float> tanh_of(Vec<float> x) {
  const Vec<float> magnitude = x < 0 ? -x : x, square = x * x;
  const Vec<float> t = exp2(magnitude * static_cast<float>(-2 * kLog2E));
  const Vec<float> large = (1.0f - t) / (1.0f + t);
  Vec<float> small = square * (62.0f / 2835) - 17.0f / 315;
  small = small * square + 2.0f / 15;
  small = small * square - 1.0f / 3;
  small = small * square * x + x;
  return magnitude < 0.3f ? small : x < 0 ? -large : large;
}

// Scores of one query with slots [begin, end), from products with the stored keys: scaled, capped, biased, and -inf
// where the query does not see the slot. scores is readable and writable up to a whole vector.
template <class A>
static void finish_scores(const KvCacheParams& p, int64_t batch, int64_t head, int64_t i, int64_t begin, int64_t end,
                          A scale, A* scores) {
  const int64_t n = end - begin;
  if (p.key_scale.data) multiply_scales(p, p.key_scale, batch, head / (p.heads_q / p.heads_kv), begin, end, scores);
  const Slots seen = visible_slots(p, batch, i);
  if (scale != 1 || p.softcap > 0 || p.alibi) {
    const A cap = static_cast<A>(p.softcap), inverse = cap > 0 ? scale / cap : scale;
    const A slope = p.alibi ? static_cast<A>(p.alibi[batch * p.alibi_strides[0] + head * p.alibi_strides[1]]) : A(0);
    const A distance = static_cast<A>(position_of(p, batch, i) - begin);
    for (int64_t j = 0; j < n; j += kLanes<A>) {
      Vec<A> s = load(scores + j) * inverse;
      if (cap > 0) s = tanh_of(s) * cap;
      if (p.alibi) {
        const Vec<A> d = distance - static_cast<A>(j) - iota<A>();
        s -= (d < 0 ? -d : d) * slope;
      }
      store(scores + j, s);
    }
  }
  const int64_t first = least(n, most(0, seen.begin - begin)), last = most(first, least(n, seen.end - begin));
  for (int64_t j = 0; j < first; ++j) scores[j] = -kInfinity<A>;
  for (int64_t j = last; j < n; ++j) scores[j] = -kInfinity<A>;
}

// ---- a finished row

// out = sums / denominator with the sink in it; lse likewise. sums and denominator are relative to exp(shift); sums are
// changed.
template <class A>
static void finish_row(const KvCacheParams& p, int64_t batch, int64_t head, int64_t i, A* sums, A shift,
                       A denominator) {
  if (p.sinks && denominator == denominator) {
    const A sink = static_cast<A>(p.sinks[head * p.sinks_stride]), top = sink > shift ? sink : shift;
    if (top != -kInfinity<A>) {
      const A log2e = static_cast<A>(kLog2E);
      const A factor = denominator > 0 ? exp2(broadcast((shift - top) * log2e))[0] : A(0);
      denominator = denominator * factor + exp2(broadcast((sink - top) * log2e))[0];
      for (int64_t d = 0; d < p.dim_v; d += kLanes<A>) store(sums + d, load(sums + d) * factor);
      shift = top;
    }
  }
  const auto& s = p.out.strides;
  const int64_t offset = batch * s[0] + head * s[1] + i * s[2];
  A* lse = static_cast<A*>(p.lse) + (batch * p.heads_q + head) * p.len_q + i;
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<Acc<T>, A>)
      write_row<T>(sums, shift, denominator, p.dim_v, static_cast<T*>(p.out.data) + offset, lse);
  });
}

}  // namespace ptk::PTK_ISA
