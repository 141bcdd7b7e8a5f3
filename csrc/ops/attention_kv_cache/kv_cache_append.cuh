// Where sequences of a cache lie, how numbers are stored, and appending: see kv_cache.cuh. Not yet run on a GPU.
//
// Plan                                    threads  registers  shared of a block, at most
//   KvPlace                                  128         64    1 KiB
//   KvAppend                                 128         96    5 KiB
#pragma once

#include "csrc/cuda/rounded.cuh"
#include "csrc/cuda/tile.cuh"
#include "csrc/ops/attention_kv_cache/kv_cache.h"
#include "csrc/ops/attention_kv_cache/kv_cache_split.h"

#include <algorithm>
#include <bit>

namespace ptk::cuda {

inline constexpr int kCacheThreads = 128;
inline constexpr int kMaxDim = 512;

struct IntegerArray {
  const void* data;
  int64_t strides[2];
  bool is_wide;

  __device__ int64_t at(int64_t i, int64_t j = 0) const {
    const int64_t offset = i * strides[0] + j * strides[1];
    return is_wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

struct CacheWorkspace {
  int64_t *total, *leftpad, *blocks;  // what KvCacheParams points to
  void *max, *sum, *out;              // of the parts, in the accumulator's type
  int64_t splits;
};

struct KvPlaceParams {
  IntegerArray seqlens, table, batch_idx, leftpad;  // data is null where not given
  int64_t blocks_per_sequence, page, num_blocks, capacity, positions, len_new;
  int64_t batch;
  CacheWorkspace to;
};

// total is -1 where a sequence does not fit.
struct KvPlace {
  static constexpr int kThreads = kCacheThreads;
  static constexpr int kBlocksPerMultiprocessor = 1;
  using Params = KvPlaceParams;
  struct Shared {
    int wrong;
  };

  static int64_t blocks(const Params& params) { return params.batch; }

  __device__ static void run(const Params& p, Shared& shared) {
    const int64_t b = blockIdx.x;
    const int64_t filled = p.seqlens.at(b), leftpad = p.leftpad.data != nullptr ? p.leftpad.at(b) : 0;
    const bool fits = 0 <= filled && filled <= p.capacity - p.len_new && filled + p.len_new <= p.positions &&
                      0 <= leftpad && leftpad <= filled;
    const int64_t total = fits ? filled + p.len_new : 0;
    if (threadIdx.x == 0) {
      shared.wrong = !fits;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < p.blocks_per_sequence; i += kThreads) {
      // Entries of pages that hold no slot yet are not read.
      const bool is_used = (i + 1) * p.page > leftpad && i * p.page < total;
      int64_t block = 0;
      if (is_used) {
        block = p.table.data != nullptr ? p.table.at(b, i) : p.batch_idx.data != nullptr ? p.batch_idx.at(b) : b;
      }
      if (block < 0 || block >= p.num_blocks) {
        shared.wrong = 1;
        block = 0;
      }
      p.to.blocks[b * p.blocks_per_sequence + i] = block;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      p.to.total[b] = shared.wrong ? -1 : total;
      p.to.leftpad[b] = leftpad;
    }
  }
};

struct E4m3 {
  uint8_t bits;
};

template <typename Scalar, CacheType Type>
using StoredType =
    std::conditional_t<Type == CacheType::as_query, Scalar, std::conditional_t<Type == CacheType::s8, int8_t, E4m3>>;

// Exponent bias 7, three mantissa bits, no infinity, 0x7f is NaN: as float bits they stand for 2^-120 of the number.
template <typename Acc>
__device__ Acc decode(E4m3 code) {
  const uint32_t magnitude = code.bits & 0x7f;
  const float number = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  const float sized = magnitude == 0x7f ? std::bit_cast<float>(0x7fc00000u) : number;
  return static_cast<Acc>(code.bits & 0x80 ? -sized : sized);
}
template <typename Acc, typename Number>
__device__ Acc decode(Number number) {
  return static_cast<Acc>(number);
}

__device__ inline void encode(float x, int8_t& code) {
  code = x == x ? static_cast<int8_t>(std::rint(std::fmin(std::fmax(x, -127.0f), 127.0f))) : int8_t(0);
}

__device__ inline void encode(float x, E4m3& code) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  uint32_t number;
  if (magnitude > 0x7f800000) {
    number = 0x7f;
  } else if (magnitude >= 0x43e00000) {
    number = 0x7e;  // 448
  } else if (magnitude < 0x3c800000) {
    // Below 2^-6 codes are multiples of 2^-9: adding 2^14 leaves them in the low mantissa, rounded to nearest even.
    number = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000u;
  } else {
    number = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - 0x3c000000u) >> 20;
  }
  code.bits = static_cast<uint8_t>(number | (bits >> 24 & 0x80));
}

template <typename View>
__device__ int64_t slot_offset(const KvCacheParams& p, const View& view, int64_t batch, int64_t head, int64_t slot) {
  return p.blocks[batch * p.blocks_per_sequence + slot / p.page] * view.stride_block + head * view.stride_head +
         slot % p.page * view.stride_slot;
}

template <typename Scalar>
__device__ AccumulatorOf<Scalar> rotary_value(const Rotary& r, const void* data, const int64_t (&strides)[2],
                                              int64_t position, int64_t i) {
  using Acc = AccumulatorOf<Scalar>;
  const int64_t offset = position * strides[0] + i * strides[1];
  return r.dtype == DType::f32 ? static_cast<Acc>(static_cast<const float*>(data)[offset])
                               : static_cast<Acc>(static_cast<const Scalar*>(data)[offset]);
}

// Rotates pairs of a row in shared memory by the angles of a position, by all threads. Products are rounded before they
// are added, as they are in the composition, so that what is stored has the composition's bits.
template <typename Scalar>
__device__ void rotate(const Rotary& r, int64_t position, AccumulatorOf<Scalar>* row) {
  const int64_t half = r.dim / 2;
  for (int64_t i = threadIdx.x; i < half; i += kCacheThreads) {
    const int64_t first = r.interleaved ? 2 * i : i, second = r.interleaved ? 2 * i + 1 : i + half;
    const auto c = rotary_value<Scalar>(r, r.cos, r.cos_strides, position, i);
    const auto s = rotary_value<Scalar>(r, r.sin, r.sin_strides, position, i);
    const auto x = row[first], y = row[second];
    row[first] = multiply_rounded(x, c) - multiply_rounded(y, s);
    row[second] = multiply_rounded(x, s) + multiply_rounded(y, c);
  }
}

template <typename Scalar, CacheType Type>
struct KvAppend {
  static constexpr int kThreads = kCacheThreads;
  static constexpr int kBlocksPerMultiprocessor = 2;
  using Params = KvCacheParams;
  using Acc = AccumulatorOf<Scalar>;
  struct Shared {
    Acc row[kMaxDim];
    float largest[kThreads];
  };

