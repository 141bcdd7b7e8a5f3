// Attention backward on the CUDA cores. With the weights p[i, j] = exp(s[i, j] - lse[i]), recomputed tile by tile:
//
//   grad_value[j] = sum_i p[i, j] grad_out[i]
//   grad_s[i, j]  = p[i, j] (<grad_out[i], value[j]> - delta[i])        delta[i] = <grad_out[i], out[i]> - grad_lse[i]
//   grad_query[i] = scale sum_j grad_s[i, j] key[j]                     grad_key[j] = scale sum_i grad_s[i, j] query[i]
//
// Four launches: delta; what rounding of lse does to p; one block per tile of keys for grad_key and grad_value, walking
// over the queries of every query head that shares them; one block per tile of queries for grad_query. Each gradient
// entry is summed by one thread in a fixed order: no atomics, the same bits on every run. The price: p and grad_s are
// computed twice.
// Source: Dao et al. 2022, arXiv:2205.14135, appendix B.
#pragma once

#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_tile.cuh"

namespace ptk::cuda {

// A row with nothing to attend to has lse = -inf and every weight 0.
template <typename Acc>
__device__ Acc attention_weight(Acc score, Acc lse) {
  return lse == -INFINITY ? Acc(0) : std::exp(score - lse);
}

// What the weights of a row have to be multiplied by to sum to 1. An lse of -1e9, from a mask that blocks the row with
// a large number, has no digit left for the logarithm of the sum: exp(s - lse) is then 1 for every key. Rows whose lse
// is within kExact of 0 have a weight_scale of 1, and a tile of nothing but such rows costs nothing.
template <typename Scalar>
struct AttentionWeightScale {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  using Geometry = AttentionTile<Acc, kChunk, 1>;
  static constexpr int kBlocksPerMultiprocessor = Geometry::kBlocksPerMultiprocessor;
  static constexpr int kRows = Geometry::kRows;
  static constexpr int kCols = Geometry::kCols;
  static constexpr Acc kExact = 64;  // rounding of lse then changes the weights by 32 ulp at most
  using Shared = Tiles<Acc, kRows, kCols>;

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, Geometry::kBlockRows);
  }

  __device__ static bool exact(Acc lse) { return lse == -INFINITY || std::fabs(lse) <= kExact; }

  __device__ static void run(const Params& params, Shared& tiles) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const auto [batch, head, row0] = block_position(problem.heads_q, problem.len_q, Geometry::kBlockRows);
    const int64_t head_kv = head / (problem.heads_q / problem.heads_kv);
    const auto query = head_matrix<Scalar>(base.query, batch, head, problem.len_q, problem.dim_qk);
    const auto key = head_matrix<Scalar>(base.key, batch, head_kv, problem.len_k, problem.dim_qk);
    const int64_t mask = mask_offset(problem, batch, head);
    const Acc* lse = static_cast<const Acc*>(base.lse) + row_statistics_offset(problem, batch, head);

    bool all_exact = true;  // the same in every thread, as the barriers below require
    for (int row = row0; row < min(query.rows, row0 + Geometry::kBlockRows); ++row) {
      all_exact = all_exact && exact(lse[row]);
    }
    const int keys = problem.is_causal ? min(key.rows, row0 + Geometry::kBlockRows) : key.rows;
    Acc sum[kRows] = {};
    for (int col0 = 0; col0 < keys && !all_exact; col0 += Geometry::kBlockCols) {
      Acc products[kRows][kCols] = {};
      product_of_rows(tiles, query, row0, key, col0, products);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = row0 + thread_row() * kRows + i;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          const int col = col0 + thread_col() + kGrid * j;
          const Acc score = masked_score<Scalar>(problem, mask, row, col, products[i][j]);
          sum[i] += attention_weight(score, lse[min(row, query.rows - 1)]);
        }
      }
    }

    Acc* weight_scale = static_cast<Acc*>(params.weight_scale) + row_statistics_offset(problem, batch, head);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row0 + thread_row() * kRows + i;
      const Acc total = row_sum(sum[i]);
      if (thread_col() == 0 && row < query.rows) {
        weight_scale[row] = exact(lse[row]) ? Acc(1) : 1 / total;
      }
    }
  }
};

