// Forward on the CPU for few rows of input: every code is read once, in place, and decoded in registers.
//
//   dot products along k, several rows of the weight by up to four of the input at a time to share loads of both; a
//   group's scale is applied to lane sums of the group. The input lies in the order in which a kernel's lanes meet the
//   codes. More than four rows of input take turns at the same rows of the weight, which are in L1 by then.
//
// The kernels are in quantized_matmul_cpu_direct_float.h and quantized_matmul_cpu_direct_integer.h.
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_direct_float.h"
#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_direct_integer.h"

namespace ptk::PTK_ISA {

template <bool kIntegers>
class DirectProduct {
  static constexpr int64_t kRows = 64, kLd = 16;
  static constexpr int kTogether = 4;  // rows of the input that share what is loaded of the weight

public:
  // Beyond so many rows the tiled kernels, which decode once for all of them, are faster.
  static constexpr int64_t kMaxRows = PTK_ISA_LEVEL < 2 ? 8 : PTK_ISA_LEVEL > 2 && kIntegers ? 12 : 16;

  static bool suits(const QuantizedForward& p) {
    if (p.m > kMaxRows || p.weight.k == 0 || p.input.dtype == DType::f64 || p.quantize_input != kIntegers) return false;
    return !kIntegers || DirectBytes::suits(p.weight) || DirectNibblesByBytes::suits(p.weight);
  }

  explicit DirectProduct(const QuantizedForward& p) : p_(p), w_(p.weight) {}

