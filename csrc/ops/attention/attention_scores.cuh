// From products of queries and keys to scores and weights, for tiles of any layout (ThreadTile, MmaTile): cap, ALiBi,
// mask, band; online softmax. In a transposed tile rows are keys and columns queries.
//
// Without cap, ALiBi or mask, and with a positive scale, a tile keeps products, and `unit` is what a product has to be
// multiplied with to be a score. Otherwise it keeps scores, and `unit` is 1: masks come as large as the type goes, and
// only differences of such scores may be multiplied with anything.
#pragma once

#include "csrc/cuda/mma.cuh"
#include "csrc/ops/attention/attention_tile.cuh"

namespace ptk::cuda {

// Cap and band of one head's scores, and what is added to them.
template <typename Scalar>
class HeadScores {
public:
  using Acc = AccumulatorOf<Scalar>;

  __device__ HeadScores(const Problem& problem, const Sequence& sequence, int64_t head)
      : problem_(problem), sequence_(sequence),
        mask_(sequence.batch * problem.mask.strides[0] + head * problem.mask.strides[1]),
        scale_(static_cast<Acc>(problem.scale)), cap_(static_cast<Acc>(problem.softcap)),
        is_plain_(problem.softcap == 0 && problem.alibi.data == nullptr && problem.mask_kind == MaskKind::none &&
                  problem.scale > 0) {
    if (problem.alibi.data != nullptr) {
      slope_ = static_cast<const Acc*>(
          problem.alibi.data)[sequence.batch * problem.alibi.strides[0] + head * problem.alibi.strides[1]];
    }
  }

  __device__ bool is_plain() const { return is_plain_; }
  __device__ Acc unit() const { return is_plain_ ? scale_ : Acc(1); }
  __device__ bool is_capped() const { return cap_ != 0; }

  // What the gradient of a score has to be multiplied with to be that of slope.
  __device__ Acc distance(int query, int key) const {
    return -std::fabs(static_cast<Acc>(int64_t{query} + sequence_.diagonal - key));
  }

  // Products become what the head of this file says; -inf where a row does not see a key. The tile begins at row0 and
  // col0. cap_slopes, where given and where there is a cap, gets the cap's derivative.
  template <bool Transposed, typename Tile>
  __device__ void finish(Tile& tile, int row0, int col0, Tile* cap_slopes = nullptr) const {
    if (!is_plain_) {
      scale_and_cap(tile, cap_slopes);
      if (problem_.alibi.data != nullptr) {
        for_entries<Transposed>(tile, row0, col0, [&](Acc& score, int query, int key) {
          score = std::fma(slope_, distance(query, key), score);
        });
      }
      add_mask<Transposed>(tile, row0, col0);
    }
    const int rows = Transposed ? Tile::kTileCols : Tile::kTileRows,
              keys = Transposed ? Tile::kTileRows : Tile::kTileCols;
    const int query0 = Transposed ? col0 : row0, key0 = Transposed ? row0 : col0;
    if (!sequence_.sees_all(query0, query0 + rows, key0, key0 + keys)) {
      hide<Transposed>(tile, row0, col0);
    }
  }

private:
  template <bool Transposed, typename Tile, typename Body>
  __device__ void for_entries(Tile& tile, int row0, int col0, const Body& body) const {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kCols; ++j) {
        const int row = row0 + tile.row(i), col = col0 + tile.col(j);
        body(tile.at(i, j), Transposed ? col : row, Transposed ? row : col);
      }
    }
  }

  template <typename Tile>
  __device__ void scale_and_cap(Tile& tile, Tile* cap_slopes) const {
    const Acc inside = cap_ == 0 ? scale_ : divide_in_range(scale_, cap_);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kCols; ++j) {
        Acc score = inside * tile.at(i, j);
        if (cap_ != 0) {
          const Acc t = tile.tanh(score);
          score = cap_ * t;
          if (cap_slopes != nullptr) {
            cap_slopes->at(i, j) = 1 - t * t;
          }
        }
        tile.at(i, j) = score;
      }
    }
  }

  template <bool Transposed, typename Tile>
  __device__ void add_mask(Tile& tile, int row0, int col0) const {
    const int64_t row_stride = problem_.mask.strides[Transposed ? 3 : 2],
                  col_stride = problem_.mask.strides[Transposed ? 2 : 3];
    const int rows = Transposed ? sequence_.len_k : sequence_.len_q,
              cols = Transposed ? sequence_.len_q : sequence_.len_k;
    const auto add = [&](const auto* mask, const auto& combine) {
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        int col = col0 + tile.col(0);
        const auto* place = mask + mask_ + min(row0 + tile.row(i), rows - 1) * row_stride + col * col_stride;
#pragma unroll
        for (int j = 0; j < Tile::kCols; ++j) {
          if (col < cols) {
            tile.at(i, j) = combine(tile.at(i, j), *place);
          }
          const int step = tile.col(j + 1) - tile.col(j);
          col += step;
          place += step * col_stride;
          // One place at a time: those of a whole tile would take the registers of the products.
          hide_origin(place);
        }
      }
    };
    const auto sum = [](Acc score, auto bias) { return score + static_cast<Acc>(bias); };
    switch (problem_.mask_kind) {
    case MaskKind::boolean:
      return add(static_cast<const uint8_t*>(problem_.mask.data),
                 [](Acc score, uint8_t keep) { return keep ? score : static_cast<Acc>(-INFINITY); });
    case MaskKind::same_dtype:
      return add(static_cast<const Scalar*>(problem_.mask.data), sum);
    case MaskKind::f32:
      return add(static_cast<const float*>(problem_.mask.data), sum);
    case MaskKind::none:
      return;
    }
  }

  template <bool Transposed, typename Tile>
  __device__ void hide(Tile& tile, int row0, int col0) const {
    for_entries<Transposed>(tile, row0, col0, [&](Acc& score, int query, int key) {
      if (!sequence_.sees(query, key)) {
        score = -INFINITY;
      }
    });
  }

  const Problem& problem_;
  const Sequence& sequence_;
  int64_t mask_;
  Acc scale_, cap_, slope_ = 0;
  bool is_plain_;
};

