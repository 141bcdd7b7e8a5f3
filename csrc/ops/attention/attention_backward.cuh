// Attention backward on the CUDA cores: the equations of attention_backward_common.cuh, one block per tile of queries
// for grad_query, one block per tile of keys for grad_key and grad_value, walking over the queries of every query head
// that shares them. Not yet run on a GPU.
//
// Plan                                    threads  registers  shared of a block, at most
//   AttentionGradQuery                       256        255   35 KiB
//   AttentionGradKeyValue                    256        255   36 KiB
//   AttentionGradMask<ThreadScoreGradients>  256        168   35 KiB
#pragma once

#include "csrc/ops/attention/attention_backward_common.cuh"

namespace ptk::cuda {

template <typename Scalar, int HeadDim>
struct AttentionGradQuery {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  using Geometry = AttentionTile<Acc, HeadDim, 1>;
  static constexpr int kThreads = ptk::cuda::kThreads;
  static constexpr int kBlocksPerMultiprocessor = Geometry::kBlocksPerMultiprocessor;
  static constexpr int kRows = Geometry::kRows;
  static constexpr int kCols = Geometry::kCols;
  static constexpr int kBlockRows = Geometry::kBlockRows;
  static constexpr int kBlockCols = Geometry::kBlockCols;
  using Shared = Tiles<Acc, kRows, kCols>;
  using Tile = ThreadTile<Acc, kRows, kCols>;

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, kBlockRows);
  }

  // grad_s of one tile, before the cap's derivative, which goes to cap_slopes.
  __device__ static void score_gradients(const Params& params, Shared& tiles, const Sequence& sequence, int head,
                                         int row0, int col0, Tile& tile, Tile& cap_slopes) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const int head_kv = head / static_cast<int>(problem.heads_q / problem.heads_kv);
    const HeadScores<Scalar> scores(problem, sequence, head);
    const Dropout dropout(problem, sequence.batch, head);
    const auto statistics = [&](int i) { return row_statistics<Acc>(params, sequence, head, row0 + Tile::row(i)); };
    Tile weights;
    weights.clear();
    product_of_rows(tiles, query_matrix<Scalar>(base.query, sequence, head, problem.dim_qk), row0,
                    key_matrix<Scalar>(base.key, sequence, head_kv, problem.dim_qk), col0, weights);
    scores.template finish<false>(weights, row0, col0, &cap_slopes);
    make_weights<false>(scores, weights, statistics);
    store_weights(tiles, weights);  // read back below: they do not fit in registers beside the gradients
    tile.clear();
    product_of_rows(tiles, query_matrix<Scalar>(base.grad_out, sequence, head, problem.dim_v), row0,
                    key_matrix<Scalar>(base.value, sequence, head_kv, problem.dim_v), col0, tile);
    if (dropout.is_used()) {
      dropout.template draw<false, Tile>(row0, col0).apply(tile, dropout.template factor<Acc>());
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        weights.at(i, j) = tiles.weight(i, j);
      }
    }
    make_score_gradients<false>(weights, tile, statistics);
  }

  __device__ static void run(const Params& params, Shared& tiles) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const BlockPosition position = block_position(problem.heads_q, problem.len_q, kBlockRows);
    const Sequence sequence = sequence_of(problem, position.batch);
    const int row0 = position.row0;
    int head = static_cast<int>(position.head);
    if (row0 >= sequence.len_q) {
      return;
    }
    Acc grad[Geometry::kChunks][kRows][kQuad] = {};
    Acc slope_sum[kRows] = {};
    const Span keys = sequence.keys_of(row0, row0 + kBlockRows);
    for (int col0 = keys.begin / kBlockCols * kBlockCols; col0 < keys.end; col0 += kBlockCols) {
      Tile tile, cap_slopes;
      hide_origin(head);  // addresses that depend on it take registers from the gradients
      score_gradients(params, tiles, sequence, head, row0, col0, tile, cap_slopes);
      const HeadScores<Scalar> scores(problem, sequence, head);
      if (params.slope_sums != nullptr) {
        add_slopes(scores, tile, row0, col0, slope_sum);
      }
      if (scores.is_capped()) {
        multiply_entries(tile, cap_slopes);
      }
      if (base.grad_query.data != nullptr) {
        store_weights(tiles, tile);
        const int head_kv = head / static_cast<int>(problem.heads_q / problem.heads_kv);
        add_weighted_rows(tiles, key_matrix<Scalar>(base.key, sequence, head_kv, problem.dim_qk), col0, grad);
      }
    }
    if (params.slope_sums != nullptr) {
      store_slopes<Tile>(params, sequence, head, row0, slope_sum);
    }
    if (base.grad_query.data != nullptr) {
      Acc scale[kRows];
      for (Acc& factor : scale) {
        factor = static_cast<Acc>(problem.scale);
      }
      store_outputs(grad, scale, head_data<Scalar>(base.grad_query, position.batch, head, sequence.first_q),
                    base.grad_query.strides[2], row0, sequence.len_q, static_cast<int>(problem.dim_qk));
    }
  }
};

// What AttentionGradMask needs, on the CUDA cores.
template <typename Scalar>
struct ThreadScoreGradients {
  using Kernel = AttentionGradQuery<Scalar, kChunk>;
  using Tile = typename Kernel::Tile;
  using Shared = typename Kernel::Shared;
  static constexpr int kThreads = Kernel::kThreads;
  static constexpr int kBlocksPerMultiprocessor = 1;
  static constexpr int kBlockRows = Kernel::kBlockRows;
  static constexpr int kBlockCols = Kernel::kBlockCols;

