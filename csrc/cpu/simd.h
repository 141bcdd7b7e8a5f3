// Vectors of the ISA level that the including file is compiled for.
//
// GCC/Clang vector extensions carry the arithmetic, so one source serves SSE2, AVX2, AVX-512 and NEON; intrinsics
// appear only where the extensions have no word for an instruction. A vector is as wide as the level's registers: 16
// bytes (baseline), 32 (avx2), 64 (avx512 and above). With PTK_EMULATE the wide levels are compiled for AVX2: same
// widths, same order of operations, no instruction that the machine lacks.
//
// Everything here is `static inline` inside the level's namespace: a function shared between levels could be merged by
// the linker into the copy compiled for the newest one.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(PTK_EMULATE)
#define PTK_EMULATE 0
#endif
#define PTK_X86_AVX2 (defined(__AVX2__))
#define PTK_X86_AVX512 (PTK_ISA_LEVEL >= 2 && !PTK_EMULATE)

// Hides a vector's value from the optimiser without moving it.
#if PTK_EMULATE
#define PTK_OPAQUE(v) asm volatile("" : "+m"(v))
#elif defined(__aarch64__)
#define PTK_OPAQUE(v) asm volatile("" : "+w"(v))
#else
#define PTK_OPAQUE(v) asm volatile("" : "+v"(v))
#endif

#define PTK_INLINE static inline __attribute__((always_inline))

namespace ptk {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace ptk

namespace ptk::PTK_ISA {

inline constexpr int kVectorBytes = PTK_ISA_LEVEL >= 2 ? 64 : PTK_ISA_LEVEL == 1 ? 32 : 16;

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
  typedef T unaligned __attribute__((vector_size(Bytes), aligned(1), may_alias));
};
template <class T>
using Vec = typename VectorOf<T, kVectorBytes>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// ---- loads and stores
// -------------------------------------------------------------------------------------------

template <class T>
PTK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, kVectorBytes>::unaligned*>(p);
}

template <class T>
PTK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T, kVectorBytes>::unaligned*>(p) = v;
}

// x - 0 keeps the sign of a zero, which 0 + x would not.
template <class T>
PTK_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
PTK_INLINE Vec<T> iota() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

// The first n lanes of memory, zeros behind them; nothing past p[n - 1] is touched.
template <class T>
PTK_INLINE Vec<T> load_partial(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
#if PTK_X86_AVX512
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p);
  } else if constexpr (sizeof(T) == 8) {
    return (Vec<T>)_mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << n) - 1), p);
  } else
#endif
  {
    Vec<T> v{};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
}

template <class T>
PTK_INLINE void store_partial(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return store(p, v);
#if PTK_X86_AVX512
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << n) - 1), (__m512i)v);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_epi64(p, static_cast<__mmask8>((1u << n) - 1), (__m512i)v);
  } else
#endif
  {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
  }
}

// ---- lane arithmetic
// ----------------------------------------------------------------------------------------------

// Returns b where the comparison is false, so a NaN in b survives. (GCC finds the instruction behind the conditional at
// 16 and 32 bytes, not at 64.)
template <class V>
PTK_INLINE V max(V a, V b) {
#if PTK_X86_AVX512
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#endif
  return a > b ? a : b;
}

// a * b + c, rounded once wherever the level has the instruction: for results that two kernels must agree on, where the
// compiler would be free to fuse one and not the other.
template <class T>
PTK_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if PTK_X86_AVX512
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif PTK_ISA_LEVEL == 1
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif PTK_ISA_LEVEL >= 2
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i)
    v[i] = sizeof(T) == 4 ? __builtin_fmaf(a[i], b[i], c[i]) : __builtin_fma(a[i], b[i], c[i]);
  return v;
#endif
  return a * b + c;
}

