// What the backward kernels share: statistics of rows, from scores to weights and to gradients of scores, and the
// launches around the big products. With the weights p[i, j] = exp(s[i, j] - lse[i]), recomputed tile by tile, and
// k[i, j] = 1 / (1 - dropout_p) where a weight is kept, 0 where it is dropped:
//
//   delta[i]      = <grad_out[i], out[i]> - grad_lse[i]
//   grad_s[i, j]  = p[i, j] (k[i, j] <grad_out[i], value[j]> - delta[i])
//   grad_value[j] = sum_i k[i, j] p[i, j] grad_out[i]
//   grad_query[i] = scale sum_j cap'[i, j] grad_s[i, j] key[j]
//   grad_key[j]   = scale sum_i cap'[i, j] grad_s[i, j] query[i]
//   grad_mask     = grad_s, summed over what the mask is broadcast along
//   grad_slope    = sum over rows and keys of -|i + diagonal - j| grad_s[i, j]
//   grad_sink     = sum over rows of -exp(sink - lse[i]) delta[i]
//
// Every entry of every gradient is summed by one thread, or one block, in a fixed order: no atomics, the same bits on
// every run, and no memory but three numbers per row. The price: p and grad_s are computed once for grad_query, once
// for grad_key and grad_value, and once for grad_mask. Not yet run on a GPU.
// Source: Dao et al. 2022, arXiv:2205.14135, appendix B.
//
// Plan                                    threads  registers  shared of a block, at most
//   AttentionDelta                           256         96    0 KiB
//   AttentionWeightScale                     256        128   35 KiB
//   AttentionHeadSums                        256         80    4 KiB
#pragma once

#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_dropout.cuh"
#include "csrc/ops/attention/attention_scores.cuh"

namespace ptk::cuda {

template <typename Acc>
struct RowStatistics {
  Acc lse;
  Acc delta;
  Acc weight_scale;
};

// Of a row that attends to nothing, or lies outside, lse is +inf: its weights exp(s - lse) are then 0.
template <typename Acc>
__device__ RowStatistics<Acc> row_statistics(const AttentionBackwardParams& params, const Sequence& sequence,
                                             int64_t head, int row) {
  if (row >= sequence.len_q) {
    return {INFINITY, 0, 0};
  }
  const int64_t at = row_statistics_offset(params.base.problem, sequence, head) + row;
  const Acc lse = static_cast<const Acc*>(params.base.lse)[at];
  return {lse == -INFINITY ? static_cast<Acc>(INFINITY) : lse, static_cast<const Acc*>(params.delta)[at],
          static_cast<const Acc*>(params.weight_scale)[at]};
}

// The tiles of queries that stream past a block of keys: those of one query head after those of another.
struct QueryWalk {
  int first_head;
  int first_row;
  int tile_rows;
  int tiles_per_head;
  int tiles;

