#pragma once

#include <cstddef>
#include <cstdint>

namespace ptk {

enum class DType : uint8_t { f64, f32, bf16, f16 };

constexpr size_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

constexpr const char* dtype_name(DType dtype) {
  constexpr const char* names[] = {"float64", "float32", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

}  // namespace ptk
