// Attention of new queries to a cache of keys and values on the CUDA cores: equations as in kv_cache.h.
//
//   place     reads lengths and tables, checks them, and writes where every sequence lies: nothing waits for the
//   device,
//             so that a step can be captured in a graph. A sequence that does not fit its cache gets NaN, its cache
//             stays
//   append    one block per new token and key head: rotate, quantise, write
//   split     one block per key head, eight of the rows that share it (the queries of all its heads), and part of the
//             slots: a thread per slot for the scores, softmax, a thread per eight columns of a slot for the values
//   combine   one block per row: the parts' sums, in order, with the sink
//
// Sources: split keys: Dao et al., Flash-Decoding, 2023; pages: Kwon et al., 2023, arXiv:2309.06180.
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

struct KvSplitParams {
  KvCacheParams base;
  CacheWorkspace work;
};

template <typename Scalar, CacheType Type>
struct KvSplit {
  static constexpr int kThreads = kCacheThreads;
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kRows = kRowsPerBlock;
  static constexpr int kColumns = 8;  // of values, to a thread
  static constexpr int kMaxGroups = 16;
  using Params = KvSplitParams;
  using Acc = AccumulatorOf<Scalar>;
  using Stored = StoredType<Scalar, Type>;

  // A row of the block: which one of the problem, what it sees, and where it stands.
  struct Row {
    int64_t index;
    int64_t begin, end, position;
    Acc slope;
  };

  struct alignas(16) Shared {
    Acc query[kRows][kMaxDim];  // at the end the outputs
    Acc weights[kRows][kSlotsPerStep];
    Acc max[kRows], sum[kRows], shrink[kRows];
    Row rows[kRows];
    int64_t value_offset[kSlotsPerStep];
    Acc value_unit[kSlotsPerStep];
  };

  struct Block {
    int64_t batch, head_kv, first_row, split;
    int rows;
  };

  __host__ __device__ static int64_t chunks(const KvCacheParams& p) {
    return (p.heads_q / p.heads_kv * p.len_q + kRows - 1) / kRows;
  }

  static int64_t blocks(const Params& params) {
    return params.base.batch * params.base.heads_kv * chunks(params.base) * params.work.splits;
  }

  __device__ static void run(const Params& params, Shared& shared) {
    const KvCacheParams& p = params.base;
    Block block;
    block.split = blockIdx.x % params.work.splits;
    const int64_t rest = blockIdx.x / params.work.splits;
    block.first_row = rest % chunks(p) * kRows;
    block.head_kv = rest / chunks(p) % p.heads_kv;
    block.batch = rest / chunks(p) / p.heads_kv;
    block.rows = static_cast<int>(min(int64_t{kRows}, p.heads_q / p.heads_kv * p.len_q - block.first_row));
    if (p.total[block.batch] < 0) {
      return;
    }
    stage_rows(p, shared, block);
    stage_queries(p, shared, block);
    int64_t first = p.total[block.batch], last = 0;
    for (int r = 0; r < block.rows; ++r) {
      first = min(first, shared.rows[r].begin);
      last = max(last, shared.rows[r].end);
    }
    const int64_t steps = (max(last - first, int64_t{0}) + kSlotsPerStep - 1) / kSlotsPerStep;
    const int64_t each = (steps + params.work.splits - 1) / params.work.splits * kSlotsPerStep;
    const int64_t begin = first + block.split * each, end = min(last, begin + each);

    Acc out[kColumns][kRows] = {};
    for (int64_t slot0 = begin; slot0 < end; slot0 += kSlotsPerStep) {
      score(p, shared, block, slot0, end);
      __syncthreads();
      soften(shared);
      __syncthreads();
      add_values(p, shared, block, static_cast<int>(min(end - slot0, int64_t{kSlotsPerStep})), out);
      __syncthreads();
    }
    write(params, shared, block, out);
  }

