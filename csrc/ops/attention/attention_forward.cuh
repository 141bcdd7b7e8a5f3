// Attention forward on the CUDA cores. Not yet run on a GPU.
//
//   out[i] = sum_j exp(s[i, j] - lse[i]) value[j]        lse[i] = log(exp(sink) + sum_j exp(s[i, j]))
//
// One block takes a tile of query rows of one head and walks over the keys tile by tile, keeping per row the running
// maximum m, the running sum l of exp(s - m), and out * l; when m grows, l and out shrink by exp(old m - new m) (online
// softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; tiled attention: Dao et al. 2022, arXiv:2205.14135). Nothing
// of size len_q x len_k ever reaches global memory. 16-bit types compute in float, weights included.
//
// Plan                                    threads  registers  shared of a block, at most
//   AttentionForward                         256        255   36 KiB
#pragma once

#include "csrc/ops/attention/attention_dropout.cuh"
#include "csrc/ops/attention/attention_scores.cuh"

namespace ptk::cuda {

template <typename Scalar, int HeadDim>
struct AttentionForward {
  using Params = ForwardParams;
  using Acc = AccumulatorOf<Scalar>;
  using Geometry = AttentionTile<Acc, HeadDim, 1>;
  static constexpr int kThreads = ptk::cuda::kThreads;
  static constexpr int kBlocksPerMultiprocessor = Geometry::kBlocksPerMultiprocessor;
  static constexpr int kRows = Geometry::kRows;
  static constexpr int kCols = Geometry::kCols;
  static constexpr int kChunks = Geometry::kChunks;
  struct Shared : Tiles<Acc, kRows, kCols> {
    BlockPlace place;
  };
  using Tile = ThreadTile<Acc, kRows, kCols>;

  static int64_t blocks(const Params& params) {
    const Problem& problem = params.problem;
    return problem.batch * problem.heads_q * tile_count(problem.len_q, Geometry::kBlockRows);
  }

  __device__ static void shrink_outputs(Acc (&out)[kChunks][kRows][kQuad], const Acc (&shrink)[kRows]) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          out[chunk][i][j] *= shrink[i];
        }
      }
    }
  }

  __device__ static void run(const Params& params, Shared& tiles) {
    const Problem& problem = params.problem;
    place_block(tiles.place, problem, problem.heads_q, problem.len_q, Geometry::kBlockRows);
    const auto& [batch, head, row0] = tiles.place.position;
    const Sequence& sequence = tiles.place.sequence;
    if (row0 >= sequence.len_q) {
      return;
    }
    const int64_t head_kv = head / (problem.heads_q / problem.heads_kv);
    const auto query = query_matrix<Scalar>(params.query, sequence, head, problem.dim_qk);
    const auto key = key_matrix<Scalar>(params.key, sequence, head_kv, problem.dim_qk);
    const auto value = key_matrix<Scalar>(params.value, sequence, head_kv, problem.dim_v);
    const HeadScores<Scalar> scores(problem, sequence, head);
    const Dropout dropout(problem, batch, head);

    RowSoftmax<Tile> softmax;
    Acc out[kChunks][kRows][kQuad] = {};
    const Span keys = sequence.keys_of(row0, row0 + Geometry::kBlockRows);
    const int first = keys.begin / Geometry::kBlockCols * Geometry::kBlockCols;
    for (int col0 = first; col0 < keys.end; col0 += Geometry::kBlockCols) {
      Tile tile;
      tile.clear();
      product_of_rows(tiles, query, row0, key, col0, tile);
      scores.template finish<false>(tile, row0, col0);
      Acc shrink[kRows];
      softmax.update(scores, tile, shrink);
      shrink_outputs(out, shrink);
      if (dropout.is_used()) {
        dropout.template draw<false, Tile>(row0, col0).apply(tile, 1);
      }
      store_weights(tiles, tile);
      add_weighted_rows(tiles, value, col0, out);
    }

    Acc* lse = static_cast<Acc*>(params.lse) + row_statistics_offset(problem, sequence, head);
    const Acc* sink = head_sink<Acc>(problem, batch, head);
    Acc normalise[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Acc row_lse;
      normalise[i] = dropout.template factor<Acc>() * softmax.finish_row(i, scores.unit(), sink, row_lse);
      const int row = row0 + Tile::row(i);
      if (thread_col() == 0 && row < sequence.len_q) {
        lse[row] = row_lse;
      }
    }
    store_outputs(out, normalise, head_data<Scalar>(params.out, batch, head, sequence.first_q), params.out.strides[2],
                  row0, sequence.len_q, static_cast<int>(problem.dim_v));
  }
};

}  // namespace ptk::cuda