  // False when memory ran out.
  bool run() {
    const int64_t ld = round_up(w_.k, 128), rows = p_.m == 1 ? 1 : round_up(p_.m, kTogether);
    auto lay_out = [&](Carver& carver) {
      return DirectInput{w_,
                         ld,
                         rows,
                         carver.take<float>((kIntegers ? 1 : rows) * ld),
                         carver.take<DirectCode>(kIntegers ? rows * ld : 0),
                         carver.take<DirectSum<kIntegers>>(spans() * rows * kLanes<float>)};
    };
    Carver carver;
    lay_out(carver);
    CallMemory memory;
    carver.next = memory.allocate(carver.bytes());
    if (!carver.next) return false;
    const DirectInput in = lay_out(carver);
    for (int64_t m = 0; m < rows; ++m) prepare(m, in);

    bool ok = true;
    const RowBlocks blocks(p_, kRows);
    for_items(blocks.count(), p_.m * w_.n * w_.k, [&](int64_t i) {
      if (!item(in, blocks[i])) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  using DirectInput = ptk::PTK_ISA::DirectInput<kIntegers>;

  // Columns whose lane sums a kernel takes together.
  int64_t span() const {
    const bool words = !kIntegers && DirectNibbles::suits(w_);
    return most(w_.group, kIntegers ? integer_block(w_) : words ? DirectNibbles::kBlock : 1);
  }
  int64_t spans() const { return (w_.k + span() - 1) / span(); }

  // Rows past the last repeat it, so that kernels need no sizes in between.
  void prepare(int64_t m, const DirectInput& in) {
    const int64_t row = least(m, p_.m - 1);
    if constexpr (kIntegers) {
      DirectCode* codes = in.codes + m * in.ld;
      input_scales_[m] = quantize_row(p_.input, row, w_.k, p_.input_scale, in.x, codes);
      std::memset(codes + w_.k, 0, (in.ld - w_.k) * sizeof(DirectCode));
      if (w_.format == CodeFormat::u4) DirectNibblesByBytes::arrange(codes, w_.k);
      sum_spans(codes, m, in, integer_factor(w_));
    } else {
      float* x = in.x + m * in.ld;
      const int64_t origin = row * p_.input.strides[0], stride = p_.input.strides[1];
      if (stride == 1) {
        for (int64_t k = 0; k < w_.k; k += kLanes<float>)
          store(x + k, load_any<float>(p_.input.data, p_.input.dtype, origin + k, w_.k - k));
      } else {
        for (int64_t k = 0; k < w_.k; ++k)
          x[k] = load_any_scalar<float>(p_.input.data, p_.input.dtype, origin + k * stride);
      }
      if (DirectNibbles::suits(w_)) DirectNibbles::arrange(x, w_.k);
      if (w_.zeros) sum_spans(x, m, in, 1.0f);
    }
  }

  // Sums of the arranged input over spans, in the lanes in which the kernels meet it.
  template <class U>
  void sum_spans(const U* x, int64_t m, const DirectInput& in, DirectSum<kIntegers> factor) const {
    const int64_t span = this->span(), spans = this->spans();
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t end = least((s + 1) * span, w_.k);
      Vec<DirectSum<kIntegers>> sum{};
      for (int64_t k = s * span; k < end; k += kLanes<U>) sum = add_lanes(sum, x + k, end - k);
      store(in.sums + (s * in.rows + m) * kLanes<float>, factor * sum);
    }
  }

  // R rows of the weight by M of the input from row m0 on.
  template <class Kernel, int M, int R>
  void square(const DirectInput& in, const DirectRows<R>& rows, int64_t m0, int64_t count, float* sums) const {
    Vec<float> total[R][M] = {};
    Kernel::template dots<M, R>(in, m0, rows, total);
    constexpr int lanes = kLanes<float>, padded = (R * M + lanes - 1) / lanes * lanes;
    float sum[padded];
    Vec<float> flat[padded] = {};
#pragma GCC unroll 16
    for (int i = 0; i < R * M; ++i) flat[i] = total[i / M][i % M];
    for (int i = 0; i < padded; i += lanes) store(sum + i, add_across(reinterpret_cast<Vec<float>(&)[lanes]>(flat[i])));
    for (int r = 0; r < R && r < count; ++r)
      for (int m = 0; m < M; ++m) sums[r * kLd + m0 + m] = sum[r * M + m];
  }

  template <class Kernel>
  void rows_of(const DirectInput& in, const RowBlock& block, float* sums) const {
    constexpr int kOne = 4, kMany = PTK_ISA_LEVEL >= 2 ? 4 : 2;
    if (p_.m == 1) {
      for (int64_t i = 0; i < block.rows(); i += kOne)
        square<Kernel, 1, kOne>(in, DirectRows<kOne>(w_, block, i), 0, block.rows() - i, sums + i * kLd);
      return;
    }
    for (int64_t i = 0; i < block.rows(); i += kMany) {
      const DirectRows<kMany> rows(w_, block, i);
      for (int64_t m = 0; m < p_.m; m += kTogether)
        square<Kernel, kTogether, kMany>(in, rows, m, block.rows() - i, sums + i * kLd);
    }
  }

  bool item(const DirectInput& in, const RowBlock& block) const {
    constexpr int64_t size = (kRows + kLanes<float>)*kLd;
    float* sums = static_cast<float*>(thread_scratch(size * sizeof(float)));
    if (!sums) return false;
    std::memset(sums, 0, size * sizeof(float));
    if constexpr (kIntegers) {
      w_.format == CodeFormat::s8 ? rows_of<DirectBytes>(in, block, sums)
                                  : rows_of<DirectNibblesByBytes>(in, block, sums);
    } else if (DirectNibbles::suits(w_)) {
      rows_of<DirectNibbles>(in, block, sums);
    } else {
      with_format(w_.format, [&](auto decoder) { rows_of<DirectFloat<decltype(decoder)>>(in, block, sums); });
    }
    Finish<float>(p_, block, sums, kLd, kIntegers ? input_scales_ : nullptr).run(0, p_.m);
    return true;
  }

  const QuantizedForward& p_;
  const QuantizedWeightView& w_;
  float input_scales_[kMaxRows] = {};
};

}  // namespace ptk::PTK_ISA