  // A thread per row. Row r of a key head is query r % len_q of the (r / len_q)-th of its query heads.
  __device__ static void stage_rows(const KvCacheParams& p, Shared& shared, const Block& block) {
    const int r = threadIdx.x;
    if (r < kRows) {
      shared.max[r] = -INFINITY;
      shared.sum[r] = 0;
    }
    if (r < block.rows) {
      const int64_t at = block.first_row + r;
      const int64_t head = block.head_kv * (p.heads_q / p.heads_kv) + at / p.len_q, query = at % p.len_q;
      const int64_t total = p.total[block.batch];
      Row& row = shared.rows[r];
      row.index = (block.batch * p.heads_q + head) * p.len_q + query;
      row.position = total - p.len_q + query;
      row.begin = p.leftpad[block.batch];
      row.end = p.is_causal ? min(total, row.position + 1) : total;
      if (p.window_right >= 0 && p.window_right < total) row.end = min(row.end, row.position + 1 + p.window_right);
      if (p.window_left >= 0 && p.window_left < total) row.begin = max(row.begin, row.position - p.window_left);
      row.end = max(row.begin, row.end);
      row.slope = p.alibi == nullptr
                      ? Acc(0)
                      : static_cast<Acc>(p.alibi[block.batch * p.alibi_strides[0] + head * p.alibi_strides[1]]);
    }
    __syncthreads();
  }

  __device__ static void stage_queries(const KvCacheParams& p, Shared& shared, const Block& block) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = r < block.rows ? shared.rows[r].index : 0;
      const int64_t query = row % p.len_q, head = row / p.len_q % p.heads_q;
      const auto& s = p.query.strides;
      const Scalar* source = static_cast<const Scalar*>(p.query.data) + block.batch * s[0] + head * s[1] + query * s[2];
      for (int64_t d = threadIdx.x; d < kMaxDim; d += kThreads) {
        shared.query[r][d] = r < block.rows && d < p.dim_qk ? static_cast<Acc>(source[d * s[3]]) : Acc(0);
      }
    }
    __syncthreads();
    if (p.rotary.cos != nullptr) {
      // With a direction in the mask a query stands at its own slot, without one all stand at the first new one.
      const bool is_directed = p.is_causal || p.window_left >= 0 || p.window_right >= 0;
      for (int r = 0; r < block.rows; ++r) {
        const int64_t offset = is_directed ? shared.rows[r].index % p.len_q : 0;
        rotate<Scalar>(p.rotary, p.total[block.batch] - p.len_new + offset, shared.query[r]);
      }
      __syncthreads();
    }
  }

  // A thread per slot.
  __device__ static void score(const KvCacheParams& p, Shared& shared, const Block& block, int64_t slot0, int64_t end) {
    const int64_t slot = slot0 + threadIdx.x;
    Acc scores[kRows] = {};
    if (slot < end) {
      const auto unit_of = [&](const ScaleView& scale) {
        return scale.data == nullptr
                   ? Acc(1)
                   : static_cast<Acc>(scale.data[slot_offset(p, scale, block.batch, block.head_kv, slot)]);
      };
      const Stored* key =
          static_cast<const Stored*>(p.key.data) + slot_offset(p, p.key, block.batch, block.head_kv, slot);
      multiply(shared, key, static_cast<int>(p.dim_qk), scores);
      const Acc unit = unit_of(p.key_scale);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scores[r] *= unit;
      }
      shared.value_offset[threadIdx.x] = slot_offset(p, p.value, block.batch, block.head_kv, slot);
      shared.value_unit[threadIdx.x] = unit_of(p.value_scale);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      shared.weights[r][threadIdx.x] =
          slot < end && r < block.rows ? finished(p, shared.rows[r], slot, scores[r]) : static_cast<Acc>(-INFINITY);
    }
  }

  // Eight numbers from memory, 16 bytes at a time where it is aligned to them.
  struct Eight {
    Stored at[8];
  };
  __device__ static Eight load_eight(const Stored* source, bool is_aligned) {
    constexpr int kWide = 16 / sizeof(Stored);
    struct alignas(sizeof(Stored) == 1 ? 8 : 16) Chunk {
      Stored at[sizeof(Stored) == 1 ? 8 : kWide];
    };
    constexpr int kChunk = sizeof(Chunk) / sizeof(Stored);
    Eight eight;
#pragma unroll
    for (int first = 0; first < 8; first += kChunk) {
      Chunk chunk;
      if (is_aligned) {
        chunk = *reinterpret_cast<const Chunk*>(source + first);
      } else {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          chunk.at[k] = source[first + k];
        }
      }
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        eight.at[first + k] = chunk.at[k];
      }
    }
    return eight;
  }

  // scores += <query, key>
  __device__ static void multiply(Shared& shared, const Stored* key, int dim, Acc (&scores)[kRows]) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(key) % 16 == 0;
    int d = 0;
