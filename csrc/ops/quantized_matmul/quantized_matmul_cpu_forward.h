// Forward on the CPU for many rows of input, computed transposed:
//
//   out^T[n, m] = weight[n, :] input^T[:, m]
//
//   layout     the weight is the product's A operand, so its rows need no rearrangement: they are decoded in the order
//   of
//              k, in which codes lie in memory. The input is the B operand, packed once for the whole call; quantized
//              input is quantized on the way.
//   tiling     items of kRows x kColumns of out^T. Per item, depth in steps: kRows x depth of the weight are decoded
//   into
//              L2 and meet every panel of the input there. Integer steps end where a group of scales ends, so that a
//              step's exact sums take one scale on their way to the float sums.
//   threads    every item is computed by one thread in a fixed order: results do not depend on their number
#pragma once

#include "csrc/core/parallel.h"
#include "csrc/cpu/gemm/gemm.h"
#include "csrc/cpu/scratch.h"
#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_input.h"

namespace ptk::PTK_ISA {

// Multiply-adds below which a second thread costs more than it saves.
static constexpr int64_t kParallelWork = 1 << 17;

template <class Body>
PTK_INLINE void for_items(int64_t count, int64_t work, const Body& body) {
  if (work < kParallelWork) {
    for (int64_t i = 0; i < count; ++i) body(i);
  } else {
    parallel_items(count, body);
  }
}

// Memory of one call, shared by its threads.
struct CallMemory {
  void* block = nullptr;
  ~CallMemory() { __builtin_free(block); }
  char* allocate(int64_t bytes) {
    block = __builtin_malloc(bytes + 64);
    return block ? reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(block), 64)) : nullptr;
  }
};

// What integer sums of one step become: sums += scale[row] * (integers - (offset + zero[row]) * code_sums[column]).
template <class F>
struct FoldIntegers {
  static constexpr bool kLarge = true, kStrip = true;
  F* sums;  // rows of whole vectors
  int64_t ld;
  const float* scales;
  const float* zeros;
  int64_t stride;          // from a row's scale to the next row's
  float offset;            // of the integers multiplied from what the codes stand for
  const float* code_sums;  // of the input over the step, whole vectors; null where there is nothing to subtract
  const RowBlock* block;
  // The next step's codes of the same rows, fetched while this one is multiplied: `share` of `ahead_bytes` each time.
  const uint8_t* ahead;
  int64_t row_bytes, ahead_bytes, share;

  inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<int32_t> integers,
                                                        int64_t) const {
    const int64_t weight_row = block->row(row), index = weight_row * stride;
    const int64_t first = column / kLanes<int32_t> * share, end = least(first + share, ahead_bytes);
    for (int64_t byte = first; byte < end; byte += 64) __builtin_prefetch(ahead + weight_row * row_bytes + byte, 0, 2);
    const F shift = static_cast<F>(offset) + static_cast<F>(zeros ? zeros[index] : 0.0f);
    constexpr int parts = sizeof(F) / sizeof(int32_t), lanes = kLanes<F>;
    F* p = sums + row * ld + column;
    for (int part = 0; part < parts; ++part, p += lanes) {
      Vec<F> v;
      if constexpr (parts == 1) {
        v = __builtin_convertvector(integers, Vec<F>);
      } else {
        for (int i = 0; i < lanes; ++i) v[i] = integers[part * lanes + i];
      }
      if (code_sums) {
        Vec<F> sum;
        if constexpr (parts == 1) {
          sum = load(code_sums + column);
        } else {
          for (int i = 0; i < lanes; ++i) sum[i] = code_sums[column + part * lanes + i];
        }
        v -= shift * sum;
      }
      store(p, load(p) + static_cast<F>(scales[index]) * v);
    }
  }

  inline __attribute__((always_inline)) void strip(int rows, int64_t row, int64_t column, int64_t columns,
                                                   const int32_t* integers) const {
    constexpr int lanes = kLanes<int32_t>;
    const int halves = columns > lanes ? 2 : 1;
    if constexpr (std::is_same_v<F, double>) {
      for (int i = 0; i < rows; ++i, integers += 2 * lanes) {
        (*this)(row + i, column, load(integers), lanes);
        (*this)(row + i, column + lanes, load(integers + lanes), lanes);
      }
    } else {
      Vec<float> code_sum[2] = {};
      if (code_sums)
        for (int half = 0; half < halves; ++half) code_sum[half] = load(code_sums + column + half * lanes);
      const int64_t first = column / lanes * share, end = least(first + 2 * share, ahead_bytes);
      float* p = sums + row * ld + column;
      for (int i = 0; i < rows; ++i, integers += 2 * lanes, p += ld) {
        const int64_t weight_row = block->row(row + i), index = weight_row * stride;
        for (int64_t byte = first; byte < end; byte += 64)
          __builtin_prefetch(ahead + weight_row * row_bytes + byte, 0, 2);
        const float shift = zeros ? offset + zeros[index] : offset, scale = scales[index];
        for (int half = 0; half < halves; ++half) {
          const Vec<float> v =
              __builtin_convertvector(load(integers + half * lanes), Vec<float>) - shift * code_sum[half];
          store(p + half * lanes, load(p + half * lanes) + scale * v);
        }
      }
    }
  }
};