  __device__ static int first_row() { return 0; }

  __device__ static bool tile(const AttentionBackwardParams& params, Shared& shared, int64_t batch, int64_t head,
                              int row0, int col0, Tile& tile) {
    const Sequence sequence = sequence_of(params.base.problem, batch);
    const Span keys = sequence.keys_of(row0, row0 + kBlockRows);
    if (col0 >= keys.end || col0 + kBlockCols <= keys.begin) {
      return false;
    }
    Tile cap_slopes;
    Kernel::score_gradients(params, shared, sequence, static_cast<int>(head), row0, col0, tile, cap_slopes);
    return true;
  }
};

// The score tile is transposed here: its rows are keys, its columns queries.
template <typename Scalar, int HeadDim>
struct AttentionGradKeyValue {
  using Params = AttentionBackwardParams;
  using Acc = AccumulatorOf<Scalar>;
  using Geometry = AttentionTile<Acc, HeadDim, 2>;
  static constexpr int kThreads = ptk::cuda::kThreads;
  static constexpr int kBlocksPerMultiprocessor = Geometry::kBlocksPerMultiprocessor;
  static constexpr int kRows = Geometry::kRows;
  static constexpr int kCols = Geometry::kCols;
  static constexpr int kChunks = Geometry::kChunks;
  struct Shared : Tiles<Acc, kRows, kCols> {
    BlockPlace place;
    QueryWalk walk;
  };
  using Tile = ThreadTile<Acc, kRows, kCols>;

  struct State {
    Acc grad_key[kChunks][kRows][kQuad] = {};
    Acc grad_value[kChunks][kRows][kQuad] = {};
  };

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_kv * tile_count(problem.len_k, Geometry::kBlockRows);
  }

  __device__ static void add_queries(const Params& params, Shared& tiles, State& state, int row0) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const Sequence& sequence = tiles.place.sequence;
    for (int index = 0; index < tiles.walk.tiles; ++index) {
      int head = tiles.walk.head(index), head_kv = static_cast<int>(tiles.place.position.head);
      const int col0 = tiles.walk.row(index);
      hide_origin(head);  // addresses that depend on them take registers from the gradients
      hide_origin(head_kv);
      const auto key = key_matrix<Scalar>(base.key, sequence, head_kv, problem.dim_qk);
      const auto value = key_matrix<Scalar>(base.value, sequence, head_kv, problem.dim_v);
      const auto query = query_matrix<Scalar>(base.query, sequence, head, problem.dim_qk);
      const auto grad_out = query_matrix<Scalar>(base.grad_out, sequence, head, problem.dim_v);
      const HeadScores<Scalar> scores(problem, sequence, head);
      const Dropout dropout(problem, sequence.batch, head);
      const auto statistics = [&](int j) { return row_statistics<Acc>(params, sequence, head, col0 + Tile::col(j)); };
      Tile weights, cap_slopes;
      weights.clear();
      product_of_rows(tiles, key, row0, query, col0, weights);
      scores.template finish<true>(weights, row0, col0, &cap_slopes);
      make_weights<true>(scores, weights, statistics);
      KeptEntries<Tile> kept;
      if (dropout.is_used()) {
        kept = dropout.template draw<true, Tile>(row0, col0);
      }
      if (base.grad_value.data != nullptr) {
        Tile dropped = weights;
        if (dropout.is_used()) {
          kept.apply(dropped, 1);
        }
        store_weights(tiles, dropped);
        add_weighted_rows(tiles, grad_out, col0, state.grad_value);
      }
      if (base.grad_key.data == nullptr) {
        continue;
      }
      Tile gradients;
      gradients.clear();
      product_of_rows(tiles, value, row0, grad_out, col0, gradients);
      if (dropout.is_used()) {
        kept.apply(gradients, dropout.template factor<Acc>());
      }
      make_score_gradients<true>(weights, gradients, statistics);
      if (scores.is_capped()) {
        multiply_entries(gradients, cap_slopes);
      }
      store_weights(tiles, gradients);
      add_weighted_rows(tiles, query, col0, state.grad_key);
    }
  }

  __device__ static void run(const Params& params, Shared& tiles) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    place_block(tiles.place, problem, problem.heads_kv, problem.len_k, Geometry::kBlockRows);
    const auto& [batch, head_kv, row0] = tiles.place.position;
    const Sequence& sequence = tiles.place.sequence;
    if (row0 >= sequence.len_k) {
      return;
    }
    if (threadIdx.x == 0) {
      tiles.walk = query_walk(problem, sequence, head_kv, row0, row0 + Geometry::kBlockRows, Geometry::kBlockCols);
    }
    __syncthreads();

    State state;
    add_queries(params, tiles, state, row0);

    Acc scale[kRows];
    Acc kept_factor[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      scale[i] = static_cast<Acc>(problem.scale);
      kept_factor[i] = Dropout(problem, batch, 0).template factor<Acc>();
    }
    if (base.grad_key.data != nullptr) {
      store_outputs(state.grad_key, scale, head_data<Scalar>(base.grad_key, batch, head_kv, sequence.first_k),
                    base.grad_key.strides[2], row0, sequence.len_k, static_cast<int>(problem.dim_qk));
    }
    if (base.grad_value.data != nullptr) {
      store_outputs(state.grad_value, kept_factor, head_data<Scalar>(base.grad_value, batch, head_kv, sequence.first_k),
                    base.grad_value.strides[2], row0, sequence.len_k, static_cast<int>(problem.dim_v));
    }
  }
};

}  // namespace ptk::cuda
