// Appending to the cache: rotate the new keys, quantise where the cache is quantised, write the slots.
//
//   per slot and head   scale = max |x| / largest code (1 for a row of zeros), or the head's own
//   code                nearest to x / scale, ties to even, clamped to +-127 (int8) or +-448 (float8 e4m3)
//
//   threads             tokens are dealt out; each writes its own slots
#pragma once

#include "kv_cache_cpu_common.h"

namespace ptk::PTK_ISA {

PTK_INLINE int8_t to_s8(float x) {
  constexpr float kMagic = 0x1.8p23f;
  const float limited = x < -127 ? -127 : x > 127 ? 127 : x;
  float shifted = limited + kMagic;
  asm volatile("" : "+m"(shifted));
  return x == x ? static_cast<int8_t>(shifted - kMagic) : int8_t(0);
}

// Exponent bias 7, three mantissa bits, no infinity, 0x7f is NaN.
PTK_INLINE e4m3 to_e4m3(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  if (magnitude > 0x7f800000) return {static_cast<uint8_t>(sign | 0x7f)};
  if (magnitude >= 0x43e00000) return {static_cast<uint8_t>(sign | 0x7e)};
  if (magnitude < 0x3c800000) {
    // Below 2^-6 codes are multiples of 2^-9: adding 2^14 leaves them in the low mantissa, rounded to nearest even.
    const float shifted = bit_cast<float>(magnitude) + 0x1p14f;
    return {static_cast<uint8_t>(sign | (bit_cast<uint32_t>(shifted) - 0x46800000u))};
  }
  const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
  return {static_cast<uint8_t>(sign | ((rounded - 0x3c000000u) >> 20))};
}

template <class T>
class Append {
  using A = Acc<T>;

public:
  explicit Append(const KvCacheParams& params) : p_(params) {}

  bool run() const {
    const int64_t tokens = p_.batch * p_.len_new;
    const int64_t threads = tokens * p_.heads_kv * (p_.dim_qk + p_.dim_v) < kParallelWork ? 1 : num_threads();
    bool ok = true;
    parallel_for(0, least(threads, tokens), [&](int64_t begin, int64_t end) {
      const int64_t parts = least(threads, tokens);
      A* scratch = static_cast<A*>(thread_scratch((Rotation<A>::kScratch + kRow) * sizeof(A)));
      if (!scratch) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      for (int64_t t = tokens * begin / parts; t < tokens * end / parts; ++t)
        append_token(t / p_.len_new, t % p_.len_new, scratch);
    });
    return ok;
  }

private:
  static constexpr int64_t kParallelWork = 1 << 16;
  static constexpr int64_t kRow = 512 + 64;

  void append_token(int64_t batch, int64_t token, A* scratch) const {
    A* row = scratch + Rotation<A>::kScratch;
    Rotation<A> rotation(p_.rotary, scratch);
    const int64_t slot = p_.total[batch] - p_.len_new + token;
    if (rotation) rotation.move_to(slot);
    for (int64_t head = 0; head < p_.heads_kv; ++head) {
      const auto key = head_of<T>(p_.key_new, batch, head), value = head_of<T>(p_.value_new, batch, head);
      append_row(key.row(token), key.stride_dim, p_.dim_qk, rotation ? &rotation : nullptr, p_.key, p_.key_scale, batch,
                 head, slot, row);
      append_row(value.row(token), value.stride_dim, p_.dim_v, nullptr, p_.value, p_.value_scale, batch, head, slot,
                 row);
    }
  }

  void append_row(const T* source, int64_t stride, int64_t dim, const Rotation<A>* rotation, const CacheView& cache,
                  const ScaleView& scale, int64_t batch, int64_t head, int64_t slot, A* row) const {
    if (p_.cache_type == CacheType::as_query) {
      T* target = slot_of(rows_of<T>(p_, cache, batch, head), slot);
      if (!rotation) {
        copy_row(source, stride, dim, target);
      } else {
        for (int64_t d = 0; d < dim; ++d) row[d] = load_scalar(source + d * stride);
        rotation->apply(row);
        for (int64_t d = 0; d < dim; ++d) target[d] = round_to<T>(row[d]);
      }
      return;
    }
    for (int64_t d = 0; d < dim; ++d) row[d] = load_scalar(source + d * stride);
    if (rotation) rotation->apply(row);
    float* s = slot_of(rows_of(p_, scale, batch, head), slot);
    if (scale.is_per_slot) *s = choose_scale(row, dim);
    if (p_.cache_type == CacheType::s8) {
      int8_t* target = slot_of(rows_of<int8_t>(p_, cache, batch, head), slot);
      for (int64_t d = 0; d < dim; ++d) target[d] = to_s8(static_cast<float>(row[d]) / *s);
    } else {
      e4m3* target = slot_of(rows_of<e4m3>(p_, cache, batch, head), slot);
      for (int64_t d = 0; d < dim; ++d) target[d] = to_e4m3(static_cast<float>(row[d]) / *s);
    }
  }

  template <class C>
  static C* slot_of(const CacheRows<C>& rows, int64_t slot) {
    return rows.data + rows.blocks[slot / rows.page] * rows.stride_block + slot % rows.page * rows.stride_slot;
  }

  float choose_scale(const A* row, int64_t dim) const {
    float top = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float magnitude = __builtin_fabsf(static_cast<float>(row[d]));
      // A NaN stays once it is met.
      top = magnitude <= top || top != top ? top : magnitude;
    }
    const float scale = top / (p_.cache_type == CacheType::s8 ? 127.0f : 448.0f);
    return scale == 0 ? 1 : scale;
  }

  const KvCacheParams& p_;
};

}  // namespace ptk::PTK_ISA
