// torch keeps the setting where its stable ABI does not reach. The operator that tells it is implemented in Python
// (ptkernels/_loader.py), which says so; programs without Python have "highest".
#include "csrc/core/float32_precision.h"

#include "csrc/core/checks.h"

#include <array>
#include <atomic>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

namespace ptk {
namespace {

std::atomic<bool> is_told{false};

void tell_float32_precision() {
  is_told = true;
}

}  // namespace

Float32Precision float32_precision() {
  if (!is_told) {
    return Float32Precision::highest;
  }
  std::array<StableIValue, 1> stack{};
  PTK_CHECK(torch_call_dispatcher("ptkernels::_float32_precision", "", stack.data(), TORCH_ABI_VERSION) ==
                TORCH_SUCCESS,
            "ptkernels: cannot read torch's float32 matmul precision");
  return static_cast<Float32Precision>(torch::stable::detail::to<int64_t>(stack[0]));
}

}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("_float32_precision() -> int");
  library.def("_tell_float32_precision() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CompositeExplicitAutograd, library) {
  library.impl("_tell_float32_precision", TORCH_BOX(&ptk::tell_float32_precision));
}
