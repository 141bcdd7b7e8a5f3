// Gradient of the input on the CPU, from the codes that the forward read:
//
//   grad_input[m, k] = sum over n of grad_out[m, n] * weight[n, k]
//
//   tiling     items of kRows x kColumns of grad_input, depth (n) in steps of kDepth: a kDepth x kColumns piece of the
//              weight is decoded, packed, and used for kRows rows. No more of it than that ever exists decoded.
//   threads    as in the forward
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_forward.h"

namespace ptk::PTK_ISA {

template <class T>
class TiledInputGradient {
  using E = Element<T>;
  using F = Acc<T>;
  static constexpr int64_t kRows = 256, kColumns = 128, kDepth = 128;
  static constexpr int64_t kLda = kDepth + 64 / sizeof(E);
  static constexpr int64_t kPanelStride = padded_k<T>(kDepth) * GemmTraits<T>::kNr;

public:
  explicit TiledInputGradient(const QuantizedBackward& p) : p_(p), w_(p.weight) {}

  // False when memory ran out.
  bool run() const {
    bool ok = true;
    const int64_t across = (w_.k + kColumns - 1) / kColumns, down = (p_.m + kRows - 1) / kRows;
    for_items(across * down, p_.m * w_.n * w_.k, [&](int64_t i) {
      if (!item(i / across * kRows, i % across * kColumns)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    });
    return ok;
  }

private:
  struct Pieces {
    E *a, *decoded, *b;
    F* sums;
  };
  static Pieces lay_out(Carver& carver, int64_t rows) {
    return {carver.take<E>(round_up(rows, 32) * kLda), carver.take<E>(kDepth * kColumns),
            carver.take<E>(kPanelStride * (kColumns / GemmTraits<T>::kNr)), carver.take<F>(rows * kColumns)};
  }

  bool item(int64_t m0, int64_t k0) const {
    const int64_t rows = least(kRows, p_.m - m0), columns = least(kColumns, w_.k - k0);
    Carver carver;
    lay_out(carver, rows);
    void* scratch = thread_scratch(carver.bytes());
    if (!scratch) return false;
    carver.next = static_cast<char*>(scratch);
    const Pieces piece = lay_out(carver, rows);
    std::memset(piece.sums, 0, rows * kColumns * sizeof(F));
    TileScope tiles;
    const auto* grad = static_cast<const T*>(p_.grad_out.data) + m0 * p_.grad_out.strides[0];
    for (int64_t n0 = 0; n0 < w_.n; n0 += kDepth) {
      const int64_t depth = least(kDepth, w_.n - n0);
      pack_a<T>(grad + n0 * p_.grad_out.strides[1], p_.grad_out.strides[0], p_.grad_out.strides[1], rows, depth,
                piece.a, kLda);
      with_format(w_.format, [&](auto decoder) {
        for (int64_t n = 0; n < depth; ++n) decode_row(w_, decoder, n0 + n, k0, columns, piece.decoded + n * kColumns);
      });
      for (int64_t c = 0; c < columns; c += GemmTraits<T>::kNr)
        pack_b_panel<ElementOfB>(piece.decoded + c, kColumns, 1, depth, least(GemmTraits<T>::kNr, columns - c),
                                 piece.b + c / GemmTraits<T>::kNr * kPanelStride, padded_k<T>(depth));
      gemm<T>(rows, columns, depth, piece.a, kLda, piece.b, kPanelStride, AddSums<F>{piece.sums, kColumns});
    }
    auto* out = static_cast<T*>(p_.grad_input) + m0 * w_.k + k0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes<F>)
        store_as_partial(out + r * w_.k + c, load(piece.sums + r * kColumns + c), columns - c);
    return true;
  }

  // The decoded weight is in the element type already.
  using ElementOfB = E;

  const QuantizedBackward& p_;
  const QuantizedWeightView& w_;
};

}  // namespace ptk::PTK_ISA