// T: the input's dtype; where the input is quantized, int8_t, uint8_t (signed codes plus 128) or u4, the weight's
// codes. F: what sums are kept in.
template <class T, class F>
class TiledProduct {
  static constexpr bool kNibbles = std::is_same_v<T, u4>, kIntegers = kNibbles || sizeof(T) == 1;
  // The integers multiplied, less what the codes stand for.
  static constexpr float kOffset = kNibbles ? 8.0f : std::is_same_v<T, uint8_t> ? 128.0f : 0.0f;
  using E = Element<T>;
  using EB = ElementB<T>;
  static constexpr int64_t kMr = GemmTraits<T>::kMr, kNr = GemmTraits<T>::kNr;
  static constexpr int64_t kRows = 128 / kMr * kMr, kColumns = 256, kDepth = kIntegers ? 512 : 256;
  static constexpr int64_t kLda = kDepth + 64 / sizeof(E);

public:
  explicit TiledProduct(const QuantizedForward& p) : p_(p), w_(p.weight) {
    const int64_t span = kIntegers ? w_.group : most(w_.k, 1);
    depth_ = least(kDepth, span);
    steps_per_span_ = (span + depth_ - 1) / depth_;
    steps_ = (w_.k / span) * steps_per_span_ + (w_.k % span + depth_ - 1) / depth_;
    span_ = span;
    columns_ = padded_n<T>(p.m);
    panel_stride_ = padded_k<T>(depth_) * kNr;
    step_stride_ = padded_k<T>(depth_) * columns_;
  }

