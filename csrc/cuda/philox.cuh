// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), the generator of
// csrc/cpu/philox.h: 128 random bits as a function of a 128-bit counter and a 64-bit key.
#pragma once

#include <cstdint>

namespace ptk::cuda {

__device__ inline void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key, uint32_t (&bits)[4]) {
  constexpr uint32_t m0 = 0xd2511f53, m1 = 0xcd9e8d57;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, m0), high1 = __umulhi(c2, m1);
    const uint32_t low0 = c0 * m0, low1 = c2 * m1;
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

}  // namespace ptk::cuda