// 64-bit products of the lower halves.
PTK_INLINE Vec<uint64_t> multiply_even(Vec<uint64_t> a, Vec<uint64_t> b) {
#if PTK_X86_AVX512
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif PTK_ISA_LEVEL == 1
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

template <class To, class V>
PTK_INLINE To bit_cast(V v) {
  static_assert(sizeof(To) == sizeof(V));
  To out;
  std::memcpy(&out, &v, sizeof(To));
  return out;
}

template <class T>
PTK_INLINE T reduce_add(Vec<T> v) {
  T lane[kLanes<T>];
  std::memcpy(lane, &v, sizeof v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

template <class T>
PTK_INLINE T reduce_max(Vec<T> v) {
  T lane[kLanes<T>];
  std::memcpy(lane, &v, sizeof v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// ---- 16-bit floats <-> float
// --------------------------------------------------------------------------------------

using HalfBits = VectorOf<uint16_t, kVectorBytes / 2>::type;
using HalfBitsUnaligned = VectorOf<uint16_t, kVectorBytes / 2>::unaligned;

PTK_INLINE float to_float(bf16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

PTK_INLINE bf16 to_bf16(float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

// binary16 by integer arithmetic: multiplying by 2^112 lifts subnormals into place, infinities are patched.
PTK_INLINE float to_float(f16 x) {
  uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float f = bit_cast<float>(magnitude) * 0x1p112f;
  uint32_t u = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bit_cast<uint32_t>(f);
  return bit_cast<float>(u | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

PTK_INLINE f16 to_f16(float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (u >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (u < 0x38800000) {
    // Adding 0.5 leaves the subnormal's bits, rounded to nearest even by the FPU, in the low mantissa.
    float shifted = bit_cast<float>(u) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  u += 0xfff + (u >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((u - 0x38000000u) >> 13))};
}

PTK_INLINE Vec<float> widen_bf16(HalfBits bits) {
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}

PTK_INLINE Vec<float> widen_f16(HalfBits bits) {
#if PTK_X86_AVX512
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif PTK_ISA_LEVEL == 1
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(f16{bits[i]});
  return v;
#endif
}

PTK_INLINE HalfBits narrow_bf16(Vec<float> v) {
#if PTK_ISA_LEVEL >= 4 && !PTK_EMULATE
  return (HalfBits)_mm512_cvtneps_pbh((__m512)v);
#else
  Vec<uint32_t> u = bit_cast<Vec<uint32_t>>(v);
  Vec<uint32_t> rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  rounded = v != v ? (u >> 16) | 0x40 : rounded;
  return __builtin_convertvector(rounded, HalfBits);
#endif
}

PTK_INLINE HalfBits narrow_f16(Vec<float> v) {
#if PTK_X86_AVX512
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif PTK_ISA_LEVEL == 1
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  HalfBits bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = to_f16(v[i]).bits;
  return bits;
#endif
}

// ---- any storage type as a vector of its arithmetic type
// ----------------------------------------------------------

// What sums are kept in: double for double, float for everything narrower.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
PTK_INLINE Vec<Acc<T>> load_as(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    return widen_bf16(*reinterpret_cast<const HalfBitsUnaligned*>(p));
  } else if constexpr (std::is_same_v<T, f16>) {
    return widen_f16(*reinterpret_cast<const HalfBitsUnaligned*>(p));
  } else {
    return load(p);
  }
}

template <class T>
PTK_INLINE Vec<Acc<T>> load_as_partial(const T* p, int64_t n) {
  if (n >= kLanes<Acc<T>>) return load_as(p);
  if constexpr (sizeof(T) == 2) {
    T buffer[kLanes<float>] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load_as(buffer);
  } else {
    return load_partial(p, n);
  }
}

template <class T>
PTK_INLINE void store_as(T* p, Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    *reinterpret_cast<HalfBitsUnaligned*>(p) = narrow_bf16(v);
  } else if constexpr (std::is_same_v<T, f16>) {
    *reinterpret_cast<HalfBitsUnaligned*>(p) = narrow_f16(v);
  } else {
    store(p, v);
  }
}

// Two vectors, one after the other: rounding two to bf16 costs no more than one.
template <class T>
PTK_INLINE void store_pair_as(T* p, Vec<Acc<T>> v0, Vec<Acc<T>> v1) {
#if PTK_ISA_LEVEL >= 4 && !PTK_EMULATE
  if constexpr (std::is_same_v<T, bf16>) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)v1, (__m512)v0));
    return;
  }
#endif
  store_as(p, v0);
  store_as(p + kLanes<Acc<T>>, v1);
}

template <class T>
PTK_INLINE void store_as_partial(T* p, Vec<Acc<T>> v, int64_t n) {
  if (n >= kLanes<Acc<T>>) return store_as(p, v);
  if constexpr (sizeof(T) == 2) {
    T buffer[kLanes<float>];
    store_as(buffer, v);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  } else {
    store_partial(p, v, n);
  }
}

template <class T>
PTK_INLINE Acc<T> load_scalar(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return to_float(*p);
  } else {
    return *p;
  }
}

template <class T>
PTK_INLINE T round_to(Acc<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return to_bf16(x);
  } else if constexpr (std::is_same_v<T, f16>) {
    return to_f16(x);
  } else {
    return x;
  }
}

// ---- square transpose in registers
// ----------------------------------------------------------------------------------

namespace detail {

// Stage `Step` of the butterfly swaps, between rows i and i + Step, the lanes whose index has that bit.
template <int Step, int N>
constexpr int swap_low(int lane) {
  return lane & Step ? lane - Step + N : lane;
}
template <int Step, int N>
constexpr int swap_high(int lane) {
  return lane & Step ? lane + N : lane + Step;
}

template <class T, int Step, int... I>
PTK_INLINE void swap_halves(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<T>;
  Vec<T> low = __builtin_shufflevector(a, b, swap_low<Step, n>(I)...);
  b = __builtin_shufflevector(a, b, swap_high<Step, n>(I)...);
  a = low;
}

template <class T, int Step>
PTK_INLINE void transpose_stage(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (Step > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & Step)) swap_halves<T, Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kLanes<T>>{});
    transpose_stage<T, Step / 2>(rows);
  }
}

}  // namespace detail

template <class T>
PTK_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  detail::transpose_stage<T, kLanes<T> / 2>(rows);
}

}  // namespace ptk::PTK_ISA
