// From products of queries and keys to scores, a row at a time: cap, ALiBi, relative bias, mask; and dropout of
// probabilities.
#pragma once

#include "attention_cpu_common.h"
#include "csrc/cpu/philox.h"

namespace ptk::PTK_ISA {

// ---- cap

namespace detail {

// 2^r - 1 for |r| <= 1/2 without the cancellation at 0: exp2's polynomials short of their constant term.
PTK_INLINE Vec<float> exp2_less_one(Vec<float> r) {
  Vec<float> p = r * 1.5353362e-4f + 1.33988739e-3f;
  p = p * r + 9.61843692e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  return p * r;
}

PTK_INLINE Vec<double> exp2_less_one(Vec<double> r) {
  const Vec<double> t = r * kLn2;
  Vec<double> p = t * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * t + 1.0 / 39916800;
  p = p * t + 1.0 / 3628800;
  p = p * t + 1.0 / 362880;
  p = p * t + 1.0 / 40320;
  p = p * t + 1.0 / 5040;
  p = p * t + 1.0 / 720;
  p = p * t + 1.0 / 120;
  p = p * t + 1.0 / 24;
  p = p * t + 1.0 / 6;
  p = p * t + 0.5;
  p = p * t + 1.0;
  return p * t;
}

// tanh, odd to the last bit: u / (u + 2) with u = e^(2|x|) - 1 = 2^n (2^r - 1) + (2^n - 1), where nothing cancels for
// n >= 0. Beyond kFlat it is 1 in A's precision.
template <class A>
PTK_INLINE Vec<A> tanh_of(Vec<A> x) {
  using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr A kFlat = sizeof(A) == 8 ? 20 : 10;
  constexpr int kMantissa = sizeof(A) == 8 ? 52 : 23, kBias = sizeof(A) == 8 ? 1023 : 127;
  constexpr A kMagic = (sizeof(A) == 8 ? A(0x1.8p52) : A(0x1.8p23f)) + kBias;
  Vec<A> size = x < A(0) ? -x : x;
  size = size > kFlat ? broadcast(kFlat) : size;
  const Vec<A> y = size * static_cast<A>(2 * kLog2E);
  const Vec<A> shifted = y + kMagic;
  const Vec<A> power = bit_cast<Vec<A>>(bit_cast<Vec<Int>>(shifted) << kMantissa);
  const Vec<A> u = exp2_less_one(y - (shifted - kMagic)) * power + (power - A(1));
  const Vec<A> t = u / (u + A(2));
  return x < A(0) ? -t : t;
}

template <class A>
static inline void cap_row(A* scores, int64_t n, A scale, A cap) {
  const A unit = scale / cap;
  for (int64_t j = 0; j < n; j += kLanes<A>) store(scores + j, tanh_of<A>(load(scores + j) * unit) * cap);
}

// ---- ALiBi

template <class A>
PTK_INLINE Vec<A> absolute(Vec<A> x) {
  return max(x, -x);
}

// scores[j] = scores[j] * scale - slope * |j - origin|
template <class A>
static inline void slope_row(A* scores, int64_t n, A scale, A slope, int64_t origin) {
  Vec<A> distance = iota<A>() - static_cast<A>(origin);
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    // Rounded by itself: which of the two products is contracted would be the compiler's choice.
    Vec<A> fall = absolute<A>(distance) * slope;
    PTK_OPAQUE(fall);
    store(scores + j, load(scores + j) * scale - fall);
    distance += static_cast<A>(kLanes<A>);
  }
}

// ---- mask

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

// bias[j] = what one row of the mask adds.
template <class M, class A>
static inline void bias_row(const M* mask, int64_t stride, int64_t n, A* bias) {
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) bias[j] = mask_bias<M, A>(mask[j * stride]);
  } else if constexpr (std::is_same_v<M, bool>) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
    for (int64_t j = 0; j < n; ++j) bias[j] = bytes[j] ? A(0) : -static_cast<A>(__builtin_inf());
  } else if constexpr (std::is_same_v<Acc<M>, A>) {
    for (int64_t j = 0; j < n; j += kLanes<A>) store_partial(bias + j, load_as_partial(mask + j, n - j), n - j);
  } else {
    for (int64_t j = 0; j < n; ++j) bias[j] = mask_bias<M, A>(mask[j]);
  }
}

}  // namespace detail