// One warp per row.
template <typename Scalar>
struct AttentionDelta {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  struct Shared {};
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kWarp = 32;
  static constexpr int kBlockRows = kThreads / kWarp;

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, kBlockRows);
  }

  __device__ static void run(const Params& params, Shared&) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const auto [batch, head, row0] = block_position(problem.heads_q, problem.len_q, kBlockRows);
    const int row = row0 + static_cast<int>(threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    const auto out = head_matrix<Scalar>(base.out, batch, head, problem.len_q, problem.dim_v);
    const auto grad_out = head_matrix<Scalar>(base.grad_out, batch, head, problem.len_q, problem.dim_v);
    Acc delta = 0;
    if (row < out.rows) {
      for (int col = lane; col < out.cols; col += kWarp) {
        delta += static_cast<Acc>(out.data[row * out.row_stride + col * out.col_stride]) *
                 static_cast<Acc>(grad_out.data[row * grad_out.row_stride + col * grad_out.col_stride]);
      }
    }
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, other);
    }
    if (row < out.rows && lane == 0) {
      const int64_t offset = row_statistics_offset(problem, batch, head) + row;
      if (base.grad_lse != nullptr) {
        delta -= static_cast<const Acc*>(base.grad_lse)[offset];
      }
      const bool fully_masked = static_cast<const Acc*>(base.lse)[offset] == -INFINITY;
      static_cast<Acc*>(params.delta)[offset] = fully_masked ? Acc(0) : delta;
    }
  }
};

template <typename Scalar, int HeadDim>
struct AttentionGradQuery {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  using Geometry = AttentionTile<Acc, HeadDim, 1>;
  static constexpr int kBlocksPerMultiprocessor = Geometry::kBlocksPerMultiprocessor;
  static constexpr int kRows = Geometry::kRows;
  static constexpr int kCols = Geometry::kCols;
  using Shared = Tiles<Acc, kRows, kCols>;

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, Geometry::kBlockRows);
  }

  __device__ static void run(const Params& params, Shared& tiles) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const auto [batch, head, row0] = block_position(problem.heads_q, problem.len_q, Geometry::kBlockRows);
    const int64_t head_kv = head / (problem.heads_q / problem.heads_kv);
    const auto query = head_matrix<Scalar>(base.query, batch, head, problem.len_q, problem.dim_qk);
    const auto key = head_matrix<Scalar>(base.key, batch, head_kv, problem.len_k, problem.dim_qk);
    const auto value = head_matrix<Scalar>(base.value, batch, head_kv, problem.len_k, problem.dim_v);
    const auto grad_out = head_matrix<Scalar>(base.grad_out, batch, head, problem.len_q, problem.dim_v);
    const int64_t mask = mask_offset(problem, batch, head);
    const Acc* lse = static_cast<const Acc*>(base.lse) + row_statistics_offset(problem, batch, head);
    const Acc* delta = static_cast<const Acc*>(params.delta) + row_statistics_offset(problem, batch, head);
    const Acc* weight_scale =
        static_cast<const Acc*>(params.weight_scale) + row_statistics_offset(problem, batch, head);

    Acc grad[Geometry::kChunks][kRows][kQuad] = {};
    const int keys = problem.is_causal ? min(key.rows, row0 + Geometry::kBlockRows) : key.rows;
    for (int col0 = 0; col0 < keys; col0 += Geometry::kBlockCols) {
      Acc weights[kRows][kCols] = {};
      product_of_rows(tiles, query, row0, key, col0, weights);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = row0 + thread_row() * kRows + i;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          const int col = col0 + thread_col() + kGrid * j;
          const Acc score = masked_score<Scalar>(problem, mask, row, col, weights[i][j]);
          const int inside = min(row, query.rows - 1);
          weights[i][j] = attention_weight(score, lse[inside]) * weight_scale[inside];
        }
      }
      store_weights(tiles, weights);  // read back below: they do not fit in registers beside grad_scores
      Acc grad_scores[kRows][kCols] = {};
      product_of_rows(tiles, grad_out, row0, value, col0, grad_scores);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = row0 + thread_row() * kRows + i;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          grad_scores[i][j] = tiles.weight(i, j) * (grad_scores[i][j] - delta[min(row, query.rows - 1)]);
        }
      }
      store_weights(tiles, grad_scores);
      add_weighted_rows(tiles, key, col0, grad);
    }

    Acc scale[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      scale[i] = static_cast<Acc>(problem.scale);
    }
    store_outputs(grad, scale, head_data<Scalar>(base.grad_query, batch, head), base.grad_query.strides[2], row0,
                  query.rows, query.cols);
  }
};

