// Attention forward on Hopper (sm_90a), for 16-bit types. Equations as in attention_forward.cuh. Not yet run on a GPU.
//
// A block stays on its multiprocessor and takes tile after tile of query rows (attention_schedule.h). It has three
// warpgroups. One thread of the first keeps the copy engine busy with tiles of queries, keys and values, two of keys
// and of values in shared memory at a time. The other two own 64 rows each, with softmax, weights and outputs in
// registers:
//
//   turn        issue scores of tile j (Q K^T) and, behind it, outputs of tile j - 1 (P V): wgmma, asynchronous
//   meanwhile   when the scores are there: softmax of tile j, while P V still runs
//   then        shrink the outputs by what the maximum has grown; the new weights become a left operand in registers
//
// They issue in turns (named barriers), so that one's softmax meets the other's products. Source of the scheme: Shah et
// al. 2024, FlashAttention-3, arXiv:2407.08608.
//
// Barriers in shared memory: `full` counts the producer's one arrival and the bytes of a tile, `empty` one arrival of
// each of the eight consumer warps. A tile's turn t in its pair of slots is slot t % 2 and phase t / 2 % 2.
//
// What has to hold, and why it does:
//   - producer and consumers walk the same list: work_at depends on nothing but parameters and the block's index, so
//     every copy is waited for (none is under way when the block ends), and both consumers take equally many turns
//   - a new barrier's first phase is open: the producer's first wait, for the phase before it, returns at once
//   - a slot is empty once the product that reads it last is waited for: scores read queries and keys, outputs values.
//     A warp arrives for itself, after its own wait
//   - turns alternate: consumer 0 waits for what consumer 1 arrives with at the start and after each of its turns, and
//     the other way round; consumer 0 waits once more at the end, so that every arrival has its waiter
//   - registers: 128 threads of 24 and 256 of 240 are what 384 of 168 were launched with, or acquire_registers() would
//     wait for ever. test_cuda_binary.py holds the compiler to 168
//   - from the issue of a product to the wait for it nobody touches its registers: pin() keeps the compiler from it
//   - rows and columns past the end come from the copy engine as zeros, are hidden in scores and not written
//
// A tile holds 128 rows of one query head, or fewer of up to eight that share a key head, where that makes fewer tiles
// (choose_query_tile): a warp's 16 rows are always of one head.
//
// Head dims   keys  shared            registers (producer 24, consumers 240)
//   64        128    81 KiB           outputs 32, scores 64, weights 32
//   96        128   161 KiB           outputs 64, scores 64, weights 32; as wide as 128 but in the first product
//   128       128   161 KiB           outputs 64, scores 64, weights 32
//   192/128    64   129 KiB           outputs 64, scores 32, weights 16
//   192        64   145 KiB           outputs 96, scores 32, weights 16
//   256        64   193 KiB           outputs 128, scores 32, weights 16
//
// Plan                                    threads  registers  shared of a block, at most
//   AttentionForwardSm90                     384        168  193 KiB
#pragma once

#include "csrc/cuda/mma_tile.cuh"
#include "csrc/cuda/tma.cuh"
#include "csrc/cuda/wgmma.cuh"
#include "csrc/ops/attention/attention_dropout.cuh"
#include "csrc/ops/attention/attention_outputs.cuh"
#include "csrc/ops/attention/attention_schedule.h"
#include "csrc/ops/attention/attention_scores.cuh"

namespace ptk::cuda {

struct ForwardParamsSm90 {
  TensorMap query, key, value;
  ForwardParams base;
  Sequence sequence;  // every batch's but for the batch: constants cost no registers
  QueryTile tile;
  TileSchedule schedule;
  int tiles;  // of the schedule
  int multiprocessors;
};

template <typename Scalar, int DimQk, int DimV>
struct AttentionForwardSm90 {
  using Params = ForwardParamsSm90;
  static constexpr int kWarpgroup = 128;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kBlocksPerMultiprocessor = 1;
  static constexpr int kConsumerRows = 64;
  static constexpr int kBlockRows = kConsumers * kConsumerRows;
  static constexpr int kBlockCols = DimQk <= 128 ? 128 : 64;
  static constexpr int kSlots = 2;
  static constexpr int kTurnBarrier = 1;  // and the next
  using Tile = MmaTile<1, kBlockCols / 8>;
  using Outputs = MmaTile<1, DimV / 8>;
  using Weights = PackedTile<1, kBlockCols / 8>;