  // False when memory ran out.
  bool run() {
    CallMemory memory;
    const int64_t packed = round_up(steps_ * step_stride_ * sizeof(EB), 64);
    const int64_t scales = kIntegers ? round_up(columns_, 16) : 0,
                  sums = kIntegers && (kOffset != 0.0f || w_.zeros) ? steps_ * columns_ : 0;
    char* block = memory.allocate(packed + (scales + sums) * sizeof(float));
    if (!block) return false;
    packed_ = reinterpret_cast<EB*>(block);
    if (kIntegers) input_scales_ = reinterpret_cast<float*>(block + packed);
    if (sums) code_sums_ = input_scales_ + scales;

    bool ok = true;
    auto each = [&](int64_t count, int64_t work, const auto& body) {
      for_items(count, work, [&](int64_t i) {
        if (!body(i)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      });
    };
    each(columns_ / kNr, p_.m * w_.k * 4, [&](int64_t panel) { return pack_panel(panel); });
    if (!ok) return false;
    const RowBlocks blocks(p_, kRows);
    const int64_t across = (p_.m + kColumns - 1) / kColumns;
    each(blocks.count() * across, p_.m * w_.n * w_.k,
         [&](int64_t i) { return item(blocks[i / across], i % across * kColumns); });
    return ok;
  }

private:
  struct Step {
    int64_t k0, k, group;
  };
  Step step(int64_t i) const {
    const int64_t span = i / steps_per_span_, k0 = span * span_ + i % steps_per_span_ * depth_;
    return {k0, least(depth_, least(w_.k, (span + 1) * span_) - k0), k0 / w_.group};
  }

  bool pack_panel(int64_t panel) {
    const int64_t m0 = panel * kNr, rows = least(kNr, p_.m - m0);
    if constexpr (kIntegers) {
      Carver carver;
      carver.take<float>(w_.k + kLanes<float>);
      carver.take<int8_t>(kNr * w_.k);
      carver.next = static_cast<char*>(thread_scratch(carver.bytes()));
      if (!carver.next) return false;
      float* values = carver.take<float>(w_.k + kLanes<float>);
      int8_t* codes = carver.take<int8_t>(kNr * w_.k);
      for (int64_t j = 0; j < rows; ++j)
        input_scales_[m0 + j] = quantize_row(p_.input, m0 + j, w_.k, p_.input_scale, values, codes + j * w_.k);
      for (int64_t i = 0; i < steps_; ++i) {
        const Step s = step(i);
        pack_codes(codes + s.k0, s.k, rows, packed_panel(i, panel));
        if (code_sums_) sum_codes(codes + s.k0, s.k, rows, code_sums_ + i * columns_ + m0);
      }
    } else {
      const auto* x = static_cast<const T*>(p_.input.data) + m0 * p_.input.strides[0];
      const int64_t stride = p_.input.strides[1];
      for (int64_t i = 0; i < steps_; ++i) {
        const Step s = step(i);
        pack_b_panel<T>(x + s.k0 * stride, stride, p_.input.strides[0], s.k, rows, packed_panel(i, panel),
                        padded_k<T>(s.k));
      }
    }
    return true;
  }

  EB* packed_panel(int64_t step, int64_t panel) const { return packed_ + step * step_stride_ + panel * panel_stride_; }

  // The engine's packing turns words of four codes in registers; pairs are moved one by one.
  void pack_codes(const int8_t* codes, int64_t k, int64_t rows, EB* dst) const {
    constexpr int64_t pack = GemmTraits<T>::kPack;
    if constexpr (pack == 4) return pack_b_panel<T>(codes, 1, w_.k, k, rows, dst, padded_k<T>(k));
    for (int64_t j = 0; j < kNr; ++j) {
      const int64_t whole = j < rows ? k / pack * pack : 0;
      for (int64_t i = 0; i < whole; i += pack) __builtin_memcpy(dst + i * kNr + j * pack, codes + j * w_.k + i, pack);
      for (int64_t i = whole; i < padded_k<T>(k); ++i)
        dst[i / pack * pack * kNr + j * pack + i % pack] = j < rows && i < k ? codes[j * w_.k + i] : 0;
    }
  }

  void sum_codes(const int8_t* codes, int64_t k, int64_t rows, float* sums) const {
    for (int64_t j = 0; j < kNr; ++j) {
      int32_t sum = 0;
      for (int64_t i = 0; j < rows && i < k; ++i) sum += codes[j * w_.k + i];
      sums[j] = static_cast<float>(sum);
    }
  }

  bool item(const RowBlock& block, int64_t m0) const {
    const int64_t columns = least(kColumns, p_.m - m0), ld = round_up(columns, kNr);
    const int64_t rows = block.rows(), sum_rows = round_up(rows, 32) + kLanes<F>;
    Carver carver;
    carver.take<E>(round_up(rows, 32) * kLda);
    carver.take<F>(sum_rows * ld);
    char* scratch = static_cast<char*>(thread_scratch(carver.bytes()));
    if (!scratch) return false;
    carver.next = scratch;
    E* a = carver.take<E>(round_up(rows, 32) * kLda);
    F* sums = carver.take<F>(sum_rows * ld);
    std::memset(sums, 0, sum_rows * ld * sizeof(F));
    TileScope tiles;
    for (int64_t i = 0; i < steps_; ++i) {
      const Step s = step(i);
      const EB* b = packed_panel(i, m0 / kNr);
      decode(block, s, a);
      if constexpr (kIntegers) {
        const float* zeros = w_.zeros ? w_.zeros + s.group : nullptr;
        const float* code_sums = code_sums_ ? code_sums_ + i * columns_ + m0 : nullptr;
        const bool last = i + 1 == steps_;
        const Step next = step(last ? i : i + 1);
        const int64_t bits = code_bits(w_.format), bytes = last ? 0 : next.k * bits / 8, vectors = ld / kLanes<int32_t>;
        const FoldIntegers<F> fold{sums,           ld,          w_.scales + s.group,
                                   zeros,          w_.groups(), kOffset,
                                   code_sums,      &block,      w_.codes + next.k0 * bits / 8,
                                   w_.row_bytes(), bytes,       round_up((bytes + vectors - 1) / vectors, 64)};
        gemm<T>(rows, columns, s.k, a, kLda, b, panel_stride_, fold);
      } else {
        gemm<T>(rows, columns, s.k, a, kLda, b, panel_stride_, AddSums<F>{sums, ld});
      }
    }
    Finish<F>(p_, block, sums, ld, input_scales_).run(m0, columns);
    return true;
  }

  void decode(const RowBlock& block, const Step& s, E* a) const {
    const int64_t padded = padded_k<T>(s.k);
    if constexpr (kIntegers) {
      for (int64_t r = 0; r < block.rows(); ++r) {
        const uint8_t* codes = w_.codes + block.row(r) * w_.row_bytes();
        prefetch(block, r + 1, s);
        if constexpr (kNibbles) {
          unpack_nibbles(codes + s.k0 / 2, s.k, padded, a + r * kLda);
        } else {
          copy_codes<T>(reinterpret_cast<const int8_t*>(codes) + s.k0, s.k, padded, a + r * kLda);
        }
      }
    } else {
      with_format(w_.format, [&](auto decoder) {
        for (int64_t r = 0; r < block.rows(); ++r) {
          prefetch(block, r + 1, s);
          decode_row(w_, decoder, block.row(r), s.k0, s.k, a + r * kLda);
          for (int64_t k = s.k; k < padded; ++k) a[r * kLda + k] = E{};
        }
      });
    }
  }

  // A row's part is short and the next row's is elsewhere: too short a run for a hardware prefetcher.
  void prefetch(const RowBlock& block, int64_t r, const Step& s) const {
    if (r >= block.rows()) return;
    const uint8_t* codes = w_.codes + block.row(r) * w_.row_bytes();
    for (int64_t byte = s.k0 * code_bits(w_.format) / 8; byte < (s.k0 + s.k) * code_bits(w_.format) / 8; byte += 64)
      __builtin_prefetch(codes + byte);
  }

  const QuantizedForward& p_;
  const QuantizedWeightView& w_;
  int64_t span_ = 0, depth_ = 0, steps_per_span_ = 0, steps_ = 0;
  int64_t columns_ = 0, panel_stride_ = 0, step_stride_ = 0;
  EB* packed_ = nullptr;
  float* input_scales_ = nullptr;
  float* code_sums_ = nullptr;
};

}  // namespace ptk::PTK_ISA
