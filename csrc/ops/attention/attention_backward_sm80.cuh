// Attention backward on the tensor cores, from sm_80 on, for 16-bit types: the equations of
// attention_backward_common.cuh. Not yet run on a GPU.
//
// A block of four warps owns 64 rows of what it computes a gradient of, 16 to a warp, and keeps them in shared memory
// with their partner: (query, grad_out) for grad_query, (key, value) for grad_key and grad_value. The other pair
// streams past in tiles of kBlockCols rows, the next tile on its way while one is used where two fit. Rows times
// streamed rows gives scores (transposed for keys) and <grad_out, value>; both stay in registers, become gradients of
// scores there, and are the left operand of the products with the streamed rows as they are: nothing is transposed or
// stored.
//
// Head dims   streamed rows  stages  shared
//   64             64          2     50 KiB
//   96             32          2     65 KiB
//   128            32          2     65 KiB         grad_key and grad_value in launches of their own
//   192/128        32          2     81 KiB         the same
//   192            32          2     97 KiB         the same
//   256            32          1     97 KiB         the same
//
// Plan                                    threads  registers  shared of a block, at most
//   AttentionGradQuerySm80                   128        255   97 KiB
//   AttentionGradKeyValueSm80                128        255   97 KiB
//   AttentionGradMask<ScoreGradientsSm80>    128        255   97 KiB
#pragma once

#include "csrc/cuda/mma_tile.cuh"
#include "csrc/ops/attention/attention_backward_common.cuh"

namespace ptk::cuda {

template <typename Scalar, int DimQk, int DimV>
struct BackwardPlanSm80 {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpRows = 16;
  static constexpr int kBlockRows = kWarps * kWarpRows;
  static constexpr int kBlockCols = DimQk <= 64 ? 64 : 32;
  static constexpr int kSharedLimit = 98 << 10;  // what every GPU from sm_80 on can give to one block
  using Tile = MmaTile<1, kBlockCols / 8>;

  struct Resident {
    RowTile<Scalar, kBlockRows, DimQk> qk;
    RowTile<Scalar, kBlockRows, DimV> v;
  };
  struct Stage {
    RowTile<Scalar, kBlockCols, DimQk> qk;
    RowTile<Scalar, kBlockCols, DimV> v;
  };
  static constexpr int kStages = sizeof(Resident) + 2 * sizeof(Stage) < kSharedLimit ? 2 : 1;

  struct Shared {
    Resident resident;
    Stage stages[kStages];
    RowStatistics<float> statistics[kStages][kBlockCols];  // of streamed queries
    BlockPlace place;                                      // of kernels that compute gradients of keys
  };

