// Attention forward on the tensor cores, from sm_80 on, for 16-bit types. Equations as in attention_forward.cuh.
// Not yet run on a GPU.
//
// A block takes kBlockRows query rows of one head; each of its four warps owns 16 * MTiles of them, with their softmax
// and outputs in registers. Weights go from the first product to the second in registers, rounded to Scalar. A tile of
// keys and one of values are in shared memory: values arrive while scores are computed, the next keys while the
// softmax and the second product are (FlashAttention-2's order: Dao 2023, arXiv:2307.08691).
//
// Head dims       rows  keys  shared of a block, two of which are on a multiprocessor
//   64             128    64   32 KiB
//   96              64    64   48 KiB
//   128             64    64   48 KiB
//   192/128         64    64   64 KiB
//   192             64    64   72 KiB
//   256             64    64   96 KiB
//
// Plan                                    threads  registers  shared of a block, at most
//   AttentionForwardSm80                     128        255   96 KiB
#pragma once

#include "csrc/cuda/mma_tile.cuh"
#include "csrc/ops/attention/attention_dropout.cuh"
#include "csrc/ops/attention/attention_outputs.cuh"
#include "csrc/ops/attention/attention_scores.cuh"

namespace ptk::cuda {

template <typename Scalar, int DimQk, int DimV>
struct AttentionForwardSm80 {
  using Params = ForwardParams;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kMTiles = DimQk <= 64 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kMTiles;
  static constexpr int kBlockRows = kWarps * kWarpRows;
  static constexpr int kBlockCols = 64;
  using Tile = MmaTile<kMTiles, kBlockCols / 8>;
  using Outputs = MmaTile<kMTiles, DimV / 8>;

  struct Shared {
    RowTile<Scalar, kBlockRows, DimQk> query;
    RowTile<Scalar, kBlockCols, DimQk> key;
    RowTile<Scalar, kBlockCols, DimV> value;
  };
  static_assert(sizeof(Shared) <= 96 << 10);

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, kBlockRows);
  }

  __device__ static void run(const Params& params, Shared& shared) {
    const Problem& problem = params.problem;
    const auto [batch, head, row0] = block_position(problem.heads_q, problem.len_q, kBlockRows);
    const Sequence sequence = sequence_of(problem, batch);
    if (row0 >= sequence.len_q) {
      return;
    }
    const int64_t head_kv = head / (problem.heads_q / problem.heads_kv);
    const auto query = query_matrix<Scalar>(params.query, sequence, head, problem.dim_qk);
    const auto key = key_matrix<Scalar>(params.key, sequence, head_kv, problem.dim_qk);
    const auto value = key_matrix<Scalar>(params.value, sequence, head_kv, problem.dim_v);
    const HeadScores<Scalar> scores(problem, sequence, head);
    const Dropout dropout(problem, batch, head);
    const int warp_row = warp_index() * kWarpRows;

    RowSoftmax<Tile> softmax;
    Outputs out;
    out.clear();
    const Span keys = sequence.keys_of(row0, row0 + kBlockRows);
    const int first = keys.begin / kBlockCols * kBlockCols;
    if (first < keys.end) {
      load_rows<kThreads>(shared.query, query, row0);
      load_rows<kThreads>(shared.key, key, first);
    }
    for (int col0 = first; col0 < keys.end; col0 += kBlockCols) {
      wait_copies<0>();
      __syncthreads();  // the keys are there, and the values of the last round are no longer read
      load_rows<kThreads>(shared.value, value, col0);
      Tile tile;
      tile.clear();
      product_of_rows(tile, shared.query, warp_row, shared.key);
      wait_copies<0>();
      __syncthreads();  // the values are there, and the keys are no longer read
      if (col0 + kBlockCols < keys.end) {
        load_rows<kThreads>(shared.key, key, col0 + kBlockCols);
      }
      scores.template finish<false>(tile, row0 + warp_row, col0);
      float shrink[Tile::kRows];
      softmax.update(scores, tile, shrink);
      shrink_rows(out, shrink);
      if (dropout.is_used()) {
        dropout.template draw<false, Tile>(row0 + warp_row, col0).apply(tile, 1);
      }
      add_weighted_rows(out, pack<Scalar>(tile), shared.value);
    }
    write_rows<Scalar>(params, sequence, head, row0 + warp_row, softmax, out, scores.unit(),
                       dropout.template factor<float>());
  }
};

}  // namespace ptk::cuda
