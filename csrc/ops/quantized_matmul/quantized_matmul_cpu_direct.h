// Forward on the CPU for at most four rows of input: every code is read once, in place, and decoded in registers.
//
//   dot products along k, several rows of the weight at a time to share loads of the input; a group's scale is applied
//   to lane sums of the group. The input lies in the order in which a kernel's lanes meet the codes.
//
// Quantized input is multiplied as 16-bit integers, exactly.
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_forward.h"

namespace ptk::PTK_ISA {

// What the kernels of a call share. `x` holds kMaxRows rows of `ld` floats, or 16-bit codes.
struct DirectInput {
  static constexpr int kMaxRows = 4;
  const QuantizedWeightView& w;
  int64_t ld;
  const float* x;
  const int16_t* codes;
  const float* group_sums;  // [group][row]: lane sums of x, or sums of codes; null without zeros

  inline __attribute__((always_inline)) const float* group_sum(int64_t g, int m) const {
    return group_sums + (g * kMaxRows + m) * kLanes<float>;
  }
};

// R rows of the weight.
template <int R>
struct DirectRows {
  const uint8_t* codes[R];
  const float* scales[R];
  const float* zeros[R];
  int64_t ahead;  // from a row to the one that the next block has in its place

  // Rows are often as long as a page or longer, at whose end a hardware prefetcher stops.
  inline __attribute__((always_inline)) void prefetch(int r, int64_t byte) const {
    __builtin_prefetch(codes[r] + ahead + byte);
  }

  DirectRows(const QuantizedWeightView& w, const RowBlock& block, int64_t i) : ahead(R * w.row_bytes()) {
    for (int r = 0; r < R; ++r) {
      const int64_t row = block.row(least(i + r, block.rows() - 1));
      codes[r] = w.codes + row * w.row_bytes();
      scales[r] = w.scales + row * w.groups();
      zeros[r] = w.zeros ? w.zeros + row * w.groups() : nullptr;
    }
  }
};

// Any format, float input in the order of k.
template <class D>
struct DirectFloat {
  static constexpr int64_t kBlock = kLanes<float>;

  template <int M, int R>
  static void dots(const DirectInput& in, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    constexpr int64_t bits = D::kBits;
    const int64_t whole = w.k / kBlock * kBlock;
    for (int64_t g = 0, k = 0; k < w.k; ++g) {
      const int64_t end = least((g + 1) * w.group, whole);
      Vec<float> part[R][M] = {};
      for (; k < end; k += kBlock) {
        rows.prefetch(k / kBlock % R, k * bits / 8);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<float> value = D::values(rows.codes[r] + k * bits / 8);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) part[r][m] += value * load(in.x + m * in.ld + k);
        }
      }
      for (; k < least((g + 1) * w.group, w.k); ++k)
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < M; ++m)
            part[r][m][0] += static_cast<float>(D::value(rows.codes[r], k)) * in.x[m * in.ld + k];
      for (int r = 0; r < R; ++r) {
        for (int m = 0; m < M; ++m) {
          if (w.zeros) part[r][m] -= rows.zeros[r][g] * load(in.group_sum(g, m));
          total[r][m] += rows.scales[r][g] * part[r][m];
        }
      }
    }
  }
};

// 4-bit integers, a vector of 32-bit words at a time: word l of a block holds codes 8 l to 8 l + 7, so step j of a
// block meets inputs j, 8 + j, 16 + j, ... The scale of a lane is that of its word.
struct DirectNibbles {
  static constexpr int64_t kBlock = 8 * kLanes<float>;

  static bool suits(const QuantizedWeightView& w) {
    return w.format == CodeFormat::u4 && w.k % kBlock == 0 && (w.group % kBlock == 0 || kBlock % w.group == 0);
  }

  PTK_INLINE Vec<float> per_word(const float* groups, int64_t parts) {
    Vec<float> v = broadcast(groups[0]);
    for (int64_t i = 1; i < parts; ++i)
      v = iota<int32_t>() >= static_cast<int32_t>(i * kLanes<float> / parts) ? broadcast(groups[i]) : v;
    return v;
  }

  template <int M, int R>
  static void dots(const DirectInput& in, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    const int64_t span = most(w.group, kBlock), parts = span / w.group;
    for (int64_t k = 0; k < w.k;) {
      const int64_t g = k / w.group, end = least(k + span, w.k);
      Vec<float> part[R][M] = {};
      for (; k < end; k += kBlock) {
        Vec<uint32_t> words[R];
        for (int r = 0; r < R; ++r) {
          rows.prefetch(r, k / 2);
          words[r] = load(reinterpret_cast<const uint32_t*>(rows.codes[r] + k / 2)) ^ 0x88888888u;
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          Vec<float> x[M];
          for (int m = 0; m < M; ++m) x[m] = load(in.x + m * in.ld + k + j * kLanes<float>);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const Vec<int32_t> code = bit_cast<Vec<int32_t>>(words[r] << (28 - 4 * j)) >> 28;
            const Vec<float> value = __builtin_convertvector(code, Vec<float>);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) part[r][m] += value * x[m];
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        const Vec<float> scale = per_word(rows.scales[r] + g, parts);
        for (int m = 0; m < M; ++m) {
          if (w.zeros) {
            // Lane sums of the span lie where those of its first group would.
            part[r][m] -= per_word(rows.zeros[r] + g, parts) * load(in.group_sum(g, m));
          }
          total[r][m] += scale * part[r][m];
        }
      }
    }
  }
};

