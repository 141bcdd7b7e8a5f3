// Forward on the CPU for many rows of quantized input and signed bytes with one scale to a row, where bytes are
// multiplied in fours (vpdpbusd):
//
//   out^T[n, m] = scales[n] * s[m] * (sum over k of codes[n, k] * (x[m, k] + 128) - 128 * sum over k of codes[n, k])
//
//   layout     the weight is the product's A operand where it lies: nothing is decoded or copied. The input, the B
//              operand, is quantized and packed once for the whole call, as the unsigned operand of the instruction.
//   tiling     items of kRows x kColumns of out^T, sums in 32-bit integers over all of k, in steps whose panels of B
//              stay in L1. The sums of codes are found after each step, when they are in L2; the codes of the next step
//              are fetched while this one is multiplied.
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_direct_integer.h"

namespace ptk::PTK_ISA {

class TiledBytes {
  using T = s8u8;
  static constexpr int64_t kMr = GemmTraits<T>::kMr, kNr = GemmTraits<T>::kNr;
  static constexpr int64_t kRows = 128 / kMr * kMr, kColumns = 256, kDepth = 512;

public:
  // Rows must be whole words, since the kernels read them so; sums must fit 32 bits.
  static bool suits(const QuantizedForward& p) {
    return p.quantize_input && p.weight.format == CodeFormat::s8 && p.weight.groups() == 1 && !p.weight.zeros &&
           p.weight.k % 4 == 0 && p.weight.k <= 1 << 16 && p.input.dtype != DType::f64;
  }

  explicit TiledBytes(const QuantizedForward& p) : p_(p), w_(p.weight), columns_(padded_n<T>(p.m)) {}

  // False when memory ran out.
  bool run() {
    CallMemory memory;
    const int64_t packed = round_up(w_.k * columns_, 64);
    char* block = memory.allocate(packed + columns_ * sizeof(float));
    if (!block) return false;
    packed_ = reinterpret_cast<int8_t*>(block);
    input_scales_ = reinterpret_cast<float*>(block + packed);
    bool ok = true;
    auto each = [&](int64_t count, int64_t work, const auto& body) {
      for_items(count, work, [&](int64_t i) {
        if (!body(i)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      });
    };
    each(columns_ / kNr, p_.m * w_.k * 4, [&](int64_t panel) { return pack_panel(panel * kNr); });
    if (!ok) return false;
    const RowBlocks blocks(p_, kRows);
    const int64_t across = (p_.m + kColumns - 1) / kColumns;
    each(blocks.count() * across, p_.m * w_.n * w_.k,
         [&](int64_t i) { return item(blocks, i / across, i % across * kColumns); });
    return ok;
  }

private:
  // Sums are added, and a share of the rows' next codes fetched with every vector of columns.
  struct AddAndFetch {
    int32_t* sums;
    int64_t ld;
    const uint8_t* ahead;  // of row 0
    int64_t row_bytes, ahead_bytes, share;

    inline __attribute__((always_inline)) void operator()(int64_t row, int64_t column, Vec<int32_t> integers,
                                                          int64_t) const {
      constexpr int64_t lanes = kLanes<int32_t>;
      int32_t* p = sums + row * ld + column;
      store(p, load(p) + integers);
      const int64_t first = column / lanes * share;
      for (int64_t byte = first; byte < least(first + share, ahead_bytes); byte += 64)
        __builtin_prefetch(ahead + row * row_bytes + byte, 0, 2);
    }
  };

  int8_t* packed_panel(int64_t k0, int64_t depth, int64_t column) const {
    return packed_ + k0 * columns_ + column * depth;
  }

  bool pack_panel(int64_t m0) {
    const int64_t rows = least(kNr, p_.m - m0);
    Carver carver;
    carver.take<float>(w_.k + kLanes<float>);
    carver.take<int8_t>(kNr * w_.k);
    carver.next = static_cast<char*>(thread_scratch(carver.bytes()));
    if (!carver.next) return false;
    float* values = carver.take<float>(w_.k + kLanes<float>);
    int8_t* codes = carver.take<int8_t>(kNr * w_.k);
    for (int64_t j = 0; j < rows; ++j) {
      int8_t* row = codes + j * w_.k;
      input_scales_[m0 + j] = quantize_row(p_.input, m0 + j, w_.k, p_.input_scale, values, row);
      for (int64_t k = 0; k < w_.k; ++k) row[k] ^= -128;
    }
    for (int64_t k0 = 0; k0 < w_.k; k0 += kDepth) {
      const int64_t depth = least(kDepth, w_.k - k0);
      pack_b_panel<T>(codes + k0, 1, w_.k, depth, rows, packed_panel(k0, depth, m0), depth);
    }
    return true;
  }

  bool item(const RowBlocks& blocks, int64_t index, int64_t m0) const {
    const RowBlock block = blocks[index];
    const int64_t columns = least(kColumns, p_.m - m0), ld = round_up(columns, kNr), rows = block.rows();
    const int64_t sum_rows = round_up(kRows, 32) + kLanes<float>;
    int32_t* sums = static_cast<int32_t*>(thread_scratch(sum_rows * ld * sizeof(int32_t)));
    if (!sums) return false;
    std::memset(sums, 0, sum_rows * ld * sizeof(int32_t));
    // What this thread computes next: another part of the same columns, or the block after those of the other threads.
    const bool same = p_.m > kColumns;
    const RowBlock soon = blocks[least(index + (same ? 0 : num_threads()), blocks.count() - 1)];
    int32_t code_sums[kRows] = {};
    for (int64_t k0 = 0; k0 < w_.k; k0 += kDepth) {
      const int64_t depth = least(kDepth, w_.k - k0);
      const int8_t* b = packed_panel(k0, depth, m0);
      // The rows of a block are consecutive but for swiglu, whose partners are elsewhere.
      product(block.first, block.count, sums, columns, k0, depth, b, soon.first);
      if (block.partner)
        product(block.first + block.partner, block.count, sums + block.count * ld, columns, k0, depth, b,
                soon.first + block.partner);
      for (int64_t r = 0; r < rows; ++r) code_sums[r] += sum_codes(block.row(r), k0, depth);
    }
    float* results = reinterpret_cast<float*>(sums);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<int32_t> shift = broadcast(code_sums[r] * 128);
      const float scale = w_.scales[block.row(r)];
      for (int64_t c = r * ld; c < (r + 1) * ld; c += kLanes<float>)
        store(results + c, __builtin_convertvector(load(sums + c) - shift, Vec<float>) * scale);
    }
    Finish<float>(p_, block, results, ld, input_scales_).run(m0, columns);
    return true;
  }