  __device__ int head(int index) const { return first_head + index / tiles_per_head; }
  __device__ int row(int index) const { return first_row + index % tiles_per_head * tile_rows; }
};

// Of the rows that see any of the keys from key0 up to key1.
__device__ inline QueryWalk query_walk(const Problem& problem, const Sequence& sequence, int64_t head_kv, int key0,
                                       int key1, int tile_rows) {
  const int group = static_cast<int>(problem.heads_q / problem.heads_kv);
  const Span queries = sequence.rows_of(key0, key1);
  QueryWalk walk{static_cast<int>(head_kv) * group, queries.begin / tile_rows * tile_rows, tile_rows, 0, 0};
  if (queries.begin < queries.end) {
    walk.tiles_per_head = static_cast<int>(tile_count(queries.end - walk.first_row, tile_rows));
    walk.tiles = group * walk.tiles_per_head;
  }
  return walk;
}

// Entry of query number a and key number b of a thread's part of a tile.
template <bool Transposed, typename Tile>
__device__ typename Tile::Acc& entry(Tile& tile, int a, int b) {
  return Transposed ? tile.at(b, a) : tile.at(a, b);
}

template <bool Transposed, typename Tile>
inline constexpr int kQueriesOf = Transposed ? Tile::kCols : Tile::kRows;
template <bool Transposed, typename Tile>
inline constexpr int kKeysOf = Transposed ? Tile::kRows : Tile::kCols;

// Finished scores become weights. statistics(a) are those of query number a.
template <bool Transposed, typename Scores, typename Tile, typename Statistics>
__device__ void make_weights(const Scores& scores, Tile& tile, const Statistics& statistics) {
  using Acc = typename Tile::Acc;
  const Acc unit = scores.unit();
#pragma unroll
  for (int a = 0; a < kQueriesOf<Transposed, Tile>; ++a) {
    const RowStatistics<Acc> row = statistics(a);
#pragma unroll
    for (int b = 0; b < kKeysOf<Transposed, Tile>; ++b) {
      Acc& weight = entry<Transposed>(tile, a, b);
      if (scores.is_plain()) {
        weight = Tile::exp_of_product(weight, unit, row.lse) * row.weight_scale;
      } else {
        // Scores beside a mask of -1e9 are multiples of 64: one that is rounded up here and was not before must not
        // become a weight of e^64.
        weight = Tile::exp(weight - row.lse) * row.weight_scale;
        weight = weight > 1 ? Acc(1) : weight;
      }
    }
  }
}

// k[i, j] <grad_out, value> become gradients of scores.
template <bool Transposed, typename Tile, typename Statistics>
__device__ void make_score_gradients(Tile& weights, Tile& products, const Statistics& statistics) {
#pragma unroll
  for (int a = 0; a < kQueriesOf<Transposed, Tile>; ++a) {
    const auto delta = statistics(a).delta;
#pragma unroll
    for (int b = 0; b < kKeysOf<Transposed, Tile>; ++b) {
      auto& gradient = entry<Transposed>(products, a, b);
      gradient = entry<Transposed>(weights, a, b) * (gradient - delta);
    }
  }
}

template <typename Tile>
__device__ void multiply_entries(Tile& tile, Tile& by) {
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      tile.at(i, j) *= by.at(i, j);
    }
  }
}

// Adds the rows' sums of what the gradient of slope is made of.
template <typename Scores, typename Tile>
__device__ void add_slopes(const Scores& scores, Tile& gradients, int row0, int col0,
                           typename Tile::Acc (&sum)[Tile::kRows]) {
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      sum[i] += scores.distance(row0 + Tile::row(i), col0 + Tile::col(j)) * gradients.at(i, j);
    }
  }
}

template <typename Tile>
__device__ void store_slopes(const AttentionBackwardParams& params, const Sequence& sequence, int64_t head, int row0,
                             const typename Tile::Acc (&sum)[Tile::kRows]) {
  using Acc = typename Tile::Acc;
  Acc* slope_sums = static_cast<Acc*>(params.slope_sums) + row_statistics_offset(params.base.problem, sequence, head);
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const Acc total = sum_over_lanes<Tile::kLanesPerRow>(sum[i]);
    const int row = row0 + Tile::row(i);
    if (lane_index() % Tile::kLanesPerRow == 0 && row < sequence.len_q) {
      slope_sums[row] = total;
    }
  }
}

// One warp per row.
template <typename Scalar>
struct AttentionDelta {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  struct Shared {};
  static constexpr int kThreads = ptk::cuda::kThreads;
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kBlockRows = kThreads / kWarpSize;

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, kBlockRows);
  }

  __device__ static void run(const Params& params, Shared&) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const auto [batch, head, row0] = block_position(problem.heads_q, problem.len_q, kBlockRows);
    const Sequence sequence = sequence_of(problem, batch);
    const int row = row0 + warp_index();
    const auto out = query_matrix<Scalar>(base.out, sequence, head, problem.dim_v);
    const auto grad_out = query_matrix<Scalar>(base.grad_out, sequence, head, problem.dim_v);
    Acc delta = 0;
    if (row < out.rows) {
      for (int col = lane_index(); col < out.cols; col += kWarpSize) {
        delta += static_cast<Acc>(out.data[row * out.row_stride + col * out.col_stride]) *
                 static_cast<Acc>(grad_out.data[row * grad_out.row_stride + col * grad_out.col_stride]);
      }
    }
    delta = sum_over_lanes<kWarpSize>(delta);
    if (row < out.rows && lane_index() == 0) {
      const int64_t offset = row_statistics_offset(problem, sequence, head) + row;
      if (base.grad_lse != nullptr) {
        delta -= static_cast<const Acc*>(base.grad_lse)[offset];
      }
      const bool fully_masked = static_cast<const Acc*>(base.lse)[offset] == -INFINITY;
      static_cast<Acc*>(params.delta)[offset] = fully_masked ? Acc(0) : delta;
    }
  }
};