// Signed bytes by quantized input.
struct DirectBytes {
  static constexpr int64_t kBlock = kLanes<int16_t>;

  static bool suits(const QuantizedWeightView& w) {
    return w.format == CodeFormat::s8 && (w.group % kBlock == 0 || w.groups() == 1);
  }

  template <int M, int R>
  static void dots(const DirectInput& in, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    for (int64_t g = 0, k = 0; k < w.k; ++g) {
      const int64_t end = least((g + 1) * w.group, w.k);
      Vec<int32_t> part[R][M] = {};
      for (; k + kBlock <= end; k += kBlock) {
        rows.prefetch(k / kBlock % R, k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<int16_t> code = detail::load_widened(reinterpret_cast<const int8_t*>(rows.codes[r]) + k);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) part[r][m] += detail::multiply_add_pairs(code, load(in.codes + m * in.ld + k));
        }
      }
      for (; k < end; ++k)
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < M; ++m) part[r][m][0] += static_cast<int8_t>(rows.codes[r][k]) * in.codes[m * in.ld + k];
      fold<M, R>(in, rows, g, part, total);
    }
  }

  template <int M, int R>
  PTK_INLINE void fold(const DirectInput& in, const DirectRows<R>& rows, int64_t g, Vec<int32_t> (&part)[R][M],
                       Vec<float> (&total)[R][M]) {
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) {
        Vec<float> sum = __builtin_convertvector(part[r][m], Vec<float>);
        if (in.w.zeros) sum -= rows.zeros[r][g] * load(in.group_sum(g, m));
        total[r][m] += rows.scales[r][g] * sum;
      }
    }
  }
};

// 4-bit integers by quantized input: the low halves of a block's bytes meet its even inputs, the high halves its odd
// ones.
struct DirectNibblesByBytes {
  static constexpr int64_t kBlock = 2 * kLanes<int16_t>;

  static bool suits(const QuantizedWeightView& w) {
    return w.format == CodeFormat::u4 && w.k % kBlock == 0 && w.group % kBlock == 0;
  }

  template <int M, int R>
  static void dots(const DirectInput& in, const DirectRows<R>& rows, Vec<float> (&total)[R][M]) {
    const QuantizedWeightView& w = in.w;
    for (int64_t g = 0, k = 0; k < w.k; ++g) {
      const int64_t end = least((g + 1) * w.group, w.k);
      Vec<int32_t> part[R][M] = {};
      for (; k < end; k += kBlock) {
        rows.prefetch(k / kBlock % R, k / 2);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<int16_t> bytes = detail::load_widened(reinterpret_cast<const int8_t*>(rows.codes[r]) + k / 2);
          const Vec<int16_t> low = (bytes & 15) - 8, high = (bytes >> 4 & 15) - 8;
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const int16_t* x = in.codes + m * in.ld + k;
            part[r][m] +=
                detail::multiply_add_pairs(low, load(x)) + detail::multiply_add_pairs(high, load(x + kLanes<int16_t>));
          }
        }
      }
      DirectBytes::fold<M, R>(in, rows, g, part, total);
    }
  }
};

class DirectForward {
  static constexpr int64_t kRows = 64, kLd = 16;

public:
  static bool suits(const QuantizedForward& p) {
    if (p.m > DirectInput::kMaxRows || p.weight.k == 0 || p.input.dtype == DType::f64) return false;
    return !p.quantize_input || DirectBytes::suits(p.weight) || DirectNibblesByBytes::suits(p.weight);
  }

  explicit DirectForward(const QuantizedForward& p) : p_(p), w_(p.weight) {}