// The score tile is transposed here: its rows are keys, its columns queries.
template <typename Scalar, int HeadDim>
struct AttentionGradKeyValue {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  using Geometry = AttentionTile<Acc, HeadDim, 2>;
  static constexpr int kBlocksPerMultiprocessor = Geometry::kBlocksPerMultiprocessor;
  static constexpr int kRows = Geometry::kRows;
  static constexpr int kCols = Geometry::kCols;
  static constexpr int kChunks = Geometry::kChunks;
  using Shared = Tiles<Acc, kRows, kCols>;

  struct State {
    Acc grad_key[kChunks][kRows][kQuad] = {};
    Acc grad_value[kChunks][kRows][kQuad] = {};
  };

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_kv * tile_count(problem.len_k, Geometry::kBlockRows);
  }

  __device__ static void add_query_head(const Params& params, Shared& tiles, State& state, int64_t batch, int64_t head,
                                        const Matrix<Scalar>& key, const Matrix<Scalar>& value, int row0) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const auto query = head_matrix<Scalar>(base.query, batch, head, problem.len_q, problem.dim_qk);
    const auto grad_out = head_matrix<Scalar>(base.grad_out, batch, head, problem.len_q, problem.dim_v);
    const int64_t mask = mask_offset(problem, batch, head);
    const Acc* lse = static_cast<const Acc*>(base.lse) + row_statistics_offset(problem, batch, head);
    const Acc* delta = static_cast<const Acc*>(params.delta) + row_statistics_offset(problem, batch, head);
    const Acc* weight_scale =
        static_cast<const Acc*>(params.weight_scale) + row_statistics_offset(problem, batch, head);

    const int first = problem.is_causal ? row0 / Geometry::kBlockCols * Geometry::kBlockCols : 0;
    for (int col0 = first; col0 < query.rows; col0 += Geometry::kBlockCols) {
      Acc weights[kRows][kCols] = {};
      product_of_rows(tiles, key, row0, query, col0, weights);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const int col = col0 + thread_col() + kGrid * j;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int row = row0 + thread_row() * kRows + i;
          const Acc score = masked_score<Scalar>(problem, mask, col, row, weights[i][j]);
          const int inside = min(col, query.rows - 1);
          weights[i][j] = attention_weight(score, lse[inside]) * weight_scale[inside];
        }
      }
      store_weights(tiles, weights);
      if (base.grad_value.data != nullptr) {
        add_weighted_rows(tiles, grad_out, col0, state.grad_value);
      }
      if (base.grad_key.data == nullptr) {
        continue;
      }
      Acc grad_scores[kRows][kCols] = {};
      product_of_rows(tiles, value, row0, grad_out, col0, grad_scores);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const int col = col0 + thread_col() + kGrid * j;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          grad_scores[i][j] = tiles.weight(i, j) * (grad_scores[i][j] - delta[min(col, query.rows - 1)]);
        }
      }
      store_weights(tiles, grad_scores);
      add_weighted_rows(tiles, query, col0, state.grad_key);
    }
  }

  __device__ static void run(const Params& params, Shared& tiles) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const auto [batch, head_kv, row0] = block_position(problem.heads_kv, problem.len_k, Geometry::kBlockRows);
    const auto key = head_matrix<Scalar>(base.key, batch, head_kv, problem.len_k, problem.dim_qk);
    const auto value = head_matrix<Scalar>(base.value, batch, head_kv, problem.len_k, problem.dim_v);

    State state;
    const int64_t group = problem.heads_q / problem.heads_kv;
    for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
      add_query_head(params, tiles, state, batch, head, key, value, row0);
    }

    Acc scale[kRows];
    Acc one[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      scale[i] = static_cast<Acc>(problem.scale);
      one[i] = 1;
    }
    if (base.grad_key.data != nullptr) {
      store_outputs(state.grad_key, scale, head_data<Scalar>(base.grad_key, batch, head_kv), base.grad_key.strides[2],
                    row0, key.rows, key.cols);
    }
    if (base.grad_value.data != nullptr) {
      store_outputs(state.grad_value, one, head_data<Scalar>(base.grad_value, batch, head_kv),
                    base.grad_value.strides[2], row0, key.rows, value.cols);
    }
  }
};

}  // namespace ptk::cuda
