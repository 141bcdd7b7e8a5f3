// What the CPU kernels of attention share: views of the operands, masks, and
// how rows of queries meet blocks of keys.
#pragma once

#include "csrc/core/parallel.h"
#include "csrc/cpu/carver.h"
#include "csrc/cpu/gemm/gemm.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/scratch.h"
#include "csrc/ops/attention/attention.h"

namespace ptk::PTK_ISA {

// Rows of one head: element (row, dim) of a [batch, heads, length, dim]
// operand.
template <class T>
struct HeadView {
  T* data;
  int64_t stride_row, stride_dim;
  T* row(int64_t i) const { return data + i * stride_row; }
};

template <class T>
PTK_INLINE HeadView<const T> head_of(const ConstView& v, int64_t batch, int64_t head) {
  return {static_cast<const T*>(v.data) + batch * v.strides[0] + head * v.strides[1], v.strides[2], v.strides[3]};
}
template <class T>
PTK_INLINE HeadView<T> head_of(const View& v, int64_t batch, int64_t head) {
  return {static_cast<T*>(v.data) + batch * v.strides[0] + head * v.strides[1], v.strides[2], v.strides[3]};
}

// Keys that row `i` of the queries may see: a prefix.
PTK_INLINE int64_t visible_keys(const Problem& p, int64_t i) {
  return p.is_causal ? least(p.len_k, i + 1) : p.len_k;
}

// Not the double log2: its symbol is newer than the oldest glibc that the library promises to load on.
PTK_INLINE float log2_of(float x) {
  return __builtin_log2f(x);
}
PTK_INLINE double log2_of(double x) {
  return static_cast<double>(__builtin_log2l(x));
}

// One finished row: out = sums / denominator, lse = shift + log(denominator).
template <class T, class A>
PTK_INLINE void write_row(const A* sums, A shift, A denominator, int64_t dim, T* out, A* lse) {
  if (denominator == 0) {
    std::memset(out, 0, dim * sizeof(T));
    *lse = -static_cast<A>(__builtin_inf());
    return;
  }
  for (int64_t d = 0; d < dim; d += kLanes<A>) store_as_partial(out + d, load(sums + d) / denominator, dim - d);
  *lse = shift + log2_of(denominator) * static_cast<A>(kLn2);
}

// ---- masks
// --------------------------------------------------------------------------------------------------------

namespace detail {

template <class M, class A>
PTK_INLINE A mask_bias(M value) {
  if constexpr (std::is_same_v<M, bool>) {
    return value ? A(0) : -static_cast<A>(__builtin_inf());
  } else {
    return static_cast<A>(load_scalar(&value));
  }
}

// scores[j] = scores[j] * scale + bias, along one row of the mask.
template <class M, class A>
static inline void apply_mask_row(A* scores, int64_t n, A scale, const M* mask, int64_t stride) {
  if (stride == 1) {
    if constexpr (std::is_same_v<M, bool>) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
      for (int64_t j = 0; j < n; ++j) scores[j] = bytes[j] ? scores[j] * scale : -static_cast<A>(__builtin_inf());
    } else if constexpr (std::is_same_v<Acc<M>, A>) {
      for (int64_t j = 0; j < n; j += kLanes<A>) {
        const int64_t valid = n - j;
        Vec<A> s = load_partial(scores + j, valid);
        store_partial(scores + j, s * scale + load_as_partial(mask + j, valid), valid);
      }
    } else {
      for (int64_t j = 0; j < n; ++j) scores[j] = scores[j] * scale + mask_bias<M, A>(mask[j]);
    }
  } else {
    for (int64_t j = 0; j < n; ++j) scores[j] = scores[j] * scale + mask_bias<M, A>(mask[j * stride]);
  }
}

}  // namespace detail

// Calls body(pointer to the mask's element (batch, head, 0, 0)) with the mask's
// type, T being the operands'.
template <class T, class Body>
PTK_INLINE void with_mask(const Problem& p, int64_t batch, int64_t head, const Body& body) {
  const int64_t offset = batch * p.mask.strides[0] + head * p.mask.strides[1];
  if (p.mask_kind == MaskKind::boolean) {
    body(static_cast<const bool*>(p.mask.data) + offset);
  } else if (p.mask_kind == MaskKind::same_dtype) {
    body(static_cast<const T*>(p.mask.data) + offset);
  } else if (p.mask_kind == MaskKind::f32) {
    body(static_cast<const float*>(p.mask.data) + offset);
  }
}

}  // namespace ptk::PTK_ISA