// Largest score and sum of exp(score - largest) of the rows of a tile, kept while tiles of keys go by.
template <typename Tile>
struct RowSoftmax {
  using Acc = typename Tile::Acc;
  Acc max[Tile::kRows];
  Acc sum[Tile::kRows];  // of this thread's columns only, until finish_row

  __device__ RowSoftmax() {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0;
    }
  }

  // Scores become weights exp(score - max). What has been added up with earlier weights has to shrink.
  template <typename Scores>
  __device__ void update(const Scores& scores, Tile& tile, Acc (&shrink)[Tile::kRows]) {
    const Acc unit = scores.unit();
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      Acc highest = tile.at(i, 0);
#pragma unroll
      for (int j = 1; j < Tile::kCols; ++j) {
        highest = std::fmax(highest, tile.at(i, j));
      }
      highest = std::fmax(max[i], max_over_lanes<Tile::kLanesPerRow>(highest));
      const Acc shift = highest == -INFINITY ? Acc(0) : highest;  // no key yet: -inf - -inf would be NaN
      shrink[i] = Tile::exp(unit * (max[i] - shift));
      max[i] = highest;
      sum[i] *= shrink[i];
      if (scores.is_plain()) {
#pragma unroll
        for (int j = 0; j < Tile::kCols; ++j) {
          tile.at(i, j) = Tile::exp_of_product(tile.at(i, j), unit, unit * shift);
          sum[i] += tile.at(i, j);
        }
      } else {
#pragma unroll
        for (int j = 0; j < Tile::kCols; ++j) {
          tile.at(i, j) = Tile::exp(tile.at(i, j) - shift);
          sum[i] += tile.at(i, j);
        }
      }
    }
  }

  // What the row's output has to be multiplied with, and its lse.
  __device__ Acc finish_row(int i, Acc unit, const Acc* sink, Acc& lse) const {
    Acc total = sum_over_lanes<Tile::kLanesPerRow>(sum[i]);
    Acc shift = unit * max[i], factor = 1;
    if (sink != nullptr && !(*sink == -INFINITY)) {
      const Acc top = std::fmax(shift, *sink);
      factor = std::exp(shift - top);
      total = total * factor + std::exp(*sink - top);
      shift = top;
    }
    lse = total == 0 ? Acc(-INFINITY) : shift + std::log(total);
    return total == 0 ? Acc(0) : factor / total;
  }
};

// The sink of a head, or null.
template <typename Acc>
__device__ const Acc* head_sink(const Problem& problem, int64_t batch, int64_t head) {
  const HeadValues& sinks = problem.sinks;
  return sinks.data == nullptr
             ? nullptr
             : static_cast<const Acc*>(sinks.data) + batch * sinks.strides[0] + head * sinks.strides[1];
}

}  // namespace ptk::cuda