  // `count` rows of the weight from `row` on; after the last step, those from `soon` on are next.
  void product(int64_t row, int64_t count, int32_t* sums, int64_t columns, int64_t k0, int64_t depth, const int8_t* b,
               int64_t soon) const {
    const bool last = k0 + depth == w_.k;
    const int64_t ld = round_up(columns, kNr), vectors = ld / kLanes<int32_t>;
    const int64_t bytes = last ? least(kDepth, w_.k) : least(kDepth, w_.k - k0 - depth);
    const AddAndFetch add{sums, ld,    w_.codes + (last ? soon * w_.k : row * w_.k + k0 + depth),
                          w_.k, bytes, round_up((bytes + vectors - 1) / vectors, 64)};
    gemm<T>(count, ld, depth, w_.codes + row * w_.k + k0, w_.k, b, depth * kNr, add);
  }

  int32_t sum_codes(int64_t row, int64_t k0, int64_t depth) const {
    const uint8_t* codes = w_.codes + row * w_.k + k0;
    Vec<int32_t> sum{};
    for (int64_t k = 0; k < depth; k += 64) {
      const Vec<uint8_t> v = DirectBytes::codes(codes + k, depth - k);  // 128 more, and 128 for what is past the end
      sum = dot_bytes(sum, v, broadcast(int8_t(1)));
    }
    return reduce_add<int32_t>(sum) - 128 * static_cast<int32_t>(round_up(depth, 64));
  }

  const QuantizedForward& p_;
  const QuantizedWeightView& w_;
  int64_t columns_;
  int8_t* packed_ = nullptr;
  float* input_scales_ = nullptr;
};

}  // namespace ptk::PTK_ISA