  static int64_t blocks(const Params& p) { return p.batch * p.len_new * p.heads_kv; }

  __device__ static void run(const Params& p, Shared& shared) {
    const int64_t head = blockIdx.x % p.heads_kv, token = blockIdx.x / p.heads_kv % p.len_new,
                  batch = blockIdx.x / p.heads_kv / p.len_new;
    if (p.total[batch] < 0) {
      return;
    }
    const int64_t slot = p.total[batch] - p.len_new + token;
    write(p, shared, p.key_new, p.key, p.key_scale, p.dim_qk, batch, head, token, slot, p.rotary.cos != nullptr);
    write(p, shared, p.value_new, p.value, p.value_scale, p.dim_v, batch, head, token, slot, false);
  }

  __device__ static void write(const Params& p, Shared& shared, const ConstView& from, const CacheView& to,
                               const ScaleView& scale, int64_t dim, int64_t batch, int64_t head, int64_t token,
                               int64_t slot, bool rotates) {
    const Scalar* source = static_cast<const Scalar*>(from.data) + batch * from.strides[0] + head * from.strides[1] +
                           token * from.strides[2];
    auto* target = static_cast<StoredType<Scalar, Type>*>(to.data) + slot_offset(p, to, batch, head, slot);
    __syncthreads();  // nobody still reads the last row
    for (int64_t d = threadIdx.x; d < dim; d += kThreads) {
      shared.row[d] = static_cast<Acc>(source[d * from.strides[3]]);
    }
    __syncthreads();
    if (rotates) {
      rotate<Scalar>(p.rotary, slot, shared.row);
      __syncthreads();
    }
    if constexpr (Type == CacheType::as_query) {
      for (int64_t d = threadIdx.x; d < dim; d += kThreads) {
        // A row that is not rotated keeps its bits, a NaN's included.
        target[d] = rotates ? static_cast<Scalar>(shared.row[d]) : source[d * from.strides[3]];
      }
    } else {
      float* stored = scale.data + slot_offset(p, scale, batch, head, slot);
      const float unit = scale.is_per_slot ? choose_scale(shared, dim) : *stored;
      if (scale.is_per_slot && threadIdx.x == 0) {
        *stored = unit;
      }
      for (int64_t d = threadIdx.x; d < dim; d += kThreads) {
        encode(static_cast<float>(shared.row[d]) / unit, target[d]);
      }
    }
  }

  // Largest magnitude over the largest code; 1 for a row of zeros, NaN for a row with one.
  __device__ static float choose_scale(Shared& shared, int64_t dim) {
    float largest = 0;
    const auto take = [&](float x) { largest = x <= largest || largest != largest ? largest : x; };
    for (int64_t d = threadIdx.x; d < dim; d += kThreads) {
      take(std::fabs(static_cast<float>(shared.row[d])));
    }
    shared.largest[threadIdx.x] = largest;
    __syncthreads();
    for (int i = 0; i < kThreads; ++i) {
      take(shared.largest[i]);
    }
    const float scale = largest / (Type == CacheType::s8 ? 127.0f : 448.0f);
    return scale == 0 ? 1 : scale;
  }
};

}  // namespace ptk::cuda
