// Codes to numbers: one row of the weight at a time, in the order of k.
#pragma once

#include "csrc/cpu/carver.h"
#include "csrc/ops/quantized_matmul/quantized_matmul.h"

namespace ptk::PTK_ISA {

// The values that 4-bit codes stand for. nf4: Dettmers et al., QLoRA (2023), appendix E. fp4: OCP microscaling, e2m1.
alignas(64) static constexpr float kCodebooks[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f},
};

PTK_INLINE const float* codebook_of(CodeFormat format) {
  return kCodebooks[format == CodeFormat::fp4];
}

// ---- kLanes<float> consecutive values of a row from k on, a multiple of their number
// ----------------------------------------------------------

template <CodeFormat F>
struct Decoder;

// Lane i of the result holds the code of k + i in its low bits, other bits above.
template <int Bits>
PTK_INLINE Vec<uint32_t> spread(const uint8_t* row, int64_t k) {
  constexpr int lanes = kLanes<float>, bits = lanes * Bits, half = 16 / 2 * Bits;
  uint64_t word = 0;
  std::memcpy(&word, row + k * Bits / 8, (bits + 7) / 8);
  if constexpr (bits % 8 != 0) word >>= k * Bits % 8;
  if constexpr (bits <= 32) {
    return broadcast(static_cast<uint32_t>(word)) >> iota<uint32_t>() * Bits;
  } else {
    const Vec<uint32_t> low = broadcast(static_cast<uint32_t>(word)),
                        high = broadcast(static_cast<uint32_t>(word >> half));
    return (iota<uint32_t>() < lanes / 2u ? low : high) >> iota<uint32_t>() % (lanes / 2) * Bits;
  }
}

PTK_INLINE Vec<int32_t> widen_bytes(const int8_t* p) {
#if PTK_X86_AVX512
  return (Vec<int32_t>)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif PTK_ISA_LEVEL == 1
  return (Vec<int32_t>)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  using Bytes = typename VectorOf<int8_t, kLanes<float>>::unaligned;
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Vec<int32_t>);
#endif
}

template <>
struct Decoder<CodeFormat::s8> {
  static constexpr int kBits = code_bits(CodeFormat::s8);
  PTK_INLINE Vec<float> values(const uint8_t* row, int64_t k) {
    return __builtin_convertvector(widen_bytes(reinterpret_cast<const int8_t*>(row) + k), Vec<float>);
  }
  PTK_INLINE double value(const uint8_t* row, int64_t k) { return static_cast<int8_t>(row[k]); }
};

template <>
struct Decoder<CodeFormat::u4> {
  static constexpr int kBits = code_bits(CodeFormat::u4);
  PTK_INLINE Vec<float> values(const uint8_t* row, int64_t k) {
    return __builtin_convertvector(bit_cast<Vec<int32_t>>(spread<4>(row, k) & 15) - 8, Vec<float>);
  }
  PTK_INLINE int code(const uint8_t* row, int64_t k) { return row[k / 2] >> k % 2 * 4 & 15; }
  PTK_INLINE double value(const uint8_t* row, int64_t k) { return code(row, k) - 8; }
};

template <>
struct Decoder<CodeFormat::u2> {
  static constexpr int kBits = code_bits(CodeFormat::u2);
  PTK_INLINE Vec<float> values(const uint8_t* row, int64_t k) {
    return __builtin_convertvector(bit_cast<Vec<int32_t>>(spread<2>(row, k) & 3) - 2, Vec<float>);
  }
  PTK_INLINE double value(const uint8_t* row, int64_t k) { return (row[k / 4] >> k % 4 * 2 & 3) - 2; }
};

template <>
struct Decoder<CodeFormat::u3> {
  static constexpr int kBits = code_bits(CodeFormat::u3);
  PTK_INLINE Vec<float> values(const uint8_t* row, int64_t k) {
    return __builtin_convertvector(bit_cast<Vec<int32_t>>(spread<3>(row, k) & 7) - 4, Vec<float>);
  }
  PTK_INLINE double value(const uint8_t* row, int64_t k) {
    const int64_t bit = 3 * k;
    const int high = bit % 8 > 5 ? row[bit / 8 + 1] << 8 : 0;
    return ((row[bit / 8] | high) >> bit % 8 & 7) - 4;
  }
};

template <CodeFormat F>
struct CodebookDecoder {
  static constexpr int kBits = 4;
  PTK_INLINE Vec<float> values(const uint8_t* row, int64_t k) {
    constexpr int lanes = kLanes<float>;
    const float* book = codebook_of(F);
    const Vec<int32_t> code = bit_cast<Vec<int32_t>>(spread<4>(row, k) & 15);
    Vec<float> value{};
    if constexpr (lanes == 16) {
      value = __builtin_shuffle(load(book), code);
    } else if constexpr (lanes == 8) {
      value = code < 8 ? __builtin_shuffle(load(book), code) : __builtin_shuffle(load(book + 8), code);
    } else {
      for (int i = 0; i < lanes; ++i) value[i] = book[code[i]];
    }
    return value;
  }
  PTK_INLINE double value(const uint8_t* row, int64_t k) {
    return codebook_of(F)[Decoder<CodeFormat::u4>::code(row, k)];
  }
};
template <>
struct Decoder<CodeFormat::nf4> : CodebookDecoder<CodeFormat::nf4> {};
template <>
struct Decoder<CodeFormat::fp4> : CodebookDecoder<CodeFormat::fp4> {};

