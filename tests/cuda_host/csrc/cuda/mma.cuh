// Twin of csrc/cuda/mma.cuh: the fragments' layouts as the PTX ISA draws them.
#pragma once

#include "tests/cuda_host/cuda_host.h"

#include <bit>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace ptk::cuda {

template <typename Scalar>
inline constexpr bool kIsBfloat16 = std::is_same_v<Scalar, torch::headeronly::BFloat16>;

namespace twin {

struct MatrixLoad {
  const void* row;
  uint32_t (*matrices)[4];
};

template <bool Transposed>
void load_matrices(void* const* arguments) {
  const auto lane = [&](int i) { return static_cast<MatrixLoad*>(arguments[i]); };
  for (int m = 0; m < 4; ++m) {
    uint16_t entries[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* address = lane(m * 8 + row)->row;
      if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        throw std::runtime_error("cuda_host: ldmatrix: a row is not aligned to 16 bytes");
      }
      std::memcpy(entries[row], address, 16);
    }
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, t = i % 4;
      const uint32_t low = Transposed ? entries[2 * t][g] : entries[g][2 * t];
      const uint32_t high = Transposed ? entries[2 * t + 1][g] : entries[g][2 * t + 1];
      (*lane(i)->matrices)[m] = low | high << 16;
    }
  }
}

template <typename Scalar>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
  return static_cast<float>(std::bit_cast<Scalar>(bits));
}

struct Multiply {
  float (*d)[4];
  const uint32_t (*a)[4];
  uint32_t b[2];
};

template <typename Scalar>
void multiply(void* const* arguments) {
  float a[16][16], b[16][8];
  for (int i = 0; i < 32; ++i) {
    const Multiply& lane = *static_cast<Multiply*>(arguments[i]);
    const int g = i / 4, t = i % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        a[g + r % 2 * 8][2 * t + half + r / 2 * 8] = half_of<Scalar>((*lane.a)[r], half);
      }
      for (int r = 0; r < 2; ++r) {
        b[2 * t + half + r * 8][g] = half_of<Scalar>(lane.b[r], half);
      }
    }
  }
  float d[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < 8; ++col) {
        d[row][col] += a[row][k] * b[k][col];
      }
    }
  }
  for (int i = 0; i < 32; ++i) {
    float (&sums)[4] = *static_cast<Multiply*>(arguments[i])->d;
    for (int r = 0; r < 4; ++r) {
      sums[r] += d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
    }
  }
}

}  // namespace twin

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - cuda_host::shared_base);
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  twin::MatrixLoad mine{row, &matrices};
  cuda_host::active->with_warp(&twin::load_matrices<false>, &mine);
}

inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  twin::MatrixLoad mine{row, &matrices};
  cuda_host::active->with_warp(&twin::load_matrices<true>, &mine);
}

template <typename Scalar>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  twin::Multiply mine{&d, &a, {b0, b1}};
  cuda_host::active->with_warp(&twin::multiply<Scalar>, &mine);
}

template <typename Scalar>
uint32_t pack_pair(float low, float high) {
  return std::bit_cast<uint16_t>(static_cast<Scalar>(low)) |
         static_cast<uint32_t>(std::bit_cast<uint16_t>(static_cast<Scalar>(high))) << 16;
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

inline float divide_approximate(float a, float b) {
  return a / b;
}

template <typename Number>
Number divide_in_range(Number a, Number b) {
  return a / b;
}

template <typename Value>
void hide_origin(const Value*&) {}
inline void hide_origin(int&) {}

}  // namespace ptk::cuda