// What the weights of a row have to be multiplied by to sum to 1. An lse of -1e9, from a mask that blocks the row with
// a large number, has no digit left for the logarithm of the sum: exp(s - lse) is then 1 for every key. Rows whose lse
// is within kExact of 0 have a weight_scale of 1, and a tile of nothing but such rows costs nothing.
template <typename Scalar>
struct AttentionWeightScale {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  using Geometry = AttentionTile<Acc, kChunk, 1>;
  static constexpr int kThreads = ptk::cuda::kThreads;
  static constexpr int kBlocksPerMultiprocessor = Geometry::kBlocksPerMultiprocessor;
  static constexpr int kRows = Geometry::kRows;
  static constexpr int kCols = Geometry::kCols;
  static constexpr Acc kExact = 64;  // rounding of lse then changes the weights by 32 ulp at most
  using Shared = Tiles<Acc, kRows, kCols>;
  using Tile = ThreadTile<Acc, kRows, kCols>;

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, Geometry::kBlockRows);
  }

  __device__ static bool exact(Acc lse) { return lse == -INFINITY || std::fabs(lse) <= kExact; }

  __device__ static void run(const Params& params, Shared& tiles) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const auto [batch, head, row0] = block_position(problem.heads_q, problem.len_q, Geometry::kBlockRows);
    const Sequence sequence = sequence_of(problem, batch);
    const int row1 = min(row0 + Geometry::kBlockRows, sequence.len_q);
    const Acc* lse = static_cast<const Acc*>(base.lse) + row_statistics_offset(problem, sequence, head);
    bool all_exact = true;  // the same in every thread, as the barriers below require
    for (int row = row0; row < row1; ++row) {
      all_exact &= exact(lse[row]);
    }
    if (row0 >= row1) {
      return;
    }

    const int64_t head_kv = head / (problem.heads_q / problem.heads_kv);
    const auto query = query_matrix<Scalar>(base.query, sequence, head, problem.dim_qk);
    const auto key = key_matrix<Scalar>(base.key, sequence, head_kv, problem.dim_qk);
    const HeadScores<Scalar> scores(problem, sequence, head);
    const Acc unit = scores.unit();
    const Span keys = sequence.keys_of(row0, row1);
    Acc sum[kRows] = {};
    for (int col0 = keys.begin / Geometry::kBlockCols * Geometry::kBlockCols; col0 < keys.end && !all_exact;
         col0 += Geometry::kBlockCols) {
      Tile tile;
      tile.clear();
      product_of_rows(tiles, query, row0, key, col0, tile);
      scores.template finish<false>(tile, row0, col0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Acc row_lse = lse[min(row0 + Tile::row(i), row1 - 1)];
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          sum[i] += row_lse == -INFINITY ? Acc(0)
                    : scores.is_plain()  ? std::exp(std::fma(unit, tile.at(i, j), -row_lse))
                                         : std::exp(tile.at(i, j) - row_lse);
        }
      }
    }

    const Acc* sink = head_sink<Acc>(problem, batch, head);
    Acc* weight_scale = static_cast<Acc*>(params.weight_scale) + row_statistics_offset(problem, sequence, head);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row0 + Tile::row(i);
      Acc total = sum_over_lanes<kGrid>(sum[i]);
      if (thread_col() == 0 && row < row1) {
        total += sink != nullptr ? std::exp(*sink - lse[row]) : Acc(0);
        weight_scale[row] = exact(lse[row]) ? Acc(1) : 1 / total;
      }
    }
  }
};

// Gradients of slopes and sinks: a block sums over the rows of one head, and over the batch where that shares them.
template <typename Scalar>
struct AttentionHeadSums {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  static constexpr int kThreads = ptk::cuda::kThreads;
  static constexpr int kBlocksPerMultiprocessor = 1;
  struct Shared {
    double slopes[kThreads];
    double sinks[kThreads];
  };