// Exponent and mantissa moved into float's place make a number that is too small by 2^120, subnormals included.
template <>
struct Decoder<CodeFormat::fp8> {
  static constexpr int kBits = code_bits(CodeFormat::fp8);
  PTK_INLINE Vec<float> values(const uint8_t* row, int64_t k) {
    const Vec<int32_t> code = widen_bytes(reinterpret_cast<const int8_t*>(row) + k);
    const Vec<int32_t> magnitude = code & 0x7f;
    const Vec<int32_t> bits = bit_cast<Vec<int32_t>>(bit_cast<Vec<float>>(magnitude << 20) * 0x1p120f);
    const Vec<int32_t> number = magnitude == 0x7f ? Vec<int32_t>{} + 0x7fc00000 : bits;
    return bit_cast<Vec<float>>(number | (code & static_cast<int32_t>(0x80000000)));
  }
  PTK_INLINE double value(const uint8_t* row, int64_t k) {
    const uint32_t code = row[k], magnitude = code & 0x7f;
    const float number = magnitude == 0x7f ? __builtin_nanf("") : bit_cast<float>(magnitude << 20) * 0x1p120f;
    return code & 0x80 ? -number : number;
  }
};

// ---- rows
// --------------------------------------------------------------------------------------------------

// Calls body(decoder) with the format as a type.
template <class Body>
PTK_INLINE void with_format(CodeFormat format, const Body& body) {
  switch (format) {
#define PTK_CASE(name)                                                                                                 \
  case CodeFormat::name:                                                                                               \
    return body(Decoder<CodeFormat::name>())
    PTK_CASE(s8);
    PTK_CASE(u4);
    PTK_CASE(u2);
    PTK_CASE(nf4);
    PTK_CASE(fp4);
    PTK_CASE(fp8);
    PTK_CASE(u3);
#undef PTK_CASE
  }
}

// dst[i] = weight[row, k0 + i] for i < count. k0 is a multiple of 16.
template <class E, class D>
static inline void decode_row(const QuantizedWeightView& w, D, int64_t row, int64_t k0, int64_t count, E* dst) {
  const uint8_t* codes = w.codes + row * w.row_bytes();
  const float* scales = w.scales + row * w.groups();
  const float* zeros = w.zeros ? w.zeros + row * w.groups() : nullptr;
  for (int64_t k = k0; k < k0 + count;) {
    const int64_t g = k / w.group, end = least(k0 + count, (g + 1) * w.group);
    const Acc<E> scale = scales[g], zero = zeros ? zeros[g] : 0.0f;
    if constexpr (!std::is_same_v<E, double>) {
      for (; k + kLanes<float> <= end; k += kLanes<float>) store_as(dst + k - k0, (D::values(codes, k) - zero) * scale);
    }
    for (; k < end; ++k) dst[k - k0] = round_to<E>((static_cast<Acc<E>>(D::value(codes, k)) - zero) * scale);
  }
}

// Signed bytes as A's elements, plus 128 where T is unsigned; zeros from count to padded.
template <class T>
static inline void copy_codes(const int8_t* codes, int64_t count, int64_t padded, Element<T>* dst) {
  int64_t i = 0;
#if PTK_ISA_LEVEL < 3
  for (; i + kLanes<int16_t> <= count; i += kLanes<int16_t>) store(dst + i, detail::load_widened(codes + i));
#else
  constexpr T flip = std::is_same_v<T, uint8_t> ? 128 : 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>)
    store(dst + i, load(reinterpret_cast<const T*>(codes) + i) ^ broadcast(flip));
#endif
  for (; i < count; ++i) dst[i] = static_cast<Element<T>>(codes[i] + (std::is_same_v<T, uint8_t> ? 128 : 0));
  for (; i < padded; ++i) dst[i] = 0;
}

// 4-bit codes as they are, each in an element of its own, zeros from count to padded. `codes` points at the first.
template <class E>
static inline void unpack_nibbles(const uint8_t* codes, int64_t count, int64_t padded, E* dst) {
  using Half = typename VectorOf<uint8_t, kVectorBytes / 2>::unaligned;
  int64_t i = 0;
  for (; i + kVectorBytes <= count; i += kVectorBytes) {
    // A byte 0xHL becomes the word 0x0H0L.
    const Vec<uint16_t> words = __builtin_convertvector(*reinterpret_cast<const Half*>(codes + i / 2), Vec<uint16_t>);
    const Vec<uint8_t> values = bit_cast<Vec<uint8_t>>((words | words << 4) & 0x0f0f);
    if constexpr (sizeof(E) == 1) {
      store(dst + i, values);
    } else {
      for (int j = 0; j < kVectorBytes; ++j) dst[i + j] = values[j];
    }
  }
  for (; i < count; ++i) dst[i] = static_cast<E>(Decoder<CodeFormat::u4>::code(codes, i));
  for (; i < padded; ++i) dst[i] = 0;
}

}  // namespace ptk::PTK_ISA