  __device__ static int first_row() { return warp_index() * kWarpRows; }
};

template <typename Scalar, int DimQk, int DimV>
struct AttentionGradQuerySm80 : BackwardPlanSm80<Scalar, DimQk, DimV> {
  using Plan = BackwardPlanSm80<Scalar, DimQk, DimV>;
  using Params = AttentionBackwardParams;
  using Plan::kBlockCols;
  using Plan::kBlockRows;
  using Plan::kStages;
  using Plan::kThreads;
  using typename Plan::Shared;
  using typename Plan::Stage;
  using typename Plan::Tile;
  static constexpr int kBlocksPerMultiprocessor = 2;

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, kBlockRows);
  }

  __device__ static void load_resident(const Params& params, Shared& shared, const Sequence& sequence, int64_t head,
                                       int row0) {
    const BackwardParams& base = params.base;
    load_rows<kThreads>(shared.resident.qk, query_matrix<Scalar>(base.query, sequence, head, base.problem.dim_qk),
                        row0);
    load_rows<kThreads>(shared.resident.v, query_matrix<Scalar>(base.grad_out, sequence, head, base.problem.dim_v),
                        row0);
  }

  __device__ static void load_stage(const Params& params, Stage& stage, const Sequence& sequence, int64_t head,
                                    int col0) {
    const BackwardParams& base = params.base;
    const int64_t head_kv = head / (base.problem.heads_q / base.problem.heads_kv);
    load_rows<kThreads>(stage.qk, key_matrix<Scalar>(base.key, sequence, head_kv, base.problem.dim_qk), col0);
    load_rows<kThreads>(stage.v, key_matrix<Scalar>(base.value, sequence, head_kv, base.problem.dim_v), col0);
  }

  // grad_s of one tile, before the cap's derivative, which goes to cap_slopes. row0 is the warp's.
  template <typename Statistics>
  __device__ static void score_gradients(const HeadScores<Scalar>& scores, const Dropout& dropout, Shared& shared,
                                         Stage& stage, int row0, int col0, const Statistics& statistics, Tile& tile,
                                         Tile& cap_slopes) {
    Tile weights;
    weights.clear();
    product_of_rows(weights, shared.resident.qk, Plan::first_row(), stage.qk);
    scores.template finish<false>(weights, row0, col0, &cap_slopes);
    make_weights<false>(scores, weights, statistics);
    tile.clear();
    product_of_rows(tile, shared.resident.v, Plan::first_row(), stage.v);
    if (dropout.is_used()) {
      dropout.template draw<false, Tile>(row0, col0).apply(tile, dropout.template factor<float>());
    }
    make_score_gradients<false>(weights, tile, statistics);
  }

  __device__ static void run(const Params& params, Shared& shared) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    const auto [batch, head, row0] = block_position(problem.heads_q, problem.len_q, kBlockRows);
    const Sequence sequence = sequence_of(problem, batch);
    if (row0 >= sequence.len_q) {
      return;
    }
    const HeadScores<Scalar> scores(problem, sequence, head);
    const Dropout dropout(problem, batch, head);
    const int warp_row0 = row0 + Plan::first_row();
    RowStatistics<float> rows[Tile::kRows];
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      rows[i] = row_statistics<float>(params, sequence, head, warp_row0 + Tile::row(i));
    }

    MmaTile<1, DimQk / 8> grad;
    grad.clear();
    float slope_sum[Tile::kRows] = {};
    const Span keys = sequence.keys_of(row0, row0 + kBlockRows);
    const int first = keys.begin / kBlockCols * kBlockCols;
    const int tiles = keys.end > first ? static_cast<int>(tile_count(keys.end - first, kBlockCols)) : 0;
    if (tiles > 0) {
      load_resident(params, shared, sequence, head, row0);
      load_stage(params, shared.stages[0], sequence, head, first);
    }
    for (int index = 0; index < tiles; ++index) {
      const int col0 = first + index * kBlockCols;
      Stage& stage = shared.stages[index % kStages];
      wait_copies<0>();
      __syncthreads();  // the tile is there, and the last one is no longer read
      if (kStages == 2 && index + 1 < tiles) {
        load_stage(params, shared.stages[(index + 1) % kStages], sequence, head, col0 + kBlockCols);
      }
      Tile tile, cap_slopes;
      score_gradients(
          scores, dropout, shared, stage, warp_row0, col0, [&](int i) { return rows[i]; }, tile, cap_slopes);
      if (params.slope_sums != nullptr) {
        add_slopes(scores, tile, warp_row0, col0, slope_sum);
      }
      if (scores.is_capped()) {
        multiply_entries(tile, cap_slopes);
      }
      add_weighted_rows(grad, pack<Scalar>(tile), stage.qk);
      if (kStages == 1 && index + 1 < tiles) {
        __syncthreads();
        load_stage(params, stage, sequence, head, col0 + kBlockCols);
      }
    }
    if (params.slope_sums != nullptr) {
      store_slopes<Tile>(params, sequence, head, warp_row0, slope_sum);
    }
    if (base.grad_query.data != nullptr) {
      const float scale = static_cast<float>(problem.scale);
      store_outputs(grad, {scale, scale}, head_data<Scalar>(base.grad_query, batch, head, sequence.first_q),
                    base.grad_query.strides[2], warp_row0, sequence.len_q, static_cast<int>(problem.dim_qk));
    }
  }
};

// What AttentionGradMask needs, on the tensor cores.
template <typename Scalar, int DimQk, int DimV>
struct ScoreGradientsSm80 : BackwardPlanSm80<Scalar, DimQk, DimV> {
  using Plan = BackwardPlanSm80<Scalar, DimQk, DimV>;
  using Kernel = AttentionGradQuerySm80<Scalar, DimQk, DimV>;
  using typename Plan::Shared;
  using typename Plan::Tile;
  static constexpr int kBlocksPerMultiprocessor = 2;