  static int64_t blocks(const Params& params) { return params.base.problem.heads_q * params.base.problem.batch; }

  __device__ static void add_sequence(const Params& params, const Sequence& sequence, int64_t head, double& slopes,
                                      double& sinks) {
    const Problem& problem = params.base.problem;
    const int64_t rows = row_statistics_offset(problem, sequence, head);
    const Acc* sink = head_sink<Acc>(problem, sequence.batch, head);
    for (int row = threadIdx.x; row < sequence.len_q; row += kThreads) {
      if (params.slope_sums != nullptr) {
        slopes += static_cast<const Acc*>(params.slope_sums)[rows + row];
      }
      const Acc lse = static_cast<const Acc*>(params.base.lse)[rows + row];
      if (sink != nullptr && lse != -INFINITY) {
        const Acc weight = std::exp(*sink - lse) * static_cast<const Acc*>(params.weight_scale)[rows + row];
        sinks -= static_cast<double>(weight > 1 ? Acc(1) : weight) * static_cast<const Acc*>(params.delta)[rows + row];
      }
    }
  }

  // Sum over the threads' numbers, in thread 0.
  __device__ static double total(double (&numbers)[kThreads], double mine) {
    numbers[threadIdx.x] = mine;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < half) {
        numbers[threadIdx.x] += numbers[threadIdx.x + half];
      }
    }
    return numbers[0];
  }

  __device__ static void run(const Params& params, Shared& shared) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const int64_t head = blockIdx.x % problem.heads_q, first = blockIdx.x / problem.heads_q;
    // Slopes and sinks may differ in whether the batch shares them; block `first` = 0 of a head also sums for all.
    double slopes = 0, sinks = 0, all_slopes = 0, all_sinks = 0;
    add_sequence(params, sequence_of(problem, first), head, slopes, sinks);
    if (first == 0) {
      for (int64_t batch = 0; batch < problem.batch; ++batch) {
        add_sequence(params, sequence_of(problem, batch), head, all_slopes, all_sinks);
      }
    }
    write(base.grad_alibi, shared.slopes, first, head, slopes, all_slopes);
    write(base.grad_sinks, shared.sinks, first, head, sinks, all_sinks);
  }

  __device__ static void write(const View& to, double (&numbers)[kThreads], int64_t batch, int64_t head, double own,
                               double all) {
    const bool is_shared = to.strides[0] == 0;
    if (to.data == nullptr || (is_shared && batch != 0)) {
      return;
    }
    const double sum = total(numbers, is_shared ? all : own);
    if (threadIdx.x == 0) {
      static_cast<Acc*>(to.data)[batch * to.strides[0] + head * to.strides[1]] = static_cast<Acc>(sum);
    }
  }
};

// Gradient of a mask. A block owns a tile of it and walks over everything that the tile is broadcast along. Gradients
// gives its shared memory, its Tile, and `static bool tile(params, shared, batch, head, row0, col0, Tile&)`, which
// computes one tile of grad_s, or says that nothing of it is seen.
template <typename Gradients>
struct AttentionGradMask {
  using Params = AttentionBackwardParams;
  using Tile = typename Gradients::Tile;
  using Acc = typename Tile::Acc;
  static constexpr int kThreads = Gradients::kThreads;
  static constexpr int kBlocksPerMultiprocessor = Gradients::kBlocksPerMultiprocessor;
  static constexpr int kBlockRows = Gradients::kBlockRows;
  static constexpr int kBlockCols = Gradients::kBlockCols;

  union Shared {
    typename Gradients::Shared tiles;
    Acc sums[kBlockRows][kBlockCols];
  };

  struct Axis {
    int64_t size;
    bool is_summed;
    __host__ __device__ int64_t blocks() const { return is_summed ? 1 : size; }
  };

  struct Axes {
    Axis batch, head, rows, cols;
  };