// Calls body(pointer to the mask's element (batch, head, 0, 0)) with the mask's type, T being the operands'.
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

// ---- mask of blocks

// Whether a mask of blocks, or the lack of one, lets any of the rows q0.. see any of the keys k0..
PTK_INLINE bool sees_keys(const Problem& p, int64_t batch, int64_t head, int64_t q0, int64_t rows, int64_t k0,
                          int64_t keys) {
  if (p.mask_block == 1) return true;
  const int64_t* strides = p.mask.strides;
  const auto* mask = static_cast<const uint8_t*>(p.mask.data) + batch * strides[0] + head * strides[1];
  for (int64_t i = q0 / p.mask_block; i <= (q0 + rows - 1) / p.mask_block; ++i)
    for (int64_t j = k0 / p.mask_block; j <= (k0 + keys - 1) / p.mask_block; ++j)
      if (mask[i * strides[2] + j * strides[3]]) return true;
  return false;
}

// Scores of the keys k0.. that a mask of blocks hides from a row become -inf.
template <class A>
static void hide_blocks(const Problem& p, int64_t batch, int64_t head, int64_t row, int64_t k0, int64_t keys,
                        A* scores) {
  const int64_t* strides = p.mask.strides;
  const auto* mask = static_cast<const uint8_t*>(p.mask.data) + batch * strides[0] + head * strides[1] +
                     row / p.mask_block * strides[2];
  for (int64_t j = 0; j < keys;) {
    const int64_t block = (k0 + j) / p.mask_block, end = least(keys, (block + 1) * p.mask_block - k0);
    if (mask[block * strides[3]]) {
      j = end;
    } else {
      for (; j < end; ++j) scores[j] = -static_cast<A>(__builtin_inf());
    }
  }
}

// Whether scores are more than products times scale.
PTK_INLINE bool has_shaped_scores(const Problem& p) {
  return p.mask_kind != MaskKind::none || p.softcap != 0 || p.alibi.data || p.relative_bias.data;
}

// Products of rows q0.. with keys k0.., in rows of `ld` padded to whole vectors, become scores. Only called where
// has_shaped_scores().
template <class T, class A>
static void shape_rows(const Problem& p, const Sequence& seq, int64_t head, A* scores, int64_t ld, int64_t q0,
                       int64_t rows, int64_t k0, int64_t keys, A scale) {
  if (p.softcap != 0) {
    for (int64_t i = 0; i < rows; ++i) detail::cap_row(scores + i * ld, keys, scale, static_cast<A>(p.softcap));
    scale = 1;
  }
  if (p.alibi.data) {
    const A slope = head_value<A>(p.alibi, seq.batch, head);
    for (int64_t i = 0; i < rows; ++i)
      detail::slope_row(scores + i * ld, keys, scale, slope, q0 + i + seq.diagonal - k0);
    scale = 1;
  }
  if (p.relative_bias.data) {
    const A* bias = relative_bias_of<A>(p, seq.batch, head) + k0 - q0;
    for (int64_t i = 0; i < rows; ++i) detail::apply_mask_row(scores + i * ld, keys, scale, bias - i, 1);
    scale = 1;
  }
  if (p.mask_block > 1) {
    for (int64_t i = 0; i < rows; ++i) {
      A* row = scores + i * ld;
      if (scale != 1)
        for (int64_t j = 0; j < keys; j += kLanes<A>) store(row + j, load(row + j) * scale);
      hide_blocks(p, seq.batch, head, q0 + i, k0, keys, row);
    }
    return;
  }
  with_mask<T>(p, seq.batch, head, [&](auto* mask) {
    for (int64_t i = 0; i < rows; ++i)
      detail::apply_mask_row(scores + i * ld, keys, scale, mask + (q0 + i) * p.mask.strides[2] + k0 * p.mask.strides[3],
                             p.mask.strides[3]);
  });
}