  __device__ static bool tile(const AttentionBackwardParams& params, Shared& shared, int64_t batch, int64_t head,
                              int row0, int col0, Tile& tile) {
    const Problem& problem = params.base.problem;
    const Sequence sequence = sequence_of(problem, batch);
    const Span keys = sequence.keys_of(row0, row0 + Plan::kBlockRows);
    if (col0 >= keys.end || col0 + Plan::kBlockCols <= keys.begin) {
      return false;
    }
    __syncthreads();  // nobody still reads the last tiles
    Kernel::load_resident(params, shared, sequence, head, row0);
    Kernel::load_stage(params, shared.stages[0], sequence, head, col0);
    wait_copies<0>();
    __syncthreads();
    const int warp_row0 = row0 + Plan::first_row();
    Tile cap_slopes;
    Kernel::score_gradients(
        HeadScores<Scalar>(problem, sequence, head), Dropout(problem, batch, head), shared, shared.stages[0], warp_row0,
        col0, [&](int i) { return row_statistics<float>(params, sequence, head, warp_row0 + Tile::row(i)); }, tile,
        cap_slopes);
    return true;
  }
};

template <typename Scalar, int DimQk, int DimV>
using AttentionGradMaskSm80 = AttentionGradMask<ScoreGradientsSm80<Scalar, DimQk, DimV>>;

// Tiles of scores are transposed here: rows are keys, columns queries.
template <typename Scalar, int DimQk, int DimV, bool HasKey, bool HasValue>
struct AttentionGradKeyValueSm80 : BackwardPlanSm80<Scalar, DimQk, DimV> {
  using Plan = BackwardPlanSm80<Scalar, DimQk, DimV>;
  using Params = AttentionBackwardParams;
  using Plan::kBlockCols;
  using Plan::kBlockRows;
  using Plan::kStages;
  using Plan::kThreads;
  using typename Plan::Shared;
  using typename Plan::Stage;
  using typename Plan::Tile;
  static constexpr int kBlocksPerMultiprocessor = 2;

