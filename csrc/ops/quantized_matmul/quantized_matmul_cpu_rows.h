// Rows of the weight, decoded one by one: lookups in a quantized embedding table.
#pragma once

#include "csrc/ops/quantized_matmul/quantized_matmul_cpu_forward.h"

namespace ptk::PTK_ISA {

template <class T>
static void decode_rows(const QuantizedRows& p) {
  const QuantizedWeightView& w = p.weight;
  with_format(w.format, [&](auto decoder) {
    for_items(p.count, p.count * w.k * 8,
              [&](int64_t i) { decode_row(w, decoder, p.indices[i], 0, w.k, static_cast<T*>(p.out) + i * w.k); });
  });
}

}  // namespace ptk::PTK_ISA