  struct Shared {
    RowTile<Scalar, kBlockRows, DimQk> query;
    RowTile<Scalar, kBlockCols, DimQk> key[kSlots];
    RowTile<Scalar, kBlockCols, DimV> value[kSlots];
    Barrier query_full, query_empty;
    Barrier key_full[kSlots], key_empty[kSlots], value_full[kSlots], value_empty[kSlots];
  };
  static_assert(sizeof(Shared) <= 227 << 10);

  // A tile of query rows, and the tiles of keys that it sees.
  struct Work {
    int batch, head;  // the first of its heads
    int row0, first_col, tiles;
  };

  // How many tiles have gone through the slots; may wrap around.
  struct Turn {
    uint32_t count = 0;
    __device__ int slot() const { return static_cast<int>(count % kSlots); }
    __device__ int phase() const { return static_cast<int>(count / kSlots % 2); }
  };

  static int64_t blocks(const Params& params) { return std::min(params.tiles, params.multiprocessors); }

  __device__ static Work work_at(const Params& params, int index) {
    const int packs = static_cast<int>(params.base.problem.heads_q) / params.tile.heads;
    const TileSchedule::Place place = params.schedule.at(index);
    Work work;
    work.batch = static_cast<int>(place.head / packs);
    work.head = static_cast<int>(place.head % packs) * params.tile.heads;
    work.row0 = static_cast<int>(place.tile) * params.tile.rows;
    const Span keys = params.sequence.keys_of(work.row0, work.row0 + params.tile.rows);
    work.first_col = keys.begin / kBlockCols * kBlockCols;
    work.tiles = keys.end > work.first_col ? (keys.end - work.first_col + kBlockCols - 1) / kBlockCols : 0;
    return work;
  }

