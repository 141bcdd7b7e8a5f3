// Twin of csrc/cuda/async_copy.cuh: a copy is done when it is waited for, or at once.
#pragma once

#include "tests/cuda_host/cuda_host.h"

namespace ptk::cuda {

inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    cuda_host::active->fail("cp.async: an address is not a multiple of 16");
  }
  if (bytes < 0 || bytes > 16) {
    cuda_host::active->fail("cp.async: got a size that is not 0 to 16 bytes");
  }
  const auto copy = [=] {
    std::memcpy(shared, global, bytes);
    std::memset(static_cast<char*>(shared) + bytes, 0, 16 - bytes);
  };
  if (cuda_host::active->copies_at_once()) {
    copy();
  } else {
    cuda_host::active->copies().back().push_back(copy);
  }
}

inline void commit_copies() {
  cuda_host::active->copies().emplace_back();
}

template <int Groups>
void wait_copies() {
  auto& groups = cuda_host::active->copies();
  while (groups.size() > Groups + 1) {
    for (const auto& copy : groups.front()) {
      copy();
    }
    groups.pop_front();
  }
}

}  // namespace ptk::cuda
