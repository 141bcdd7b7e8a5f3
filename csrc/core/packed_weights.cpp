// Operators on the store of packed weights, for settings and tests:
//
//   _limit_packed_weights(bytes)  keeps no more than that
//   _packed_weights_info()        bytes kept, limit, entries, hits, misses
//   _fingerprint(memory)          of a contiguous tensor's bytes, within this process
#include "csrc/cpu/packed_weights.h"

#include "csrc/core/checks.h"
#include "csrc/cpu/fingerprint.h"

#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace ptk {
namespace {

void limit(int64_t bytes) {
  PTK_CHECK(bytes >= 0, "_limit_packed_weights: bytes: got ", bytes, ", expected 0 or more");
  while (!limit_packed_weights(bytes)) {
  }
}

std::vector<int64_t> info() {
  const PackedWeightsInfo i = packed_weights_info();
  return {i.bytes, i.limit, i.entries, i.hits, i.misses};
}

std::vector<int64_t> fingerprint(torch::stable::Tensor memory) {
  PTK_CHECK(memory.is_contiguous() && memory.is_cpu(), "_fingerprint: memory: got another tensor, expected a "
                                                       "contiguous one on the CPU");
  uint64_t digest[kDigestWords] = {};
  add_fingerprint({memory.const_data_ptr(), static_cast<size_t>(memory.numel() * memory.element_size())}, digest);
  return {digest, digest + kDigestWords};
}

}  // namespace
}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("_limit_packed_weights(int bytes) -> ()");
  library.def("_packed_weights_info() -> int[]");
  library.def("_fingerprint(Tensor memory) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CompositeExplicitAutograd, library) {
  library.impl("_limit_packed_weights", TORCH_BOX(&ptk::limit));
  library.impl("_packed_weights_info", TORCH_BOX(&ptk::info));
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("_fingerprint", TORCH_BOX(&ptk::fingerprint));
}
