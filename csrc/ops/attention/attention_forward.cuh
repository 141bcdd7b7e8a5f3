// Attention forward on the CUDA cores.
//
//   out[i] = sum_j exp(s[i, j] - lse[i]) value[j]        lse[i] = log sum_j exp(s[i, j])
//
// One block takes a tile of query rows of one head and walks over the keys tile by tile, keeping per row the running
// maximum m, the running sum l of exp(s - m), and out * l; when m grows, l and out shrink by exp(old m - new m) (online
// softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; tiled attention: Dao et al. 2022, arXiv:2205.14135). Nothing
// of size len_q x len_k ever reaches global memory. 16-bit types compute in float, weights included.
#pragma once

#include "csrc/ops/attention/attention_tile.cuh"

namespace ptk::cuda {

template <typename Scalar, int HeadDim>
struct AttentionForward {
  using Params = ForwardParams;
  using Acc = AccumulatorOf<Scalar>;
  using Geometry = AttentionTile<Acc, HeadDim, 1>;
  static constexpr int kBlocksPerMultiprocessor = Geometry::kBlocksPerMultiprocessor;
  static constexpr int kRows = Geometry::kRows;
  static constexpr int kCols = Geometry::kCols;
  static constexpr int kChunks = Geometry::kChunks;
  using Shared = Tiles<Acc, kRows, kCols>;

  struct State {
    Acc out[kChunks][kRows][kQuad] = {};
    Acc max[kRows];
    Acc sum[kRows] = {};  // of this thread's columns only, until the end
  };

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, Geometry::kBlockRows);
  }

  // Turns scores into weights exp(s - m) and brings `state` to the new maximum.
  __device__ static void online_softmax(State& state, Acc (&scores)[kRows][kCols]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Acc highest = scores[i][0];
#pragma unroll
      for (int j = 1; j < kCols; ++j) {
        highest = std::fmax(highest, scores[i][j]);
      }
      highest = std::fmax(state.max[i], row_max(highest));
      const Acc shift = highest == -INFINITY ? Acc(0) : highest;  // no key yet: -inf - -inf would be NaN
      const Acc shrink = std::exp(state.max[i] - shift);
      state.max[i] = highest;
      state.sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        scores[i][j] = std::exp(scores[i][j] - shift);
        state.sum[i] += scores[i][j];
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          state.out[chunk][i][j] *= shrink;
        }
      }
    }
  }

  __device__ static void run(const Params& params, Shared& tiles) {
    const Problem& problem = params.problem;
    const auto [batch, head, row0] = block_position(problem.heads_q, problem.len_q, Geometry::kBlockRows);
    const int64_t head_kv = head / (problem.heads_q / problem.heads_kv);
    const auto query = head_matrix<Scalar>(params.query, batch, head, problem.len_q, problem.dim_qk);
    const auto key = head_matrix<Scalar>(params.key, batch, head_kv, problem.len_k, problem.dim_qk);
    const auto value = head_matrix<Scalar>(params.value, batch, head_kv, problem.len_k, problem.dim_v);
    const int64_t mask = mask_offset(problem, batch, head);

    State state;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      state.max[i] = -INFINITY;
    }
    const int keys = problem.is_causal ? min(key.rows, row0 + Geometry::kBlockRows) : key.rows;
    for (int col0 = 0; col0 < keys; col0 += Geometry::kBlockCols) {
      Acc scores[kRows][kCols] = {};
      product_of_rows(tiles, query, row0, key, col0, scores);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          scores[i][j] = masked_score<Scalar>(problem, mask, row0 + thread_row() * kRows + i,
                                              col0 + thread_col() + kGrid * j, scores[i][j]);
        }
      }
      online_softmax(state, scores);
      store_weights(tiles, scores);
      add_weighted_rows(tiles, value, col0, state.out);
    }
    write(params, state, batch, head, row0);
  }

  __device__ static void write(const Params& params, State& state, int64_t batch, int64_t head, int row0) {
    const Problem& problem = params.problem;
    const int len_q = static_cast<int>(problem.len_q);
    Acc* lse = static_cast<Acc*>(params.lse) + row_statistics_offset(problem, batch, head);
    Acc normalise[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Acc sum = row_sum(state.sum[i]);
      normalise[i] = sum == 0 ? Acc(0) : 1 / sum;
      const int row = row0 + thread_row() * kRows + i;
      if (thread_col() == 0 && row < len_q) {
        lse[row] = sum == 0 ? Acc(-INFINITY) : state.max[i] + std::log(sum);
      }
    }
    store_outputs(state.out, normalise, head_data<Scalar>(params.out, batch, head), params.out.strides[2], row0, len_q,
                  static_cast<int>(problem.dim_v));
  }
};

}  // namespace ptk::cuda