  __host__ __device__ static Axes axes(const Params& params) {
    const Problem& problem = params.base.problem;
    const int64_t (&strides)[4] = params.base.grad_mask.strides;
    return {{problem.batch, strides[0] == 0},
            {problem.heads_q, strides[1] == 0},
            {tile_count(problem.len_q, kBlockRows), strides[2] == 0},
            {tile_count(problem.len_k, kBlockCols), strides[3] == 0}};
  }

  static int64_t blocks(const Params& params) {
    const Axes all = axes(params);
    return all.batch.blocks() * all.head.blocks() * all.rows.blocks() * all.cols.blocks();
  }

  __device__ static void run(const Params& params, Shared& shared) {
    const Axes all = axes(params);
    int64_t rest = blockIdx.x;
    const auto place = [&](const Axis& axis) {
      const int64_t at = rest % axis.blocks();
      rest /= axis.blocks();
      return at;
    };
    const int64_t first_col = place(all.cols), first_row = place(all.rows), first_head = place(all.head),
                  first = place(all.batch);
    const auto end = [](const Axis& axis, int64_t begin) { return axis.is_summed ? axis.size : begin + 1; };

    Tile sum;
    sum.clear();
    for (int64_t batch = first; batch < end(all.batch, first); ++batch) {
      for (int64_t head = first_head; head < end(all.head, first_head); ++head) {
        for (int64_t row = first_row; row < end(all.rows, first_row); ++row) {
          for (int64_t col = first_col; col < end(all.cols, first_col); ++col) {
            Tile tile;
            if (Gradients::tile(params, shared.tiles, batch, head, static_cast<int>(row) * kBlockRows,
                                static_cast<int>(col) * kBlockCols, tile)) {
#pragma unroll
              for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
                for (int j = 0; j < Tile::kCols; ++j) {
                  sum.at(i, j) += tile.at(i, j);
                }
              }
            }
          }
        }
      }
    }
    const View& to = params.base.grad_mask;
    Acc* data = static_cast<Acc*>(to.data) + first * to.strides[0] + first_head * to.strides[1];
    write(params.base.problem, shared.sums, sum, data, to.strides[2], to.strides[3],
          static_cast<int>(first_row) * kBlockRows, static_cast<int>(first_col) * kBlockCols);
  }

  __device__ static void write(const Problem& problem, Acc (&sums)[kBlockRows][kBlockCols], Tile& sum, Acc* data,
                               int64_t row_stride, int64_t col_stride, int row0, int col0) {
    __syncthreads();  // nobody still reads the tiles
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kCols; ++j) {
        sums[Gradients::first_row() + Tile::row(i)][Tile::col(j)] = sum.at(i, j);
      }
    }
    __syncthreads();
    if (row_stride == 0) {
      for (int col = threadIdx.x; col < kBlockCols; col += kThreads) {
        for (int row = 1; row < kBlockRows; ++row) {
          sums[0][col] += sums[row][col];
        }
      }
      __syncthreads();
    }
    const int rows = row_stride == 0 ? 1 : kBlockRows;
    if (col_stride == 0) {
      for (int row = threadIdx.x; row < rows; row += kThreads) {
        for (int col = 1; col < kBlockCols; ++col) {
          sums[row][0] += sums[row][col];
        }
      }
      __syncthreads();
    }
    const int cols = col_stride == 0 ? 1 : kBlockCols;
    for (int index = threadIdx.x; index < rows * cols; index += kThreads) {
      const int row = index / cols, col = index % cols;
      if (row0 + row < problem.len_q && col0 + col < problem.len_k) {
        data[(row0 + row) * row_stride + (col0 + col) * col_stride] = sums[row][col];
      }
    }
  }
};

// Launches before the big products.
template <typename Scalar, typename Launcher>
void run_attention_row_statistics(const AttentionBackwardParams& params, const Launcher& launcher) {
  launcher.template run<AttentionDelta<Scalar>>(params);
  launcher.template run<AttentionWeightScale<Scalar>>(params);
}

// And after them.
template <typename Scalar, typename Launcher>
void run_attention_head_sums(const AttentionBackwardParams& params, const Launcher& launcher) {
  if (params.base.grad_alibi.data != nullptr || params.base.grad_sinks.data != nullptr) {
    launcher.template run<AttentionHeadSums<Scalar>>(params);
  }
}

}  // namespace ptk::cuda
