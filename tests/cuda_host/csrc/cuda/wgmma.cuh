// Twin of csrc/cuda/wgmma.cuh: operands are found through their descriptors, by the canonical layouts of the PTX ISA
// for a swizzle over 128 bytes. A product is done when it is waited for, or at once.
#pragma once

#include "csrc/cuda/descriptor.cuh"
#include "tests/cuda_host/csrc/cuda/barrier.cuh"

#include <array>

namespace ptk::cuda {

namespace twin {

struct Operand {
  uint32_t start, panel_stride, group_stride;

  explicit Operand(uint64_t descriptor)
      : start(field(descriptor)), panel_stride(field(descriptor >> 16)), group_stride(field(descriptor >> 32)) {
    if (descriptor >> 62 != 1) {
      throw std::runtime_error("cuda_host: wgmma: only the swizzle over 128 bytes is modelled");
    }
  }

  // The number at a byte offset from the start; the swizzle is one of addresses.
  template <typename Scalar>
  float at(uint32_t offset) const {
    const uint32_t address = start + offset;
    const uint32_t place = address ^ (address >> 3 & 0x70);
    Scalar value;
    std::memcpy(&value, cuda_host::shared_base + place, sizeof value);
    return static_cast<float>(value);
  }

  // Rows of 16 contiguous numbers that are summed over.
  template <typename Scalar>
  float row_entry(int row, int k) const {
    return at<Scalar>(row % 8 * 128 + row / 8 * group_stride + k * 2);
  }

  // Rows are what is summed over, columns lie in panels of 64.
  template <typename Scalar>
  float column_entry(int k, int col) const {
    return at<Scalar>(k % 8 * 128 + k / 8 * group_stride + col / 64 * panel_stride + col % 64 * 2);
  }

private:
  static uint32_t field(uint64_t bits) { return static_cast<uint32_t>(bits & 0x3fff) << 4; }
};

struct Product {
  float (*d)[4];  // of the columns that it has
  const uint32_t (*weights)[4];
  uint64_t a, b;
  int accumulate;
};

template <typename Scalar, int N>
void multiply(const std::array<Product, 128>& lanes) {
  static float a[64][16], b[16][N];
  const Operand right(lanes[0].b);
  for (int lane = 0; lane < 128; ++lane) {
    const Product& product = lanes[lane];
    if (product.b != lanes[0].b || product.a != lanes[0].a || product.accumulate != lanes[0].accumulate) {
      throw std::runtime_error("cuda_host: wgmma: threads disagree on an operand");
    }
    if (product.weights != nullptr) {
      const int row = lane / 32 * 16 + lane % 32 / 4, col = lane % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        for (int half = 0; half < 2; ++half) {
          a[row + r % 2 * 8][col + half + r / 2 * 8] = half_of<Scalar>((*product.weights)[r], half);
        }
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    if (lanes[0].weights == nullptr) {
      for (int row = 0; row < 64; ++row) {
        a[row][k] = Operand(lanes[0].a).row_entry<Scalar>(row, k);
      }
    }
    for (int col = 0; col < N; ++col) {
      b[k][col] = lanes[0].weights == nullptr ? right.row_entry<Scalar>(col, k) : right.column_entry<Scalar>(k, col);
    }
  }
  for (int lane = 0; lane < 128; ++lane) {
    for (int tile = 0; tile < N / 8; ++tile) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + r / 2 * 8, col = tile * 8 + lane % 4 * 2 + r % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
          sum += a[row][k] * b[k][col];
        }
        float& d = lanes[lane].d[tile][r];
        d = lanes[0].accumulate ? d + sum : sum;
      }
    }
  }
}

template <typename Scalar, int N>
void issue(void* const* arguments) {
  std::array<Product, 128> lanes;
  for (int lane = 0; lane < 128; ++lane) {
    lanes[lane] = *static_cast<Product*>(arguments[lane]);
  }
  if (cuda_host::active->multiplies_at_once()) {
    multiply<Scalar, N>(lanes);
  } else {
    cuda_host::active->products().back().push_back([lanes] { multiply<Scalar, N>(lanes); });
  }
}

template <int Groups>
void wait(void* const*) {
  auto& groups = cuda_host::active->products();
  while (groups.size() > Groups + 1) {
    for (const auto& product : groups.front()) {
      product();
    }
    groups.pop_front();
  }
}

}  // namespace twin

inline void fence_products() {}

inline void commit_products() {
  cuda_host::active->with_warpgroup([](void* const*) { cuda_host::active->products().emplace_back(); }, nullptr);
}

template <int Groups>
void wait_products() {
  cuda_host::Block& block = *cuda_host::active;
  if (block.copies_at_once() && !block.multiplies_at_once()) {
    // Time for the others, so that what was called empty too early is overwritten.
    for (int i = 0; i < 4; ++i) {
      block.note_event();
      block.poll();
    }
  }
  cuda_host::active->with_warpgroup(&twin::wait<Groups>, nullptr);
}

template <typename Number, int Tiles>
void pin(Number (&)[Tiles][4]) {}

template <typename Scalar, int N, int First, int Tiles>
void multiply_rows_async(float (&d)[Tiles][4], uint64_t a, uint64_t b, int accumulate) {
  static_assert(First + N / 8 <= Tiles);
  twin::Product mine{d + First, nullptr, a, b, accumulate};
  cuda_host::active->with_warpgroup(&twin::issue<Scalar, N>, &mine);
}

template <typename Scalar, int N, int First, int Tiles>
void multiply_weights_async(float (&d)[Tiles][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(First + N / 8 <= Tiles);
  twin::Product mine{d + First, &a, 0, b, accumulate};
  cuda_host::active->with_warpgroup(&twin::issue<Scalar, N>, &mine);
}

}  // namespace ptk::cuda
