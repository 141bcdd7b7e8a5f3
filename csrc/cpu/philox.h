// Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): 128
// random bits as a function of a 128-bit counter and a 64-bit key, nothing carried from one to the next. A counter per
// lane.
#pragma once

#include "simd.h"

namespace ptk::PTK_ISA {

namespace detail {

PTK_INLINE Vec<uint32_t> multiply_high(Vec<uint32_t> a, uint32_t m) {
  const Vec<uint64_t> pairs = bit_cast<Vec<uint64_t>>(a), factor = broadcast(uint64_t{m});
  const Vec<uint64_t> even = multiply_even(pairs, factor), odd = multiply_even(pairs >> 32, factor);
  return bit_cast<Vec<uint32_t>>(even >> 32 | (odd & 0xffffffff00000000u));
}

}  // namespace detail

// bits[0..3] of counter {c0, c1, c2, c3} under `key`.
PTK_INLINE void philox(Vec<uint32_t> c0, Vec<uint32_t> c1, Vec<uint32_t> c2, Vec<uint32_t> c3, uint64_t key,
                       Vec<uint32_t> (&bits)[4]) {
  constexpr uint32_t m0 = 0xd2511f53, m1 = 0xcd9e8d57;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Vec<uint32_t> high0 = detail::multiply_high(c0, m0), high1 = detail::multiply_high(c2, m1);
    const Vec<uint32_t> low0 = c0 * m0, low1 = c2 * m1;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9e3779b9;
    k1 += 0xbb67ae85;
  }
  bits[0] = c0;
  bits[1] = c1;
  bits[2] = c2;
  bits[3] = c3;
}

}  // namespace ptk::PTK_ISA
