// Attention of new queries to a cache of keys and values on the CUDA cores: equations as in kv_cache.h.
// Not yet run on a GPU.
//
//   place     reads lengths and tables, checks them, and writes where every sequence lies: the host waits for nothing,
//             so that a step can be captured in a graph. A sequence that does not fit its cache gets NaN, and its cache
//             stays as it is
//   append    one block per new token and key head: rotate, quantise, write
//   split     one block per key head, eight of the rows that share it (the queries of all its heads), and part of the
//             slots: a thread per slot for the scores, softmax, a thread per eight columns of a slot for the values
//   combine   one block per row: the parts' sums, in order, with the sink
//
// Sources: split keys: Dao et al., Flash-Decoding, 2023; pages: Kwon et al., 2023, arXiv:2309.06180.
//
// Plan                                    threads  registers  shared of a block, at most
//   KvSplit                                  128        255   43 KiB
//   KvCombine                                128         72    0 KiB
#pragma once

#include "csrc/ops/attention_kv_cache/kv_cache_append.cuh"

namespace ptk::cuda {

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