// ---- dropout

// The share of probabilities that dropout keeps: exactly, since it is a multiple of 2^-16. Where that is 0, so is
// whatever would be divided by it.
template <class A>
PTK_INLINE A kept_share(const Problem& p) {
  return p.keep_below == 0 ? 1 : static_cast<A>(p.keep_below) / static_cast<A>(Problem::kKeepAll);
}

// Which probabilities of one head are kept: a function of seed, batch, head, row and key alone. A counter serves one
// key and eight rows, 16 bits each.
struct Dropout {
  static constexpr int kRows = 8;
  uint64_t seed;
  uint32_t batch, head;
  int32_t keep_below;

  PTK_INLINE Dropout of(const Problem& p, int64_t batch, int64_t head) {
    return {static_cast<uint64_t>(p.seeds[batch / p.batch_per_seed]), static_cast<uint32_t>(batch % p.batch_per_seed),
            static_cast<uint32_t>(head), static_cast<int32_t>(p.keep_below)};
  }

  // Of keys k0, k0 + 1, ... in the lanes and rows 8 * group + m: all ones where kept.
  inline __attribute__((always_inline)) void draw(int64_t group, int64_t k0, Vec<int32_t> (&keep)[kRows]) const {
    Vec<uint32_t> bits[4];
    philox(iota<uint32_t>() + static_cast<uint32_t>(k0), broadcast(static_cast<uint32_t>(group)), broadcast(head),
           broadcast(batch), seed, bits);
    for (int m = 0; m < kRows; ++m) {
      const Vec<uint32_t> half = m % 2 ? bits[m / 2] >> 16 : bits[m / 2] & 0xffffu;
      keep[m] = bit_cast<Vec<int32_t>>(half) < keep_below;
    }
  }
};

namespace detail {

// to[i] = keep[i] ? from[i] * factor : 0 for a vector's worth of 32-bit lanes.
template <class E>
PTK_INLINE void keep_lanes(const E* from, Vec<int32_t> keep, Acc<E> factor, E* to) {
  if constexpr (sizeof(E) == 8) {
    int32_t lane[kLanes<int32_t>];
    std::memcpy(lane, &keep, sizeof lane);
    for (int i = 0; i < kLanes<int32_t>; ++i) to[i] = lane[i] ? from[i] * factor : 0;
  } else {
    const Vec<float> kept = load_as(from) * factor;
    store_as(to, bit_cast<Vec<float>>(bit_cast<Vec<int32_t>>(kept) & keep));
  }
}

}  // namespace detail

// Clears what is dropped among rows q0.. and keys k0.. of probabilities, in rows of `ld` padded to whole vectors.
template <class E>
static void drop_rows(const Dropout& dropout, E* prob, int64_t ld, int64_t q0, int64_t rows, int64_t k0, int64_t keys) {
  for (int64_t group = q0 / Dropout::kRows; group * Dropout::kRows < q0 + rows; ++group) {
    const int64_t row = group * Dropout::kRows - q0;
    for (int64_t j = 0; j < keys; j += kLanes<int32_t>) {
      Vec<int32_t> keep[Dropout::kRows];
      dropout.draw(group, k0 + j, keep);
#pragma GCC unroll 8
      for (int m = 0; m < Dropout::kRows; ++m) {
        E* p = prob + (row + m) * ld + j;
        if (row + m >= 0 && row + m < rows) detail::keep_lanes<E>(p, keep[m], 1, p);
      }
    }
  }
}

}  // namespace ptk::PTK_ISA
