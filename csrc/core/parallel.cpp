#include "csrc/core/parallel.h"

#include "csrc/core/checks.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

namespace ptk {

void parallel_for(int64_t begin, int64_t end, void (*fn)(int64_t b, int64_t e, void* ctx), void* ctx) {
  if (end - begin == 1) {
    fn(begin, end, ctx);
  } else if (begin < end) {
    PTK_CHECK(torch_parallel_for(begin, end, 1, fn, ctx) == TORCH_SUCCESS, "ptkernels: a parallel region failed");
  }
}

int num_threads() {
  uint32_t count = 1;
  PTK_CHECK(torch_get_num_threads(&count) == TORCH_SUCCESS, "ptkernels: torch.get_num_threads() failed");
  return static_cast<int>(count);
}

}  // namespace ptk
