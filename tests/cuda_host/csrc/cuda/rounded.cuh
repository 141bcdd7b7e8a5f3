// Twin of csrc/cuda/rounded.cuh.
#pragma once

namespace ptk::cuda {

template <typename Number>
Number multiply_rounded(Number a, Number b) {
  const volatile Number product = a * b;
  return product;
}

}  // namespace ptk::cuda
