// The pieces of torch that ops need and torch::stable of TORCH_TARGET_VERSION does not offer in the form they need.
// Each says when it can go.
#pragma once

#include "csrc/core/checks.h"
#include "csrc/core/dtype.h"

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace ptk {

using torch::stable::Tensor;

// What operators take text as. As a std::string it would never be freed: torch::stable (2.13 still) returns a copy of
// one that it has made with new. Goes when TORCH_TARGET_VERSION's does not.
struct Text : std::string {
  using std::string::string;
};

inline Text take_text(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  PTK_CHECK(torch_string_length(handle, &length) == TORCH_SUCCESS && torch_string_c_str(handle, &data) == TORCH_SUCCESS,
            "ptkernels: cannot read a text argument");
  const Text text(data, length);
  PTK_CHECK(torch_delete_string(handle) == TORCH_SUCCESS, "ptkernels: cannot free a text argument");
  return text;
}

}  // namespace ptk

template <>
struct torch::stable::detail::ToImpl<ptk::Text> {
  static ptk::Text call(StableIValue value, uint64_t, bool) { return ptk::take_text(to<StringHandle>(value)); }
};

namespace ptk {

// torch::stable::Tensor has no raw dtype getter; scalar_type() throws a message of its own on dtypes it does not know,
// where ops want to name the argument. Goes when scalar_type() covers every dtype.
inline int32_t shim_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  PTK_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype) == TORCH_SUCCESS, "ptkernels: cannot read a tensor's dtype");
  return dtype;
}

inline std::optional<DType> float_dtype(const Tensor& tensor) {
  static const std::array<int32_t, 4> known = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(),
                                               aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  const int32_t dtype = shim_dtype(tensor);
  for (size_t i = 0; i < known.size(); ++i) {
    if (known[i] == dtype) {
      return static_cast<DType>(i);
    }
  }
  return std::nullopt;
}

inline bool is_bool(const Tensor& tensor) {
  static const int32_t bool_dtype = aoti_torch_dtype_bool();
  return shim_dtype(tensor) == bool_dtype;
}

inline bool is_int64(const Tensor& tensor) {
  static const int32_t int64_dtype = aoti_torch_dtype_int64();
  return shim_dtype(tensor) == int64_dtype;
}

inline bool is_int32(const Tensor& tensor) {
  static const int32_t int32_dtype = aoti_torch_dtype_int32();
  return shim_dtype(tensor) == int32_dtype;
}

inline int32_t shim_dtype(DType dtype) {
  switch (dtype) {
  case DType::f64:
    return aoti_torch_dtype_float64();
  case DType::f32:
    return aoti_torch_dtype_float32();
  case DType::bf16:
    return aoti_torch_dtype_bfloat16();
  case DType::f16:
    return aoti_torch_dtype_float16();
  }
  return -1;
}

// torch::stable has no empty_strided as of torch 2.13. Uninitialised, on the device of `like`.
template <typename Sizes>
Tensor empty_strided(const Tensor& like, const Sizes& sizes, const Sizes& strides, DType dtype) {
  int32_t device_type = 0;
  int32_t device_index = 0;
  AtenTensorHandle handle = nullptr;
  PTK_CHECK(aoti_torch_get_device_type(like.get(), &device_type) == TORCH_SUCCESS &&
                aoti_torch_get_device_index(like.get(), &device_index) == TORCH_SUCCESS &&
                aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                         shim_dtype(dtype), device_type, device_index, &handle) == TORCH_SUCCESS,
            "ptkernels: cannot allocate a tensor of shape ", shape_text(sizes));
  return Tensor(handle);
}

template <size_t Rank>
Tensor empty_strided(const Tensor& like, const std::array<int64_t, Rank>& sizes,
                     const std::array<int64_t, Rank>& strides, DType dtype) {
  return empty_strided<std::array<int64_t, Rank>>(like, sizes, strides, dtype);
}

inline Tensor empty_contiguous(const Tensor& like, const std::vector<int64_t>& sizes, DType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) {
    strides[i] = stride;
  }
  return empty_strided(like, sizes, strides, dtype);
}

// The tensor itself, or a copy of it on the CPU, for which the host waits.
inline Tensor on_cpu(const Tensor& tensor) {
  if (tensor.is_cpu()) {
    return tensor;
  }
  std::vector<int64_t> strides(tensor.dim());
  int64_t stride = 1;
  for (size_t i = strides.size(); i-- > 0; stride *= tensor.size(static_cast<int64_t>(i))) {
    strides[i] = stride;
  }
  AtenTensorHandle handle = nullptr;
  PTK_CHECK(aoti_torch_empty_strided(tensor.dim(), tensor.sizes().data(), strides.data(), shim_dtype(tensor),
                                     aoti_torch_device_type_cpu(), 0, &handle) == TORCH_SUCCESS,
            "ptkernels: cannot allocate a tensor of shape ", shape_text(tensor.sizes()));
  Tensor copy(handle);
  return torch::stable::copy_(copy, tensor);
}

}  // namespace ptk