  __device__ static void run(const Params& params, Shared& shared) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (threadIdx.x == 0) {
      init_barriers(shared);
    }
    __syncthreads();
    const int warpgroup =
        __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);  // known to be uniform
    if (warpgroup == 0) {
      release_registers<24>();
      if (threadIdx.x == 0) {
        produce(params, shared);
      }
    } else {
      acquire_registers<240>();
      consume(params, shared, warpgroup - 1);
    }
#else
    __trap();  // chosen for sm_90a alone
#endif
  }

  __device__ static void init_barriers(Shared& shared) {
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarpSize;
    shared.query_full.init(1);
    shared.query_empty.init(kConsumerWarps);
    for (int slot = 0; slot < kSlots; ++slot) {
      shared.key_full[slot].init(1);
      shared.value_full[slot].init(1);
      shared.key_empty[slot].init(kConsumerWarps);
      shared.value_empty[slot].init(kConsumerWarps);
    }
    publish_barriers();
  }

  // All panels of a tile, as soon as nobody reads what lies there.
  template <int Rows, int Dim>
  __device__ static void fetch(RowTile<Scalar, Rows, Dim>& tile, const TensorMap& map, Barrier& full, Barrier& empty,
                               int phase, int batch, int head, int row0) {
    empty.wait(phase ^ 1);
    full.arrive_expecting(static_cast<int>(sizeof(tile)));
#pragma unroll 1
    for (int panel = 0; panel < RowTile<Scalar, Rows, Dim>::kPanels; ++panel) {
      copy_tile(tile.data + panel * Rows * kPanelCols, map, full, batch, head, row0, panel * kPanelCols);
    }
  }

  __device__ static void produce(const Params& params, Shared& shared) {
    prefetch_tensor_map(params.query);
    prefetch_tensor_map(params.key);
    prefetch_tensor_map(params.value);
    const Problem& problem = params.base.problem;
    const int group = static_cast<int>(problem.heads_q / problem.heads_kv);
    Turn turn;
    int works = 0;
    for (int index = static_cast<int>(blockIdx.x); index < params.tiles; index += static_cast<int>(gridDim.x)) {
      const Work work = work_at(params, index);
      if (work.tiles == 0) {
        continue;
      }
      fetch(shared.query, params.query, shared.query_full, shared.query_empty, works++ % 2, work.batch, work.head,
            work.row0);
      for (int tile = 0; tile < work.tiles; ++tile, ++turn.count) {
        const int slot = turn.slot(), col0 = work.first_col + tile * kBlockCols;
        fetch(shared.key[slot], params.key, shared.key_full[slot], shared.key_empty[slot], turn.phase(), work.batch,
              work.head / group, col0);
        fetch(shared.value[slot], params.value, shared.value_full[slot], shared.value_empty[slot], turn.phase(),
              work.batch, work.head / group, col0);
      }
    }
  }

  // Scores of this consumer's rows with a tile of keys: issued, not waited for.
  __device__ static void issue_scores(Tile& tile, Shared& shared, int slot, int consumer) {
    hide_origin(consumer);  // sixteen descriptors would be kept from tile to tile
    const uint64_t query =
        operand_descriptor({shared_address(shared.query.data) + consumer * kConsumerRows * kPanelCols * 2, 0});
    const uint64_t key = operand_descriptor({shared_address(shared.key[slot].data), 0});
#pragma unroll
    for (int k = 0; k < DimQk; k += 16) {
      const int panel = k / kPanelCols, inside = k % kPanelCols * 2;
      multiply_rows_async<Scalar, kBlockCols, 0>(tile.tiles[0],
                                                 advance(query, panel * kBlockRows * kPanelCols * 2 + inside),
                                                 advance(key, panel * kBlockCols * kPanelCols * 2 + inside), k > 0);
    }
  }

  // outputs += weights * a tile of values: issued, not waited for.
  __device__ static void issue_outputs(Outputs& out, const Weights& weights, Shared& shared, int slot) {
    constexpr int kPanelBytes = kBlockCols * kPanelCols * 2;
    constexpr int kFirst = DimV < 128 ? 64 : 128, kRest = DimV - kFirst;
    const uint64_t value = operand_descriptor({shared_address(shared.value[slot].data), kPanelBytes});
#pragma unroll
    for (int k = 0; k < kBlockCols / 16; ++k) {
      const uint64_t rows = advance(value, k * 16 * kPanelCols * 2);
      multiply_weights_async<Scalar, kFirst, 0>(out.tiles[0], weights.pairs[0][k], rows, 1);
      if constexpr (kRest > 0) {
        multiply_weights_async<Scalar, kRest, kFirst / 8>(out.tiles[0], weights.pairs[0][k],
                                                          advance(rows, kFirst / kPanelCols * kPanelBytes), 1);
      }
    }
  }

  __device__ static void release(Barrier& empty) {
    if (lane_index() == 0) {
      empty.arrive();
    }
  }

  // The scores of tile j, and behind them the outputs of the tile before where there is one. A branch at run time
  // between the two would make the compiler wait for the first before the second.
  template <bool HasWeights>
  __device__ static void take_turn(Shared& shared, int consumer, const Turn& turn, Tile& tile, Outputs& out,
                                   Weights& weights) {
    shared.key_full[turn.slot()].wait(turn.phase());
    if constexpr (HasWeights) {
      const Turn last{turn.count - 1};
      shared.value_full[last.slot()].wait(last.phase());
    }
    sync_some(kTurnBarrier + consumer, kConsumers * kWarpgroup);
    pin(tile.tiles[0]);
    if constexpr (HasWeights) {
      pin(out.tiles[0]);
      pin(weights.pairs[0]);
    }
    fence_products();
    issue_scores(tile, shared, turn.slot(), consumer);
    commit_products();
    if constexpr (HasWeights) {
      issue_outputs(out, weights, shared, Turn{turn.count - 1}.slot());
      commit_products();
    }
    arrive_some(kTurnBarrier + 1 - consumer, kConsumers * kWarpgroup);
    wait_products<HasWeights ? 1 : 0>();
    pin(tile.tiles[0]);
    release(shared.key_empty[turn.slot()]);
  }

  // Scores become weights, still in the tile. What is known of the head is read for every tile: registers are scarce.
  __device__ static void soften(const Params& params, int batch, int head, RowSoftmax<Tile>& softmax, Tile& tile,
                                int row0, int col0, float (&shrink)[Tile::kRows]) {
    hide_origin(batch);
    hide_origin(head);
    Sequence sequence = params.sequence;
    sequence.batch = batch;
    const HeadScores<Scalar> scores(params.base.problem, sequence, head);
    scores.template finish<false>(tile, row0, col0);
    softmax.update(scores, tile, shrink);
    const Dropout dropout(params.base.problem, batch, head);
    if (dropout.is_used()) {
      dropout.template draw<false, Tile>(row0, col0).apply(tile, 1);
    }
  }

  __device__ static void wait_for_outputs(Shared& shared, const Turn& turn, Outputs& out) {
    wait_products<0>();
    pin(out.tiles[0]);
    release(shared.value_empty[turn.slot()]);
  }

  __device__ static void finish(const Params& params, int batch, int head, int row0, const RowSoftmax<Tile>& softmax,
                                Outputs& out) {
    const Problem& problem = params.base.problem;
    Sequence sequence = params.sequence;
    sequence.batch = batch;
    const HeadScores<Scalar> scores(problem, sequence, head);
    write_rows<Scalar>(params.base, sequence, head, row0, softmax, out, scores.unit(),
                       Dropout(problem, batch, head).template factor<float>());
  }

  __device__ static void consume(const Params& params, Shared& shared, int consumer) {
    const QueryTile::Place warp = params.tile.at(consumer * kConsumerRows + warp_index() % 4 * 16);
    if (consumer == 1) {
      arrive_some(kTurnBarrier, kConsumers * kWarpgroup);  // the other has the first turn
    }
    Turn turn;
    int works = 0;
    for (int index = static_cast<int>(blockIdx.x); index < params.tiles; index += static_cast<int>(gridDim.x)) {
      const Work work = work_at(params, index);
      const int head = work.head + warp.head, row0 = work.row0 + warp.row;
      RowSoftmax<Tile> softmax;
      Outputs out;
      out.clear();
      Tile tile;
      Weights weights;
      if (work.tiles > 0) {
        float shrink[Tile::kRows];
        shared.query_full.wait(works++ % 2);
        take_turn<false>(shared, consumer, turn, tile, out, weights);
        soften(params, work.batch, head, softmax, tile, row0, work.first_col, shrink);
        weights = pack<Scalar>(tile);
        for (int step = 1; step < work.tiles; ++step) {
          ++turn.count;
          take_turn<true>(shared, consumer, turn, tile, out, weights);
          soften(params, work.batch, head, softmax, tile, row0, work.first_col + step * kBlockCols, shrink);
          wait_for_outputs(shared, Turn{turn.count - 1}, out);
          shrink_rows(out, shrink);
          weights = pack<Scalar>(tile);
        }
        release(shared.query_empty);
        shared.value_full[turn.slot()].wait(turn.phase());
        pin(out.tiles[0]);
        pin(weights.pairs[0]);
        fence_products();
        issue_outputs(out, weights, shared, turn.slot());
        commit_products();
        wait_for_outputs(shared, turn, out);
        ++turn.count;
      }
      finish(params, work.batch, head, row0, softmax, out);
    }
    if (consumer == 0) {
      sync_some(kTurnBarrier, kConsumers * kWarpgroup);
    }
  }
};

}  // namespace ptk::cuda
