// How kernels divide a thread's scratch block.
#pragma once

#include "csrc/cpu/gemm/layout.h"

namespace ptk::PTK_ISA {

// Consecutive pieces of one scratch block, each aligned to a cache line.
struct Carver {
  static constexpr intptr_t kOrigin = 64;  // of a dry run that only counts
  char* next = reinterpret_cast<char*>(kOrigin);
  template <class U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return piece;
  }
  size_t bytes() const { return reinterpret_cast<intptr_t>(next) - kOrigin; }
};

}  // namespace ptk::PTK_ISA