#pragma unroll 2
    for (; d + 8 <= dim; d += 8) {
      const Eight numbers = load_eight(key + d, is_aligned);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const Acc number = decode<Acc>(numbers.at[k]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          scores[r] = std::fma(shared.query[r][d + k], number, scores[r]);
        }
      }
    }
    for (; d < dim; ++d) {
      const Acc number = decode<Acc>(key[d]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scores[r] = std::fma(shared.query[r][d], number, scores[r]);
      }
    }
  }

  __device__ static Acc finished(const KvCacheParams& p, const Row& row, int64_t slot, Acc product) {
    if (slot < row.begin || slot >= row.end) {
      return -INFINITY;
    }
    Acc score = static_cast<Acc>(p.scale) * product;
    if (p.softcap > 0) {
      score = static_cast<Acc>(p.softcap) * std::tanh(score / static_cast<Acc>(p.softcap));
    }
    const int64_t distance = row.position - slot;
    return score - row.slope * static_cast<Acc>(distance < 0 ? -distance : distance);
  }

  // Scores become weights relative to the largest so far. A warp takes two rows.
  __device__ static void soften(Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int r = warp; r < kRows; r += kThreads / 32) {
      Acc highest = -INFINITY;
      for (int j = lane; j < kSlotsPerStep; j += 32) {
        highest = std::fmax(highest, shared.weights[r][j]);
      }
      highest = std::fmax(shared.max[r], max_over_lanes<32>(highest));
      const Acc shift = highest == -INFINITY ? Acc(0) : highest;
      Acc sum = 0;
      for (int j = lane; j < kSlotsPerStep; j += 32) {
        const Acc weight = std::exp(shared.weights[r][j] - shift);
        shared.weights[r][j] = weight;
        sum += weight;
      }
      sum = sum_over_lanes<32>(sum);
      __syncwarp();
      if (lane == 0) {
        shared.shrink[r] = std::exp(shared.max[r] - shift);
        shared.sum[r] = shared.sum[r] * shared.shrink[r] + sum;
        shared.max[r] = highest;
      }
    }
  }

  // Threads in groups: one group has a slot at a time, a thread of it eight columns.
  struct Place {
    int first_col, group, groups;
    __device__ explicit Place(const KvCacheParams& p) {
      const int lanes = static_cast<int>((p.dim_v + kColumns - 1) / kColumns);
      groups = min(kThreads / lanes, kMaxGroups);
      group = static_cast<int>(threadIdx.x) / lanes;
      first_col = static_cast<int>(threadIdx.x) % lanes * kColumns;
    }
    __device__ bool is_used() const { return group < groups; }
  };

  __device__ static void add_values(const KvCacheParams& p, Shared& shared, const Block& block, int count,
                                    Acc (&out)[kColumns][kRows]) {
    const Place place(p);
    if (!place.is_used()) {
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        out[c][r] *= shared.shrink[r];
      }
    }
    const int cols = min(kColumns, static_cast<int>(p.dim_v) - place.first_col);
