// The one registration of the ptkernels namespace. Ops add their schemas to it from their own files with
// STABLE_TORCH_LIBRARY_FRAGMENT; registering the namespace twice would abort the process.
#include "csrc/core/stable_compat.h"
#include "csrc/cpu/isa.h"

#include <torch/csrc/stable/library.h>

namespace {

void set_max_isa(ptk::Text name) {
  ptk::set_max_isa(name);
}

}  // namespace

STABLE_TORCH_LIBRARY(ptkernels, library) {
  library.def("_set_max_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CompositeExplicitAutograd, library) {
  library.impl("_set_max_isa", TORCH_BOX(&set_max_isa));
}