  // False when memory ran out.
  bool run() {
    CallMemory memory;
    const int64_t ld = round_up(w_.k, 64), rows = DirectInput::kMaxRows;
    const int64_t sums = w_.zeros ? w_.groups() * rows * kLanes<float> : 0;
    char* block =
        memory.allocate(ld * (rows * (sizeof(float) + sizeof(int16_t)) + sizeof(float)) + sums * sizeof(float));
    if (!block) return false;
    auto* x = reinterpret_cast<float*>(block);
    auto* codes = reinterpret_cast<int16_t*>(x + (rows + 1) * ld);
    auto* group_sums = sums ? reinterpret_cast<float*>(codes + rows * ld) : nullptr;
    prepare(x, codes, ld, group_sums);
    const DirectInput in{w_, ld, x, codes, group_sums};

    bool ok = true;
    const RowBlocks blocks(p_, kRows);
    for_items(blocks.count(), p_.m * w_.n * w_.k, [&](int64_t i) {
      if (!item(in, blocks[i])) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  // Rows past the last repeat it, so that kernels need no sizes in between.
  void prepare(float* x, int16_t* codes, int64_t ld, float* group_sums) {
    float* values = x + DirectInput::kMaxRows * ld;
    std::memset(input_scales_, 0, sizeof input_scales_);
    for (int64_t m = 0; m < DirectInput::kMaxRows; ++m) {
      const int64_t row = least(m, p_.m - 1);
      if (p_.quantize_input) {
        input_scales_[m] = quantize_row(p_.input, row, w_.k, p_.input_scale, x + m * ld, codes + m * ld);
        if (w_.format == CodeFormat::u4)
          rearrange(codes + m * ld, reinterpret_cast<int16_t*>(values), kLanes<int16_t>, 2);
      } else {
        for (int64_t k = 0; k < w_.k; ++k)
          x[m * ld + k] = load_any_scalar<float>(p_.input.data, p_.input.dtype,
                                                 row * p_.input.strides[0] + k * p_.input.strides[1]);
        if (DirectNibbles::suits(w_)) rearrange(x + m * ld, values, kLanes<float>, 8);
      }
      if (group_sums) sum_groups(m, x + m * ld, codes + m * ld, group_sums);
    }
  }

  // In every block of lanes * steps: element lane * steps + step moves to step * lanes + lane.
  template <class U>
  void rearrange(U* row, U* block, int64_t lanes, int64_t steps) const {
    for (int64_t k = 0; k < w_.k; k += lanes * steps) {
      for (int64_t step = 0; step < steps; ++step)
        for (int64_t lane = 0; lane < lanes; ++lane) block[step * lanes + lane] = row[k + lane * steps + step];
      std::memcpy(row + k, block, lanes * steps * sizeof(U));
    }
  }

  // Lane sums, in the lanes in which the kernels meet the input.
  void sum_groups(int64_t m, const float* x, const int16_t* codes, float* group_sums) const {
    const bool words = !p_.quantize_input && DirectNibbles::suits(w_);
    const int64_t span = words ? most(w_.group, DirectNibbles::kBlock) : w_.group;
    for (int64_t k0 = 0; k0 < w_.k; k0 += span) {
      float lane[kLanes<float>] = {};
      for (int64_t k = k0; k < least(k0 + span, w_.k); ++k)
        lane[(k - k0) % kLanes<float>] += p_.quantize_input ? codes[k] : x[k];
      std::memcpy(group_sums + (k0 / w_.group * DirectInput::kMaxRows + m) * kLanes<float>, lane, sizeof lane);
    }
  }

  template <class Kernel, int M, int R>
  void rows_of(const DirectInput& in, const RowBlock& block, float* sums) const {
    for (int64_t i = 0; i < block.rows(); i += R) {
      Vec<float> total[R][M] = {};
      Kernel::template dots<M, R>(in, DirectRows<R>(w_, block, i), total);
      for (int r = 0; r < R && i + r < block.rows(); ++r)
        for (int m = 0; m < M; ++m) sums[(i + r) * kLd + m] = reduce_add<float>(total[r][m]);
    }
  }

  template <class Kernel>
  void rows_of(const DirectInput& in, const RowBlock& block, float* sums) const {
    if (p_.m == 1) return rows_of<Kernel, 1, 4>(in, block, sums);
    rows_of<Kernel, DirectInput::kMaxRows, 2>(in, block, sums);
  }

  bool item(const DirectInput& in, const RowBlock& block) const {
    constexpr int64_t size = (kRows + kLanes<float>)*kLd;
    float* sums = static_cast<float*>(thread_scratch(size * sizeof(float)));
    if (!sums) return false;
    std::memset(sums, 0, size * sizeof(float));
    if (p_.quantize_input) {
      w_.format == CodeFormat::s8 ? rows_of<DirectBytes>(in, block, sums)
                                  : rows_of<DirectNibblesByBytes>(in, block, sums);
    } else if (DirectNibbles::suits(w_)) {
      rows_of<DirectNibbles>(in, block, sums);
    } else {
      with_format(w_.format, [&](auto decoder) { rows_of<DirectFloat<decltype(decoder)>>(in, block, sums); });
    }
    Finish<float>(p_, block, sums, kLd, p_.quantize_input ? input_scales_ : nullptr).run(0, p_.m);
    return true;
  }

  const QuantizedForward& p_;
  const QuantizedWeightView& w_;
  float input_scales_[DirectInput::kMaxRows];
};

}  // namespace ptk::PTK_ISA