#pragma unroll 2
    for (int j = place.group; j < count; j += place.groups) {
      const Stored* value = static_cast<const Stored*>(p.value.data) + shared.value_offset[j] + place.first_col;
      Eight numbers = {};
      if (cols == kColumns) {
        numbers = load_eight(value, reinterpret_cast<uintptr_t>(value) % 16 == 0);
      } else {
        for (int c = 0; c < kColumns; ++c) {
          if (c < cols) numbers.at[c] = value[c];
        }
      }
      const Acc unit = shared.value_unit[j];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const Acc number = unit * decode<Acc>(numbers.at[c]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          out[c][r] = std::fma(shared.weights[r][j], number, out[c][r]);
        }
      }
    }
  }

  __device__ static void write(const Params& params, Shared& shared, const Block& block,
                               const Acc (&out)[kColumns][kRows]) {
    const KvCacheParams& p = params.base;
    const Place place(p);
    const int cols = min(kColumns, static_cast<int>(p.dim_v) - place.first_col);
    __syncthreads();  // nobody still reads the queries
    for (int group = 0; group < place.groups; ++group) {
      if (place.group == group) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (c < cols) {
              Acc& sum = shared.query[r][place.first_col + c];
              sum = group == 0 ? out[c][r] : sum + out[c][r];
            }
          }
        }
      }
      __syncthreads();
    }
    const int64_t rows = p.batch * p.heads_q * p.len_q;
    for (int r = 0; r < block.rows; ++r) {
      const int64_t at = block.split * rows + shared.rows[r].index;
      if (threadIdx.x == 0) {
        static_cast<Acc*>(params.work.max)[at] = shared.max[r];
        static_cast<Acc*>(params.work.sum)[at] = shared.sum[r];
      }
      for (int64_t d = threadIdx.x; d < p.dim_v; d += kThreads) {
        static_cast<Acc*>(params.work.out)[at * p.dim_v + d] = shared.query[r][d];
      }
    }
  }
};

template <typename Scalar>
struct KvCombine {
  static constexpr int kThreads = kCacheThreads;
  static constexpr int kBlocksPerMultiprocessor = 2;
  using Params = KvSplitParams;
  using Acc = AccumulatorOf<Scalar>;
  struct Shared {};

  static int64_t blocks(const Params& params) { return params.base.batch * params.base.heads_q * params.base.len_q; }

  __device__ static void run(const Params& params, Shared&) {
    const KvCacheParams& p = params.base;
    const int64_t rows = blocks_of(p), row = blockIdx.x;
    const int64_t query = row % p.len_q, head = row / p.len_q % p.heads_q, batch = row / p.len_q / p.heads_q;
    const Acc* max = static_cast<const Acc*>(params.work.max) + row;
    const Acc* sum = static_cast<const Acc*>(params.work.sum) + row;
    const Acc* parts = static_cast<const Acc*>(params.work.out) + row * p.dim_v;
    const bool is_wrong = p.total[batch] < 0;
    const Acc sink = p.sinks != nullptr ? static_cast<Acc>(p.sinks[head * p.sinks_stride]) : Acc(-INFINITY);
    Acc top = sink;
    for (int64_t s = 0; s < params.work.splits && !is_wrong; ++s) {
      top = std::fmax(top, max[s * rows]);
    }
    const Acc shift = top == -INFINITY ? Acc(0) : top;
    Acc total = std::exp(sink - shift);
    for (int64_t s = 0; s < params.work.splits && !is_wrong; ++s) {
      total += sum[s * rows] * std::exp(max[s * rows] - shift);
    }
    const Acc wrong = std::bit_cast<float>(0x7fc00000u);
    const auto& strides = p.out.strides;
    Scalar* out = static_cast<Scalar*>(p.out.data) + batch * strides[0] + head * strides[1] + query * strides[2];
    for (int64_t d = threadIdx.x; d < p.dim_v; d += kThreads) {
      Acc value = 0;
      for (int64_t s = 0; s < params.work.splits && !is_wrong; ++s) {
        value += parts[s * rows * p.dim_v + d] * std::exp(max[s * rows] - shift);
      }
      out[d] = static_cast<Scalar>(is_wrong ? wrong : total == 0 ? Acc(0) : value / total);
    }
    if (threadIdx.x == 0) {
      static_cast<Acc*>(p.lse)[row] = is_wrong ? wrong : total == 0 ? Acc(-INFINITY) : shift + std::log(total);
    }
  }

  __device__ static int64_t blocks_of(const KvCacheParams& p) { return p.batch * p.heads_q * p.len_q; }
};

}  // namespace ptk::cuda