  struct Gradients {
    MmaTile<1, HasKey ? DimQk / 8 : 1> key;
    MmaTile<1, HasValue ? DimV / 8 : 1> value;
  };

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.base.problem;
    return problem.batch * problem.heads_kv * tile_count(problem.len_k, kBlockRows);
  }

  __device__ static void load_stage(const Params& params, Shared& shared, const Sequence& sequence,
                                    const QueryWalk& walk, int index) {
    const BackwardParams& base = params.base;
    const int64_t head = walk.head(index);
    const int row0 = walk.row(index);
    Stage& stage = shared.stages[index % kStages];
    load_rows<kThreads>(stage.qk, query_matrix<Scalar>(base.query, sequence, head, base.problem.dim_qk), row0);
    load_rows<kThreads>(stage.v, query_matrix<Scalar>(base.grad_out, sequence, head, base.problem.dim_v), row0);
    if (threadIdx.x < kBlockCols) {
      shared.statistics[index % kStages][threadIdx.x] =
          row_statistics<float>(params, sequence, head, row0 + static_cast<int>(threadIdx.x));
    }
  }

  __device__ static void add_tile(const Params& params, Shared& shared, const Sequence& sequence, int64_t head,
                                  int row0, int col0, int stage_index, Gradients& gradients) {
    const Problem& problem = params.base.problem;
    const HeadScores<Scalar> scores(problem, sequence, head);
    const Dropout dropout(problem, sequence.batch, head);
    const auto statistics = [&](int j) { return shared.statistics[stage_index][Tile::col(j)]; };
    KeptEntries<Tile> kept;
    if (dropout.is_used()) {
      kept = dropout.template draw<true, Tile>(row0, col0);
    }
    int first_row = Plan::first_row();
    Tile weights, cap_slopes;
    weights.clear();
    product_of_rows(weights, shared.resident.qk, first_row, shared.stages[stage_index].qk);
    scores.template finish<true>(weights, row0, col0, &cap_slopes);
    make_weights<true>(scores, weights, statistics);
    Tile dropped = weights;
    if (HasValue && dropout.is_used()) {
      kept.apply(dropped, 1);
    }
    const auto dropped_operand = pack<Scalar>(dropped);
    if (HasKey && scores.is_capped()) {
      multiply_entries(weights, cap_slopes);  // early, so that its registers are free for what follows
    }
    hide_origin(first_row);  // addresses of what follows are not computed before: they would take registers from it
    hide_origin(stage_index);
    if constexpr (HasValue) {
      add_weighted_rows(gradients.value, dropped_operand, shared.stages[stage_index].v);
    }
    if constexpr (HasKey) {
      Tile tile;
      tile.clear();
      product_of_rows(tile, shared.resident.v, first_row, shared.stages[stage_index].v);
      if (dropout.is_used()) {
        kept.apply(tile, dropout.template factor<float>());
      }
      make_score_gradients<true>(weights, tile, statistics);
      add_weighted_rows(gradients.key, pack<Scalar>(tile), shared.stages[stage_index].qk);
    }
  }

  __device__ static void run(const Params& params, Shared& shared) {
    const BackwardParams& base = params.base;
    const Problem& problem = base.problem;
    place_block(shared.place, problem, problem.heads_kv, problem.len_k, kBlockRows);
    const auto& [batch, head_kv, row0] = shared.place.position;
    const Sequence& sequence = shared.place.sequence;
    if (row0 >= sequence.len_k) {
      return;
    }
    const QueryWalk walk = query_walk(problem, sequence, head_kv, row0, row0 + kBlockRows, kBlockCols);
    if (walk.tiles > 0) {
      load_rows<kThreads>(shared.resident.qk, key_matrix<Scalar>(base.key, sequence, head_kv, problem.dim_qk), row0);
      load_rows<kThreads>(shared.resident.v, key_matrix<Scalar>(base.value, sequence, head_kv, problem.dim_v), row0);
      load_stage(params, shared, sequence, walk, 0);
    }

    Gradients gradients;
    gradients.key.clear();
    gradients.value.clear();
    const int warp_row0 = row0 + Plan::first_row();
    for (int index = 0; index < walk.tiles; ++index) {
      wait_copies<0>();
      __syncthreads();  // the tile is there, and the last one is no longer read
      if (kStages == 2 && index + 1 < walk.tiles) {
        load_stage(params, shared, sequence, walk, index + 1);
      }
      add_tile(params, shared, sequence, walk.head(index), warp_row0, walk.row(index), index % kStages, gradients);
      if (kStages == 1 && index + 1 < walk.tiles) {
        __syncthreads();
        load_stage(params, shared, sequence, walk, index + 1);
      }
    }
    if constexpr (HasKey) {
      if (base.grad_key.data != nullptr) {
        const float scale = static_cast<float>(problem.scale);
        store_outputs(gradients.key, {scale, scale}, head_data<Scalar>(base.grad_key, batch, head_kv, sequence.first_k),
                      base.grad_key.strides[2], warp_row0, sequence.len_k, static_cast<int>(problem.dim_qk));
      }
    }
    if constexpr (HasValue) {
      if (base.grad_value.data != nullptr) {
        const float factor = Dropout(problem, batch, 0).template factor<float>();
        store_outputs(gradients.value, {factor, factor},
                      head_data<Scalar>(base.grad_value, batch, head_kv, sequence.first_k), base.grad_value.strides[2],
                      warp_row0, sequence.len_k, static_cast<int>(problem.dim_v));
      }
    }
  }
};

// Both gradients of a key at once where they fit in registers.
template <typename Scalar, int DimQk, int DimV, typename Launcher>
void run_grad_key_value_sm80(const AttentionBackwardParams& params, const Launcher& launcher) {
  if constexpr (DimQk + DimV <= 192) {
    launcher.template run<AttentionGradKeyValueSm80<Scalar, DimQk, DimV, true, true>>(params);
  } else {
    if (params.base.grad_key.data != nullptr) {
      launcher.template run<AttentionGradKeyValueSm80<Scalar, DimQk, DimV, true, false>>(params);
    }
    if (params.base.grad_value.data != nullptr) {
      launcher.template run<AttentionGradKeyValueSm80<Scalar, DimQk, DimV, false, true>>(params);
    }
  }
}

}  // namespace ptk::cuda
