// Between the layouts of tensors [batch, channels, space]: blocks of pixels are brought to rows of channels and back.
#pragma once

#include "csrc/core/parallel.h"
#include "csrc/cpu/carver.h"
#include "csrc/cpu/gemm/gemm.h"
#include "csrc/cpu/scratch.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu.h"

namespace ptk::PTK_ISA {

// The bits of 16-bit elements in lanes of twice their size, on their way through a transposition.
template <class Lane, class T>
PTK_INLINE Vec<Lane> load_lanes(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return bit_cast<Vec<Lane>>(__builtin_convertvector(*reinterpret_cast<const HalfBitsUnaligned*>(p), Vec<uint32_t>));
  } else {
    return load(p);
  }
}
template <class Lane, class T>
PTK_INLINE void store_lanes(T* p, Vec<Lane> v) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<HalfBitsUnaligned*>(p) = __builtin_convertvector(bit_cast<Vec<uint32_t>>(v), HalfBits);
  } else {
    store(p, v);
  }
}

// dst[c * ld_dst + r] = src[r * ld_src + c] in squares of kLanes<float>, in registers; what is left one by one.
template <class T>
static void transpose_block(const T* src, int64_t ld_src, T* dst, int64_t ld_dst, int64_t rows, int64_t columns) {
  using Lane = std::conditional_t<sizeof(T) == 8, double, float>;
  constexpr int lanes = kLanes<Lane>;
  const int64_t full_rows = rows / lanes * lanes, full_columns = columns / lanes * lanes;
  for (int64_t r = 0; r < full_rows; r += lanes) {
    for (int64_t c = 0; c < full_columns; c += lanes) {
      Vec<Lane> block[lanes];
      for (int i = 0; i < lanes; ++i) block[i] = load_lanes<Lane>(src + (r + i) * ld_src + c);
      transpose<Lane>(block);
      for (int i = 0; i < lanes; ++i) store_lanes<Lane>(dst + (c + i) * ld_dst + r, block[i]);
    }
    for (int64_t c = full_columns; c < columns; ++c)
      for (int i = 0; i < lanes; ++i) dst[c * ld_dst + r + i] = src[(r + i) * ld_src + c];
  }
  for (int64_t r = full_rows; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) dst[c * ld_dst + r] = src[r * ld_src + c];
}

// Calls body(image, first pixel in the image, first pixel of the run, pixels) for the images that pixels [begin, end)
// of the batch lie in.
template <class Body>
PTK_INLINE void for_runs_of_images(int64_t space, int64_t begin, int64_t end, const Body& body) {
  for (int64_t p = begin; p < end;) {
    const int64_t image = p / space, first = p % space, run = least(end - p, space - first);
    body(image, first, p - begin, run);
    p += run;
  }
}

// rows[pixel * ld + channel] of pixels [begin, end) and channels [c0, c0 + channels), from or to a channels-first
// tensor.
template <class T>
static void rows_from_planes(const T* planes, int64_t all_channels, int64_t space, int64_t begin, int64_t end,
                             int64_t c0, int64_t channels, T* rows, int64_t ld) {
  for_runs_of_images(space, begin, end, [&](int64_t image, int64_t first, int64_t offset, int64_t run) {
    transpose_block(planes + (image * all_channels + c0) * space + first, space, rows + offset * ld, ld, channels, run);
  });
}
template <class T>
static void planes_from_rows(const T* rows, int64_t ld, T* planes, int64_t all_channels, int64_t space, int64_t begin,
                             int64_t end, int64_t c0, int64_t channels) {
  for_runs_of_images(space, begin, end, [&](int64_t image, int64_t first, int64_t offset, int64_t run) {
    transpose_block(rows + offset * ld, ld, planes + (image * all_channels + c0) * space + first, space, run, channels);
  });
}

inline constexpr int64_t kLayoutPixels = 64;

// A whole tensor.
template <class T>
static void to_channels_last(const T* planes, T* rows, int64_t batch, int64_t channels, int64_t space) {
  const int64_t pixels = batch * space;
  parallel_items((pixels + kLayoutPixels - 1) / kLayoutPixels, [&](int64_t i) {
    const int64_t begin = i * kLayoutPixels, end = least(pixels, begin + kLayoutPixels);
    rows_from_planes(planes, channels, space, begin, end, 0, channels, rows + begin * channels, channels);
  });
}
template <class T>
static void to_channels_first(const T* rows, T* planes, int64_t batch, int64_t channels, int64_t space) {
  const int64_t pixels = batch * space;
  parallel_items((pixels + kLayoutPixels - 1) / kLayoutPixels, [&](int64_t i) {
    const int64_t begin = i * kLayoutPixels, end = least(pixels, begin + kLayoutPixels);
    planes_from_rows(rows + begin * channels, channels, planes, channels, space, begin, end, 0, channels);
  });
}

// Memory of one call, shared by its threads.
class SharedBuffer {
public:
  explicit SharedBuffer(int64_t bytes) : memory_(borrow_block(bytes)) {}
  ~SharedBuffer() { return_block(memory_); }
  SharedBuffer(const SharedBuffer&) = delete;
  SharedBuffer& operator=(const SharedBuffer&) = delete;
  explicit operator bool() const { return memory_ != nullptr; }
  template <class U>
  U* as() const {
    return static_cast<U*>(memory_);
  }

private:
  void* memory_;
};

}  // namespace ptk::PTK_ISA
